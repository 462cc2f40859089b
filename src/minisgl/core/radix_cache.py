"""The prefix cache: a tree over token ids, in whole pages (RadixAttention: Zheng et al., "SGLang", 2024)."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

from minisgl.core.plan import Int32


class Node:
    """A run of whole pages. The path from the root spells the prefix whose KV the pages hold.

    `tokens` is (len(pages) * page_size,). `locks` counts the rows that hold this node or one below it, so a node
    without locks has none below it. `last_used` counts uses of the tree, it is not a time. `queued` says that the
    eviction queue has an entry for this node.
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
    def evictable(self) -> bool:
        """Whether eviction may take pages from this node's end: an unlocked leaf, and not the root."""
        return not self.locks and not self.children and self.parent is not None

    def path(self) -> list[Node]:
        """This node and those above it, without the root."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes


class RadixCache:
    """Pages by the tokens whose KV they hold. Token arrays are int32 and contiguous; only whole pages are cached.

    What `match` and `insert` return stays valid while it is locked; a node keeps its end whatever happens around it.
    Siblings differ in their first page, whose bytes are their key in `children`. Only leaves are evicted, from their
    ends, so what remains is always reachable. The eviction queue is a heap with at most one entry a node, made when
    the node becomes an unlocked leaf. An entry may be out of date: its `last_used` can only be too small, so it is
    checked, and put back or dropped, when it comes up.

    Without `shared` it never matches and takes no pages: every request computes its whole prompt.
    """

    def __init__(self, page_size: int, shared: bool = True) -> None:
        self.page_size = page_size
        self.shared = shared
        self.root = Node(np.empty(0, np.int32), np.empty(0, np.int32), None)
        self.num_pages = 0
        self.num_evictable = 0  # pages that no lock protects
        self._queue: list[tuple[int, int, Node]] = []  # (last_used, a number that breaks ties, node)
        self._entries = 0
        self._uses = 0

    def match_pages(self, tokens: Int32) -> int:
        """Pages of the longest cached prefix of `tokens`. Changes nothing."""
        path, used = self._walk(self.root, tokens)
        return sum(len(node.pages) for node in path[:-1]) + used

    def match(self, tokens: Int32) -> tuple[Node, Int32]:
        """The node that ends the longest cached prefix of `tokens`, split off if need be, and the prefix's pages."""
        path, used = self._walk(self.root, tokens)
        if not path:
            return self.root, np.empty(0, np.int32)
        path[-1] = self._split(path[-1], used)
        return path[-1], np.concatenate([node.pages for node in path])

    def lock(self, node: Node) -> None:
        """Protect the prefix that ends with `node` from eviction, once more; a use of it."""
        self._uses += 1
        for held in node.path():
            held.last_used = self._uses
            if held.locks == 0:
                self.num_evictable -= len(held.pages)
            held.locks += 1

    def unlock(self, node: Node) -> None:
        """Take back one `lock`; a use of the prefix, too."""
        self._uses += 1
        for held in node.path():
            assert held.locks > 0, "unlocked more often than locked"
            held.last_used = self._uses
            held.locks -= 1
            if held.locks == 0:
                self.num_evictable += len(held.pages)
                self._enqueue(held)

    def insert(self, node: Node, tokens: Int32, pages: Int32) -> tuple[Node, int]:
        """Offer `pages`, holding the KV of `tokens` behind the prefix that ends with `node`.

        Returns (end, known): pages before `known` are the caller's to keep or free, the cache now owns `pages[known:]`.
        `end` is the node that ends with the last of these, or `node` when there are none.
        """
        if not self.shared:
            return node, len(pages)
        path, used = self._walk(node, tokens)
        self._uses += 1
        for passed in path:
            passed.last_used = self._uses
        known = sum(len(passed.pages) for passed in path[:-1]) + used
        if known == len(pages):
            return node, known
        parent = self._split(path[-1], used) if path else node
        leaf = Node(tokens[known * self.page_size :].copy(), pages[known:].copy(), parent)
        leaf.last_used = self._uses
        parent.children[self._key(leaf.tokens)] = leaf
        self.num_pages += len(leaf.pages)
        self.num_evictable += len(leaf.pages)
        self._enqueue(leaf)
        return leaf, known

    def evict(self, count: int) -> Int32:
        """Drop up to `count` unlocked pages, from the ends of the least recently used leaves; return their ids."""
        dropped: list[Int32] = [np.empty(0, np.int32)]
        missing = min(count, self.num_evictable)
        while missing > 0:
            last_used, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.last_used != last_used:
                self._enqueue(node)
            elif node.evictable:
                dropped.append(self._trim(node, min(missing, len(node.pages))))
                missing -= len(dropped[-1])
        return np.concatenate(dropped)

    def evictable_after(self, unlocked: Sequence[Node], kept: Node) -> list[int]:
        """What `num_evictable` would be while `kept` is locked, before and after each of these is unlocked."""
        kept_path = set(kept.path())
        count = self.num_evictable - sum(len(node.pages) for node in kept_path if node.locks == 0)
        counts, taken_back = [count], Counter[Node]()
        for node in unlocked:
            for held in node.path():
                taken_back[held] += 1
                if taken_back[held] == held.locks and held not in kept_path:
                    count += len(held.pages)
            counts.append(count)
        return counts

    def _key(self, tokens: Int32) -> bytes:
        return tokens[: self.page_size].tobytes()

    def _walk(self, node: Node, tokens: Int32) -> tuple[list[Node], int]:
        """Nodes below `node` through which `tokens` runs, and how many pages of the last one."""
        path: list[Node] = []
        used, at = 0, 0
        data, page = tokens.tobytes(), self.page_size * tokens.itemsize  # one comparison of bytes for each node
        while (child := node.children.get(data[at : at + page])) is not None:
            path.append(child)
            run = child.tokens.tobytes()
            if not data.startswith(run, at):
                rest = tokens[at // tokens.itemsize :][: len(child.tokens)]
                different = child.tokens[: len(rest)] != rest
                first = int(different.argmax())
                used = (first if different[first] else len(rest)) // self.page_size
                break
            node, at, used = child, at + len(run), len(child.pages)
        return path, used

    def _split(self, node: Node, count: int) -> Node:
        """The node that ends after `count` pages of `node`: itself, or a new one above it; `node` keeps its own end."""
        if count == len(node.pages):
            return node
        assert node.parent is not None, "the root has no pages to split"
        middle = count * self.page_size
        upper = Node(node.tokens[:middle].copy(), node.pages[:count].copy(), node.parent)
        upper.locks, upper.last_used = node.locks, node.last_used
        node.parent.children[self._key(upper.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[middle:].copy(), node.pages[count:].copy(), upper
        upper.children[self._key(node.tokens)] = node
        return upper

    def _trim(self, leaf: Node, count: int) -> Int32:
        """Take the last `count` pages off an unlocked leaf that has left the queue; unlink it when none remain."""
        keep = len(leaf.pages) - count
        pages = leaf.pages[keep:]
        self.num_pages -= count
        self.num_evictable -= count
        if keep:
            leaf.pages, leaf.tokens = leaf.pages[:keep].copy(), leaf.tokens[: keep * self.page_size].copy()
            self._enqueue(leaf)
        else:
            assert leaf.parent is not None, "the root is no leaf"
            del leaf.parent.children[self._key(leaf.tokens)]
            self._enqueue(leaf.parent)
        return pages

    def _enqueue(self, node: Node) -> None:
        if node.evictable and not node.queued:
            node.queued = True
            self._entries += 1
            heapq.heappush(self._queue, (node.last_used, self._entries, node))
