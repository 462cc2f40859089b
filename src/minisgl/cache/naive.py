"""A prefix cache that caches nothing: every request computes its whole prompt."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from minisgl.cache.allocator import Int32
from minisgl.cache.prefix import Node


class NaiveCache:
    """The interface of PrefixCache over an empty tree."""

    num_pages = 0
    num_evictable = 0

    def __init__(self) -> None:
        self.root = Node.root()

    def match_pages(self, tokens: Int32) -> int:
        """None."""
        return 0

    def match(self, tokens: Int32) -> tuple[Node, Int32]:
        """The empty prefix."""
        return self.root, np.empty(0, np.int32)

    def lock(self, node: Node) -> None:
        """The empty prefix needs no protection."""

    def unlock(self, node: Node) -> None:
        """The empty prefix needs no protection."""

    def insert(self, node: Node, tokens: Int32, pages: Int32) -> tuple[Node, int]:
        """Take none of them: as if all were cached already, so that their owner frees them."""
        return node, len(pages)

    def evict(self, count: int) -> Int32:
        """Nothing to drop."""
        return np.empty(0, np.int32)

    def check(self, holders: Iterable[Node]) -> Int32:
        """No pages; raises RuntimeError when a holder has a node that is not the root."""
        if any(node is not self.root for node in holders):
            raise RuntimeError("a row holds a node, and nothing is cached")
        return np.empty(0, np.int32)
