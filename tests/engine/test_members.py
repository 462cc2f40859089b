"""The other ranks of a group as rank 0 sees them: which of them it says was the first to go."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from minisgl.distributed import worker_pool as members
from minisgl.distributed.messages import FromRank, Hello, RankFailed, encoder
from minisgl.distributed.worker_pool import Members
from minisgl.errors import ConfigError, EngineDeadError


class FarRank:
    """A rank's sockets, without the rank."""

    def __init__(self, rank: int, group: Members) -> None:
        self.context = zmq.Context()
        self.inbox, self.outbox = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        self.inbox.connect(group.addresses[rank - 1])
        self.outbox.connect(group.addresses[-1])
        self.say(Hello(rank))

    def say(self, message: FromRank) -> None:
        """Send word to rank 0."""
        self.outbox.send(encoder().encode(message))

    def go(self) -> None:
        """End, as a process does that is killed."""
        self.context.destroy(linger=200)


GONE = "rank 1 of 3 ended"
RESET = RankFailed(2, "connection reset by peer", asked=False)


@pytest.mark.parametrize(
    ("order", "kind", "message"),
    [
        (("1 goes", RESET), EngineDeadError, GONE),
        ((RESET, "1 goes"), EngineDeadError, GONE),
        ((RESET, RankFailed(1, "out of memory", asked=False), "1 goes"), EngineDeadError, "rank 1 of 3: out of memory"),
        ((RESET,), EngineDeadError, "rank 2 of 3: connection reset"),
        ((RankFailed(2, "--num-pages 9 needs more", asked=True),), ConfigError, "rank 2 of 3: --num-pages 9"),
    ],
)
def test_the_rank_that_went_first_is_named_and_not_who_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[str | RankFailed, ...],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(members, "LAST_WORDS_MS", 1500)  # this machine may be busy
    group = Members(3, f"ipc://{tmp_path}/*")
    ranks = [FarRank(1, group), FarRank(2, group)]
    try:
        group.wait()
        for event in order:
            if isinstance(event, RankFailed):
                ranks[event.rank - 1].say(event)
            else:
                ranks[0].go()
        with pytest.raises(kind, match=message):
            raise group.blame(RuntimeError("a collective failed"))
    finally:
        for rank in ranks:
            rank.go()
        group.close()
