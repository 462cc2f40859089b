"""The free list of KV pages.

What the manager asks of a cache of prefixes, and the node of which such a cache is made.

A prefix cache that caches nothing: every request computes its whole prompt.

A prefix tree over token ids, in whole pages (RadixAttention: Zheng et al., "SGLang", 2024).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

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


class RadixCache:
    """Implements PrefixCache. Siblings differ in their first page, whose bytes are their key in `children`.

    Only leaves are evicted, from their ends, so what remains is always reachable. The eviction queue is a heap with
    at most one entry a node, made when the node becomes an unlocked leaf. An entry may be out of date: its time can
    only be too early, so it is checked, and put back or dropped, when it comes up.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node.root()
        self.num_pages = 0
        self.num_evictable = 0
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
        path[-1] = self._upper(path[-1], used)
        return path[-1], np.concatenate([node.pages for node in path])

    def lock(self, node: Node) -> None:
        """Protect `node` and all above it from eviction, once more."""
        for held in self._upwards(node):
            if held.locks == 0:
                self.num_evictable -= len(held.pages)
            held.locks += 1

    def unlock(self, node: Node) -> None:
        """Take back one `lock` of `node`."""
        for held in self._upwards(node):
            assert held.locks > 0, "unlocked more often than locked"
            held.locks -= 1
            if held.locks == 0:
                self.num_evictable += len(held.pages)
                self._enqueue(held)

    def insert(self, node: Node, tokens: Int32, pages: Int32) -> tuple[Node, int]:
        """Offer pages behind the prefix that ends with `node`; see PrefixCache.insert."""
        path, used = self._walk(node, tokens)
        self._uses += 1
        for passed in path:
            passed.last_used = self._uses
        known = sum(len(passed.pages) for passed in path[:-1]) + used
        if known == len(pages):
            return node, known
        parent = self._upper(path[-1], used) if path else node
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
            elif node.loose:
                pages = self._cut(node, min(missing, len(node.pages)))
                missing -= len(pages)
                dropped.append(pages)
        return np.concatenate(dropped)

    def check(self, holders: Iterable[Node]) -> Int32:
        """Every page in the tree. Raises RuntimeError unless locks are those of `holders` and the counts are right."""
        locks = Counter(id(held) for node in holders for held in self._path_to(node))
        nodes = list(self._below(self.root))
        if locks != Counter({id(node): node.locks for node in nodes if node.locks}):
            raise RuntimeError("the locks in the tree are not those that rows hold")
        for node in nodes:
            if node.parent is None or node.parent.children.get(self._key(node.tokens)) is not node:
                raise RuntimeError("a node is not its parent's child")
            if len(node.pages) == 0 or len(node.tokens) != len(node.pages) * self.page_size:
                raise RuntimeError(f"a node has {len(node.tokens)} tokens in {len(node.pages)} pages")
            if node.loose and not node.queued:
                raise RuntimeError("an unlocked leaf is not queued for eviction")
        counts = sum(len(node.pages) for node in nodes), sum(len(node.pages) for node in nodes if node.locks == 0)
        if counts != (self.num_pages, self.num_evictable):
            raise RuntimeError(
                f"{counts} pages in the tree and evictable, counted {self.num_pages, self.num_evictable}"
            )
        return np.concatenate([self.root.pages, *(node.pages for node in nodes)])

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

    def _upper(self, node: Node, count: int) -> Node:
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

    def _cut(self, leaf: Node, count: int) -> Int32:
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
        """Queue an unlocked leaf that is not queued yet; leave any other node alone."""
        if node.loose and not node.queued:
            node.queued = True
            self._entries += 1
            heapq.heappush(self._queue, (node.last_used, self._entries, node))

    def _upwards(self, node: Node) -> Iterator[Node]:
        """The path from `node` to below the root, marking each as used now."""
        self._uses += 1
        for passed in self._path_to(node):
            passed.last_used = self._uses
            yield passed

    def _path_to(self, node: Node) -> Iterator[Node]:
        while node.parent is not None:
            yield node
            node = node.parent

    def _below(self, node: Node) -> Iterator[Node]:
        waiting = [*node.children.values()]
        while waiting:
            waiting += (found := waiting.pop()).children.values()
            yield found
