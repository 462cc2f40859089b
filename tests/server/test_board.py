"""Limits that several processes hold together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minisgl.core.types import Request, SamplingParams
from minisgl.server.board import Board, Held
from minisgl.server.errors import OverloadedError, QueueFullError
from minisgl.server.limits import Limits, Queue


def requests(count: int, tokens: int = 10) -> list[Request]:
    return [Request.make(id=str(i), prompt=[5] * tokens, params=SamplingParams()) for i in range(count)]


def test_queues_on_one_board_share_their_limits(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board", 3)
    limits = Limits(live=6, max_queued_requests=3, max_queued_tokens=40)
    first, second, third = (Queue(limits, Board(tmp_path / "board", 3), row) for row in range(3))
    first.check(requests(5, tokens=100))  # nothing waits anywhere: whatever the server can keep
    first.enter(10)
    second.enter(20)
    assert third.whole == Held(requests=2, tokens=30, live=2) == board.held()
    third.check(requests(1))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        third.check(requests(2, tokens=1))
    with pytest.raises(QueueFullError, match="prompts of 30 tokens"):
        third.check(requests(1, tokens=11))
    first.leave(10, waited=1.0)
    second.leave(20)
    second.end()
    assert third.whole == Held(requests=0, tokens=0, live=1)
    with pytest.raises(OverloadedError, match="1 requests are live"):
        third.check(requests(6))


def test_a_row_is_empty_when_its_process_is_gone(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board", 2)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom minisgl.server.board import Board, Held\n"
        "board = Board(Path(sys.argv[1]), 2)\nboard.post(1, Held(7, 1 << 40, 9))\nboard.count_closed(1)\nos._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "board")], check=False).returncode == 9
    board.post(0, Held(1, 2, 3))
    assert board.held() == Held(8, (1 << 40) + 2, 12)
    assert board.closed(1) == 1
    board.clear(1)
    assert (board.held(), board.closed(1)) == (Held(1, 2, 3), 0)
    board.close()
