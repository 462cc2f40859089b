"""What the API processes of one server hold together: numbers in a file that all of them map into their memory."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path

COLUMNS = 4
BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """Requests that wait for their first token, the tokens of their prompts, and requests that have not ended."""

    requests: int = 0
    tokens: int = 0
    live: int = 0


class Board:
    """A row of 64-bit numbers for each process. Only its own process writes to a row while it lives.

    Reading the others' rows takes no lock. Two processes that look at the same moment may both take what one of them
    should have left: the sums can be exceeded by one HTTP request for every process but one.
    """

    def __init__(self, path: Path, rows: int) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), rows * COLUMNS * BYTES)
        self._numbers = memoryview(self._map).cast("q")
        self._rows = rows

    @classmethod
    def create(cls, path: Path, rows: int) -> Board:
        """A new file of zeros."""
        path.write_bytes(bytes(rows * COLUMNS * BYTES))
        return cls(path, rows)

    def post(self, row: int, held: Held) -> None:
        """Say what a process holds."""
        at = row * COLUMNS
        numbers = self._numbers
        numbers[at], numbers[at + 1], numbers[at + 2] = held.requests, held.tokens, held.live

    def held(self, without: int | None = None) -> Held:
        """What all hold, or all others."""
        starts = [row * COLUMNS for row in range(self._rows) if row != without]
        requests, tokens, live = (sum(self._numbers[at + column] for at in starts) for column in range(3))
        return Held(requests, tokens, live)

    def count_closed(self, row: int) -> None:
        """A connection that a process had been given is closed."""
        self._numbers[row * COLUMNS + 3] += 1

    def closed(self, row: int) -> int:
        """Connections that a process has seen closed."""
        return self._numbers[row * COLUMNS + 3]

    def clear(self, row: int) -> None:
        """The process of a row is gone, and another one will have it."""
        self._numbers[row * COLUMNS : (row + 1) * COLUMNS] = memoryview(bytes(COLUMNS * BYTES)).cast("q")

    def close(self) -> None:
        """Unmap the file."""
        self._numbers.release()
        self._map.close()
