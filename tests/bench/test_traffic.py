"""What is sent and when: traces of three formats, lengths, what recurs, expected hits, statistics of arrivals."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minisgl.errors import ConfigError
from minisgl_bench import traffic
from minisgl_bench.workload import WorkloadSpec, make_workload

REQUESTS = ((0.0, 40, 9, (1, 2, 3)), (2.0, 48, 5, (1, 2, 4)), (3.0, 50, 700, (1, 9, 3)), (5.0, 7, 1))
TRACE = traffic.Trace("bailian", 16, tuple(traffic.TraceRequest(*row) for row in REQUESTS))


def tokens(session: traffic.Session, seed: int = 0) -> list[int]:
    (turn,) = session.turns
    found: list[int] = traffic.IdPrompts(100, 110_000).fields(turn, seed, ())["prompt"]
    return found


def test_prompts_have_the_traces_lengths_and_repeat_as_its_hash_ids() -> None:
    sessions = traffic.from_trace(TRACE, 1.0, None, None)
    first, second, third, fourth = map(tokens, sessions)
    assert [len(prompt) for prompt in (first, second, third, fourth)] == [40, 48, 50, 7]
    assert first[:32] == second[:32]
    assert len(set(first[32:]) & set(second[32:])) == 0
    assert first[:16] == third[:16]
    assert third[32:40] == first[32:40]  # the same block at the same place behind another prefix
    assert not set(third[48:]) & set(first + second)  # what no hash id covers is the request's own
    assert min(first + second + third) >= 100
    assert max(first + second + third) < 110_000
    assert tokens(sessions[0]) == first
    assert not set(tokens(sessions[0], seed=1)) & set(first)


def test_equal_blocks_are_equal_wherever_they_stand() -> None:
    a, b = traffic.Segment(("block", 1), 16), traffic.Segment(("block", 2), 16)
    forward, backward = traffic.segment_numbers(3, [a, b], 10**6), traffic.segment_numbers(3, [b, a], 10**6)
    assert forward[:16].tolist() == backward[16:].tolist()
    assert forward[16:].tolist() == backward[:16].tolist()
    many = traffic.segment_numbers(3, [traffic.Segment(("own", 1), 100_000)], 1000)
    assert many.mean() == pytest.approx(499.5, abs=5)
    assert len(np.unique(many)) == 1000


def test_scale_stretches_the_gaps_and_limits_cut() -> None:
    sessions = traffic.from_trace(TRACE, 0.5, 30, 8)
    assert [session.due for session in sessions] == [0.0, 1.0, 1.5, 2.5]
    assert [session.turns[0].input_length for session in sessions] == [30, 30, 30, 7]
    assert [session.turns[0].output_length for session in sessions] == [8, 5, 8, 1]
    assert tokens(sessions[0]) == tokens(traffic.from_trace(TRACE, 1.0, None, None)[0])[:30]


def test_expected_hits_are_whole_pages_of_what_came_before_and_never_the_last_token() -> None:
    prompts = [turn.segments for turn in traffic.all_turns(traffic.from_trace(TRACE, 1.0, None, None))]
    assert traffic.expected_hits(prompts, 16) == [0, 32, 16, 0]
    assert traffic.expected_hits([*prompts, prompts[0]], 1)[-1] == 39
    assert traffic.expected_hits([*prompts, prompts[0]], 16)[-1] == 32
    short, long = traffic.Segment(("block", 1), 10), traffic.Segment(("block", 1), 16)
    assert traffic.expected_hits([[long], [short], [long, short]], 1) == [0, 9, 16]
    tail = traffic.Segment(("own", 5), 4)
    assert traffic.expected_hits([[long, tail], [short, tail]], 1) == [0, 10]


def test_the_workload_has_the_lengths_of_the_offline_one() -> None:
    spec = WorkloadSpec(num_requests=12, seed=3)
    offline = make_workload(spec, 151_936)
    turns = list(traffic.all_turns(traffic.from_workload(spec)))
    assert [turn.input_length for turn in turns] == [len(prompt) for prompt in offline.prompts]
    assert [turn.output_length for turn in turns] == [params.max_tokens for params in offline.params]
    assert traffic.expected_hits([turn.segments for turn in turns], 1) == [0] * 12


def test_chats_take_up_everything_said_before_behind_a_shared_prompt() -> None:
    sessions = traffic.from_chats(0, 3, 2, 2, 20, (5, 9), (4, 6), 1.5)
    assert [(len(session.turns), session.think) for session in sessions] == [(2, 1.5)] * 3
    first, second = sessions[0].turns
    assert [message.role for message in second.messages] == ["system", "user", "assistant", "user"]
    assert second.segments[: len(first.segments)] == first.segments
    assert second.messages[2].segments[0].length == first.output_length
    systems = [session.turns[0].messages[0] for session in sessions]
    assert systems[0] == systems[2] != systems[1]
    hits = traffic.expected_hits([turn.segments for turn in traffic.all_turns(sessions)], 1)
    assert hits == [0, first.input_length, 0, sessions[1].turns[0].input_length, 20, sessions[2].turns[0].input_length]


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_their_rate_and_their_variation(burstiness: float, variation: float) -> None:
    times = traffic.arrival_times(40_000, 8.0, burstiness, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
    assert traffic.arrival_times(40_000, 8.0, burstiness, seed=1).tolist() == times.tolist()
    assert traffic.arrival_times(40_000, 8.0, burstiness, seed=2).tolist() != times.tolist()


def test_infinite_burstiness_spaces_evenly() -> None:
    sessions = traffic.with_arrivals(traffic.from_trace(TRACE, 1.0, None, None), 4.0, math.inf, 0)
    assert [session.due for session in sessions] == [0.0, 0.25, 0.5, 0.75]


def test_requests_that_the_server_cannot_take_are_counted_beforehand() -> None:
    sessions = traffic.from_trace(TRACE, 1.0, None, None)
    traffic.require_fit(sessions, 750)
    traffic.require_fit(sessions, None)
    with pytest.raises(ConfigError, match=r"1 of 4 requests are longer than the 749 tokens .* longest has 750"):
        traffic.require_fit(sessions, 749)


def count_words(known: set[str], overhead: int) -> traffic.TextPrompts:
    def count(text: str) -> int:
        return overhead + sum(1 if word in known else 2 for word in text.split())

    return traffic.TextPrompts(*traffic.calibrate(count))


def test_words_that_are_one_token_are_found_and_the_overhead_with_them() -> None:
    known = set(traffic.WORDS) - {"water", "people"}
    prompts = count_words(known, overhead=5)
    assert set(prompts.words) == known
    assert prompts.overhead == 5
    turn = traffic.single([traffic.Segment(("own", 1), 40)], 4)
    words = prompts.fields(turn, 0, ())["prompt"].split()
    assert len(words) == 35
    assert set(words) <= known
    assert prompts.expected_tokens(turn) == 40


def test_a_tokenizer_without_common_words_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"for 15 common words only; use --endpoint ids"):
        count_words(set(traffic.WORDS[:15]), overhead=0)


def test_chats_send_the_servers_answers_back() -> None:
    prompts = traffic.TextPrompts(tuple(traffic.WORDS[:32]), 3, chat=True)
    user = traffic.ChatMessage("user", (traffic.Segment(("message", 0), 6),))
    answer = traffic.ChatMessage("assistant", (traffic.Segment(("answer", 0), 4),))
    assert len(prompts.fields(traffic.Turn((user,), 4), 0, ())["messages"][0]["content"].split()) == 3
    turn = traffic.Turn((user, answer, user), 4)
    messages = prompts.fields(turn, 0, ["what it said"])["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "what it said"
    assert len(messages[2]["content"].split()) == 6
    assert prompts.expected_tokens(turn) is None


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bailian(timestamp: float, length: int, ids: list[int]) -> dict[str, Any]:
    row = {"chat_id": 7, "parent_chat_id": -1, "timestamp": timestamp, "input_length": length, "output_length": 9}
    return row | {"type": "text", "turn": 1, "hash_ids": ids}


def test_bailian_times_are_seconds_and_blocks_have_16_tokens(tmp_path: Path) -> None:
    rows = [bailian(61.5, 40, [1, 2, 3]), bailian(63.0, 33, [1, 2])]
    trace = traffic.read_trace(write_rows(tmp_path / "t", rows), 10)
    assert (trace.format, trace.block) == ("bailian", 16)
    assert trace.requests == (traffic.TraceRequest(0.0, 40, 9, (1, 2, 3)), traffic.TraceRequest(1.5, 33, 9, (1, 2)))


def test_mooncake_times_are_milliseconds_and_blocks_have_512_tokens(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": 513, "output_length": 4, "hash_ids": [0, t]} for t in (3000, 0, 250)]
    trace = traffic.read_trace(write_rows(tmp_path / "t", rows), 10)
    assert (trace.format, trace.block) == ("mooncake", 512)
    assert [(r.arrival, r.hash_ids[1]) for r in trace.requests] == [(0.0, 0), (0.25, 250), (3.0, 3000)]


LONG = '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2, 3]'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_times_are_dates_and_nothing_is_known_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{AZURE}2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9305900,396,109\n")
    trace = traffic.read_trace(path, 10)
    assert (trace.format, trace.block) == ("azure", 0)
    assert [(r.input_length, r.output_length) for r in trace.requests] == [(374, 44), (396, 109)]
    assert [r.arrival for r in trace.requests] == [0.0, pytest.approx(4.25)]
    dates = ("2023-11-16 18:15:46", "2023-11-16 19:15:47+01:00", "2023-11-16 13:15:48-05:00")
    path.write_text(AZURE + "\n".join(f"{date},5,6" for date in dates))
    assert [request.arrival for request in traffic.read_trace(path, 10).requests] == [0.0, 1.0, 2.0]


def test_only_as_many_lines_are_read_as_asked_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t", [bailian(index, 16, [index]) for index in range(5)])
    path.write_text(path.read_text() + "nonsense\n")
    assert [request.hash_ids for request in traffic.read_trace(path, 5).requests] == [(0,), (1,), (2,), (3,), (4,)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: the trace is empty"),
        ("a,b\n", "t: line 1 is neither a JSON object nor a header with TIMESTAMP, ContextTokens, GeneratedTokens"),
        ('{"timestamp": \n', "t:1: "),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n\n{"timestamp": 1}\n', "t:3: .*input_length"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}\n', r"t:1: .*>= 1.*input_length"),
        (LONG + "}\n", r"t:1: 3 hash_ids for 600 tokens in blocks of 512 \(mooncake\)"),
        (AZURE, "t: the trace has no requests"),
        (AZURE + "2023-11-16 18:15:46,x,4\n", "t:2: .*'x'"),
        (AZURE + "2023-11-16 18:15:46,4\n", "t:2: the line has no GeneratedTokens"),
        (AZURE + "2023-11-16 18:15:46,4,0\n", "t:2: .*at least 1"),
    ],
)
def test_a_wrong_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        traffic.read_trace(path, 10)
    with pytest.raises(ConfigError, match=r"absent: No such file or directory$"):
        traffic.read_trace(tmp_path / "absent", 10)
