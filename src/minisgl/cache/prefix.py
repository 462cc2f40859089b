"""What the manager asks of a cache of prefixes, and the node of which such a cache is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from minisgl.cache.allocator import Int32


class Node:
    """A run of whole pages in a prefix tree. The path from the root spells the prefix whose KV `pages` hold.

    `tokens` is (len(pages) * page_size,). `locks` counts the rows that hold this node or one below it, so a node
    without locks has none below it. `last_used` is a count of uses, not a time. `queued` says that the eviction queue
    has an entry for this node.
    """

    __slots__ = ("children", "last_used", "locks", "pages", "parent", "queued", "tokens")

    def __init__(self, tokens: Int32, pages: Int32, parent: Node | None) -> None:
        self.tokens = tokens
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.last_used = 0
        self.queued = False

    @property
    def loose(self) -> bool:
        """Whether eviction may take pages from this node's end: an unlocked leaf, and not the root."""
        return not self.locks and not self.children and self.parent is not None

    @classmethod
    def root(cls) -> Node:
        """A node of the empty prefix."""
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), None)


class PrefixCache(Protocol):
    """Pages by the tokens whose KV they hold. Token arrays are int32 and contiguous; only whole pages are cached.

    What `match` and `insert` return stays valid while it is locked; a node keeps its end whatever happens around it.
    """

    @property
    def root(self) -> Node:
        """The node of the empty prefix; never evicted."""

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""

    @property
    def num_evictable(self) -> int:
        """Pages that no lock protects."""

    def match_pages(self, tokens: Int32) -> int:
        """Pages of the longest cached prefix of `tokens`. Changes nothing."""

    def match(self, tokens: Int32) -> tuple[Node, Int32]:
        """The node that ends the longest cached prefix of `tokens`, and the pages of that prefix."""

    def lock(self, node: Node) -> None:
        """Protect the prefix that ends with `node` from eviction, once more; a use of it."""

    def unlock(self, node: Node) -> None:
        """Take back one `lock`; a use of the prefix, too."""

    def insert(self, node: Node, tokens: Int32, pages: Int32) -> tuple[Node, int]:
        """Offer `pages`, holding the KV of `tokens` behind the prefix that ends with `node`.

        Returns (end, known): the cache had pages for the first `known` already and now owns `pages[known:]`; `end` is
        the node that ends with the last of these, or `node` when there are none.
        """

    def evict(self, count: int) -> Int32:
        """Drop up to `count` pages that no lock protects, the least recently used first; return their ids."""

    def check(self, holders: Iterable[Node]) -> Int32:
        """Every page in the cache. Raises RuntimeError unless locks are those of `holders` and the counts are right."""
