"""Reading the three formats of request traces; a line that is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minisgl.errors import ConfigError
from minisgl_bench.traces import TraceRequest, read_trace


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bailian(timestamp: float, length: int, ids: list[int], turn: int = 1) -> dict[str, Any]:
    return {
        "chat_id": 7, "parent_chat_id": -1, "timestamp": timestamp, "input_length": length, "output_length": 9,
        "type": "text", "turn": turn, "hash_ids": ids,
    }  # fmt: skip


def test_bailian_times_are_seconds_and_blocks_have_16_tokens(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t", [bailian(61.5, 40, [1, 2, 3]), bailian(63.0, 33, [1, 2], 2)]), 10)
    assert (trace.format, trace.block) == ("bailian", 16)
    assert trace.requests == (TraceRequest(0.0, 40, 9, (1, 2, 3)), TraceRequest(1.5, 33, 9, (1, 2), 2))


def test_mooncake_times_are_milliseconds_and_blocks_have_512_tokens(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": 513, "output_length": 4, "hash_ids": [0, t]} for t in (3000, 0, 250)]
    trace = read_trace(write(tmp_path / "t", rows), 10)
    assert (trace.format, trace.block) == ("mooncake", 512)
    assert [request.arrival for request in trace.requests] == [0.0, 0.25, 3.0]
    assert [request.hash_ids[1] for request in trace.requests] == [0, 250, 3000]


def test_azure_times_are_dates_and_nothing_is_known_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = ("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9305900,396,109", "")
    path.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *lines)))
    trace = read_trace(path, 10)
    assert (trace.format, trace.block) == ("azure", 0)
    assert [(r.arrival, r.input_length, r.output_length) for r in trace.requests] == [
        (0.0, 374, 44),
        (pytest.approx(4.25), 396, 109),
    ]


def test_arrivals_of_two_utc_offsets_are_in_one_time(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    dates = ("2023-11-16 18:15:46", "2023-11-16 19:15:47+01:00", "2023-11-16 13:15:48-05:00")
    path.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *(f"{date},5,6" for date in dates))))
    assert [request.arrival for request in read_trace(path, 10).requests] == [0.0, 1.0, 2.0]


def test_only_as_many_lines_are_read_as_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "t", [bailian(index, 16, [index]) for index in range(5)])
    path.write_text(path.read_text() + "nonsense\n")
    assert [request.hash_ids for request in read_trace(path, 5).requests] == [(0,), (1,), (2,), (3,), (4,)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: the trace is empty"),
        ("a,b\n", "t: line 1 is neither a JSON object nor a header with TIMESTAMP, ContextTokens, GeneratedTokens"),
        ('{"timestamp": \n', "t:1: "),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n\n{"timestamp": 1}\n', "t:3: .*input_length"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}\n', r"t:1: .*>= 1.*input_length"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2, 3]}\n',
            r"t:1: 3 hash_ids for 600 tokens in blocks of 512 \(mooncake\)",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "t: the trace has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,4\n", "t:2: .*'x'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,4\n", "t:2: the line has no GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,4,0\n", "t:2: .*at least 1"),
    ],
)
def test_a_wrong_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path, 10)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: No such file or directory$"):
        read_trace(tmp_path / "absent", 10)
