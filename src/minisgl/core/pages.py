"""The owner of KV pages: each page is free, in the prefix cache, or owned by one running row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minisgl.core.plan import EMPTY, Int32
from minisgl.core.radix_cache import EvictionPolicy, Node, RadixCache

Slots = NDArray[np.signedinteger[Any]]
PageWrites = Int32  # (3, p), slots, indices and page ids: page_table[slots, indices] = page ids


class PageAllocator:
    """A stack of free page ids 0 … num_pages - 1; whole arrays go in and out. Starts by handing out ascending runs."""

    def __init__(self, num_pages: int) -> None:
        self.num_free = num_pages
        self._stack: Int32 = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._is_free = np.ones(num_pages, np.bool_)

    def allocate(self, count: int) -> Int32:
        """Take `count` pages off the free list, (count,) ids. Raises RuntimeError, and then takes none."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages were asked for and {self.num_free} are free")
        rest = self.num_free - count
        pages = self._stack[rest : self.num_free][::-1].copy()
        self._is_free[pages] = False
        self.num_free = rest
        return pages

    def free(self, pages: Int32) -> None:
        """Give pages back. Raises RuntimeError, changing nothing, for a page that is free."""
        ordered, end = np.sort(pages), self.num_free + len(pages)
        again = self._is_free[ordered]
        again[1:] |= ordered[1:] == ordered[:-1]
        if again.any():
            raise RuntimeError(f"double free of page {ordered[again.argmax()]}")
        self._is_free[pages] = True
        self._stack[self.num_free : end] = pages[::-1]
        self.num_free = end


class CacheManager:
    """Pages of running rows and of the prefix cache.

    A row's pages are borrowed from the cache (and locked there) or its own. Page ids in a row never change.
    Without `shared` rows share nothing and the cache stays empty.
    """

    def __init__(
        self, num_pages: int, page_size: int, shared: bool, max_rows: int, max_pages_per_row: int,
        eviction: EvictionPolicy | None = None,
    ) -> None:  # fmt: skip
        self.num_pages = num_pages
        self.page_size = page_size
        self.page_table: Int32 = np.zeros((max_rows, max_pages_per_row), np.int32)
        self.row_pages: Int32 = np.zeros(max_rows, np.int32)  # so many of a row's first are live
        self._allocator = PageAllocator(num_pages)
        self._shared = shared
        self.tree = RadixCache(page_size, eviction)
        self.now = 0.0  # s, for the policies; the engine sets it before it plans a step
        self._nodes: dict[int, Node] = {}  # that live rows lock; pages behind its end are the row's own
        self._duplicates: dict[int, Int32] = {}  # pages before that end which the row computed and owns all the same

    def num_borrowed(self, slot: int) -> int:
        return self._nodes[slot].end - len(self._duplicates[slot])

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_cached(self) -> int:
        return self.tree.num_pages

    @property
    def num_owned(self) -> int:
        return self.num_pages - self.num_free - self.num_cached

    @property
    def available(self) -> int:
        """Pages that `extend` can give: free ones, and cached ones that no row borrows."""
        return self.num_free + self.tree.num_evictable

    def match(self, tokens: Int32, earlier: Node | None = None) -> Node:
        """The node that ends what is cached of `tokens`: whole pages, without the last token, whose logits are needed.

        The search goes on from an `earlier` match of these tokens or their beginning.
        """
        return self.tree.match(tokens[: (len(tokens) - 1) // self.page_size * self.page_size], earlier)

    def acquire(self, slot: int, node: Node, again: bool = False) -> PageWrites:
        """Start a row, for a request `again`, on the cached prefix that ends with `node`; all that it then holds."""
        assert slot not in self._nodes, f"row {slot} is in use"
        self.tree.lock(node)
        self.tree.use(node, self.now, again)
        pages: Int32 = np.concatenate([EMPTY, *(held.pages for held in reversed(node.path()))])
        self._nodes[slot], self._duplicates[slot] = node, EMPTY
        self.row_pages[slot] = len(pages)
        self.page_table[slot, : len(pages)] = pages
        return np.stack([np.full(len(pages), slot), np.arange(len(pages)), pages], dtype=np.int32)

    def available_beside(self, prefix: Node, leaving: Sequence[int] = ()) -> list[int]:
        """What `available` would be if a row borrowed this prefix, before and after each of these rows left in turn."""
        self.tree.lock(prefix)
        counts, owned = [self.available], 0
        for slot in leaving:
            self.tree.unlock(self._nodes[slot])
            owned += int(self.row_pages[slot]) - self.num_borrowed(slot)
            counts.append(self.available + owned)
        for slot in leaving:
            self.tree.lock(self._nodes[slot])
        self.tree.unlock(prefix)
        return counts

    def pages_needed(self, slots: Slots, new_lens: Slots) -> Int32:
        """Pages that each row lacks to hold `new_lens` tokens, (len(slots),)."""
        lacking: Int32 = (-(-new_lens // self.page_size) - self.row_pages[slots]).astype(np.int32)
        return np.maximum(lacking, 0)

    def extend(self, slots: Slots, new_lens: Slots) -> PageWrites:
        """Give rows, each named once, the pages that they lack to hold `new_lens` tokens, evicting what that takes.

        Raises RuntimeError, changing nothing, when more than `available` pages are needed.
        """
        need = self.pages_needed(slots, new_lens)
        total = int(need.sum())
        if total > self.available:
            raise RuntimeError(f"{total} pages are needed and {self.available} are available")
        grown = np.flatnonzero(need)
        rows, need = slots[grown].astype(np.int32), need[grown]
        end = self.row_pages[rows] + need
        assert not len(end) or int(end.max()) <= self.page_table.shape[1], "a row outgrows the page table"
        if total > self.num_free:
            self._allocator.free(self.tree.evict(total - self.num_free))
        pages = self._allocator.allocate(total)
        # Write i is page i - (pages of the rows before its row) of what its row gains.
        indices = np.arange(total, dtype=np.int32) + np.repeat(end - np.cumsum(need, dtype=np.int32), need)
        owners = np.repeat(rows, need)
        self.page_table[owners, indices] = pages
        self.row_pages[rows] = end
        return np.stack([owners, indices, pages])

    def publish(self, slot: int, tokens: Int32, computed: int) -> None:
        """Offer the row's whole pages below `computed` tokens to the cache, which lends those it takes to the row.

        The step that writes these pages must be launched before, or as, the first step that reads them: within a step
        each layer writes the KV of all rows before any row attends.
        """
        node = self._offer(slot, tokens, computed)
        self.tree.lock(node)
        self.tree.unlock(self._nodes[slot])
        self._nodes[slot] = node

    def release(self, slot: int, tokens: Int32, computed: int) -> None:
        """End a row: whole pages below `computed` whose `tokens` are known go to the cache, its other pages are freed.

        A launched step may still write to them: it is executed before the steps of the rows that get them.
        """
        node = self._offer(slot, tokens, computed)
        own = self.page_table[slot, node.end : self.row_pages[slot]]
        self._allocator.free(np.concatenate([self._duplicates.pop(slot), own]))
        self.tree.unlock(self._nodes.pop(slot))
        self.row_pages[slot] = 0

    def flush(self) -> int:
        """Drop from the cache all that no row borrows; return how many pages that frees."""
        pages = self.tree.evict(self.tree.num_evictable)
        self._allocator.free(pages)
        if self.tree.listener is not None and not self.tree.num_pages:
            self.tree.listener.cleared()
        return len(pages)

    def _offer(self, slot: int, tokens: Int32, computed: int) -> Node:
        """Offer the row's whole known and computed pages to the cache; return the node that the row must now lock."""
        node, whole = self._nodes[slot], min(computed, len(tokens)) // self.page_size
        assert whole <= self.row_pages[slot], "more is computed than the row can hold"
        if whole <= node.end or not self._shared:
            return node
        tokens, pages = tokens[: whole * self.page_size], self.page_table[slot, :whole]
        known = self.tree.match(tokens, node)
        self._duplicates[slot] = np.concatenate([self._duplicates[slot], pages[node.end : known.end]])
        if known.end == whole:
            return known
        return self.tree.insert(known, tokens[known.end * self.page_size :], pages[known.end :], self.now)
