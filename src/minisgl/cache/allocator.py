"""The free list of KV pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


class OutOfPages(Exception):
    """More pages were asked for than are free. Internal: whoever asks has counted before."""


class PageAllocator:
    """A stack of free page ids 0 … num_pages - 1; whole arrays go in and out. Starts by handing out ascending runs."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._stack: Int32 = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._place: Int32 = self._stack.copy()  # index of a free page in the stack, -1 for a page handed out

    def allocate(self, count: int) -> Int32:
        """Take `count` pages off the free list, (count,) ids. Raises OutOfPages, and then takes none."""
        if count > self.num_free:
            raise OutOfPages(f"{count} pages were asked for and {self.num_free} are free")
        rest = self.num_free - count
        pages = self._stack[rest : self.num_free][::-1].copy()
        self._place[pages] = -1
        self.num_free = rest
        return pages

    def free(self, pages: Int32) -> None:
        """Give pages back. Raises RuntimeError, changing nothing, for an unknown id and for a free page."""
        if len(pages) == 0:
            return
        if int(pages.min()) < 0 or int(pages.max()) >= self.num_pages:
            raise RuntimeError(f"pages {pages.min()} … {pages.max()} are not all within 0 … {self.num_pages - 1}")
        if (free := pages[self._place[pages] >= 0]).size:
            raise RuntimeError(f"double free of page {free[0]}")
        places = np.arange(self.num_free, self.num_free + len(pages), dtype=np.int32)
        self._place[pages[::-1]] = places
        # A page named twice keeps one of its two places, so the other is found missing here.
        if (twice := pages[::-1][self._place[pages[::-1]] != places]).size:
            self._place[pages] = -1
            raise RuntimeError(f"double free of page {twice[0]}")
        self._stack[self.num_free : self.num_free + len(pages)] = pages[::-1]
        self.num_free += len(pages)

    def free_pages(self) -> Int32:
        """The ids on the free list, in no order that means anything."""
        return self._stack[: self.num_free].copy()
