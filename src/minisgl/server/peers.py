"""The API processes beside this one, as an endpoint sees them that answers for the whole server."""

from __future__ import annotations

from typing import Protocol

from minisgl.server.tally import NOTHING, Tally


class Peers(Protocol):
    """Asks the others, where there are any. Times are in s."""

    async def tally(self, timeout: float) -> Tally:
        """What the others have counted together; of one that does not answer in time, what it said last."""

    async def abort(self, answer_id: str | None) -> int:
        """End the requests of an answer wherever it is made, or all (None), and say how many those were."""

    async def check(self, timeout: float) -> None:
        """Raise ApiProcessError when one of them does not answer in time."""


class Alone:
    """There are no others."""

    async def tally(self, timeout: float) -> Tally:
        """Nothing."""
        return NOTHING

    async def abort(self, answer_id: str | None) -> int:
        """Nothing."""
        return 0

    async def check(self, timeout: float) -> None:
        """Nothing is wrong with nobody."""
