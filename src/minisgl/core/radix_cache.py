"""The prefix cache: a tree over token ids, in whole pages (RadixAttention: Zheng et al., "SGLang", 2024)."""

import heapq
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from minisgl.core.plan import EMPTY, Int32


class Node:
    """A run of whole pages. The path from the root spells the prefix whose KV the pages hold."""

    __slots__ = ("children", "end", "last_used", "locks", "pages", "parent", "queued", "tokens", "used_at", "uses")

    def __init__(self, tokens: Int32, pages: Int32, parent: "Node | None") -> None:
        self.tokens = tokens  # (len(pages) * page_size,)
        self.pages = pages
        self.parent = parent
        self.end: int = len(pages) + (0 if parent is None else parent.end)  # pages of the prefix; -1: evicted
        self.children: dict[bytes, Node] = {}
        self.locks = 0  # rows that end here, and children with locks; so a node without locks has none below it
        self.uses = 0  # requests that were admitted with it or made it
        self.last_used, self.used_at = 0, 0.0  # the last of them: its number in the tree, and the time, in s
        self.queued = False  # the eviction queue has an entry for this node

    @property
    def evictable(self) -> bool:
        """Whether eviction may take pages from this node's end: an unlocked leaf, and not the root."""
        return not self.locks and not self.children and self.parent is not None

    def path(self) -> "list[Node]":
        """This node and those above it, without the root."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes


class EvictionPolicy:
    """Which unlocked leaf loses its last pages first: the one with the lowest key. LRU, and the base of every other.

    A use is a request that is admitted, never a lock or an attempt. Between two uses of a node its key must not fall;
    one that grows by itself is looked at again when its turn comes.
    """

    def key(self, node: Node) -> float:
        return node.last_used


class SegmentedLRU(EvictionPolicy):
    """LRU in which what was used again counts as used `protect` seconds later, so prompts that come once go first."""

    def __init__(self, protect: float = 60.0) -> None:
        self.protect = protect

    def key(self, node: Node) -> float:
        return node.used_at + (self.protect if node.uses > 1 else 0.0)


# The values of `--eviction`.
EVICTIONS: Mapping[str, Callable[..., EvictionPolicy]] = MappingProxyType({"lru": EvictionPolicy, "slru": SegmentedLRU})


class CacheListener(Protocol):
    """Hears which pages the tree takes and drops, in that order."""

    def stored(self, parent: int | None, tokens: Int32, pages: Int32) -> None:
        """`pages` hold the KV of `tokens` behind the page `parent`, None at the beginning."""

    def removed(self, pages: Int32) -> None: ...

    def cleared(self) -> None:
        """A flush has left no page."""


class RadixCache:
    """Pages by the tokens whose KV they hold. Token arrays are int32 and contiguous; only whole pages are cached.

    What `match` and `insert` return stays valid while it is locked; a node keeps its end whatever happens around it.
    Siblings differ in their first page, whose bytes are their key in `children`. Only leaves are evicted, from their
    ends, so what remains is always reachable. The eviction queue is a heap with at most one entry a node, made when
    the node becomes an unlocked leaf. An entry may be out of date: its key can only be too small, so it is checked, and
    put back or dropped, when it comes up.
    """

    def __init__(self, page_size: int, eviction: EvictionPolicy | None = None) -> None:
        self.page_size = page_size
        self.eviction = eviction or EvictionPolicy()
        self.listener: CacheListener | None = None
        self.root = Node(EMPTY, EMPTY, None)
        self.num_pages = 0
        self.num_evictable = 0  # pages that no lock protects
        self._queue: list[tuple[float, int, Node]] = []  # (key, a number that breaks ties, node)
        self._entries = 0
        self._uses = 0

    def match(self, tokens: Int32, earlier: Node | None = None) -> Node:
        """The node that ends the longest cached prefix of `tokens`, split off if need be.

        The search goes on from an `earlier` match of these tokens or their beginning, as far as that is still cached.
        """
        node = self.root if earlier is None or earlier.end < 0 else earlier
        rest = tokens[node.end * self.page_size :]
        return self._descend(node, rest) if self._page(rest) in node.children else node

    def use(self, node: Node, now: float, again: bool = False) -> None:
        """A request was admitted on the prefix that ends with `node`, `again` after it was retracted."""
        self._uses += 1
        for used in node.path():
            used.last_used, used.used_at = self._uses, now
            used.uses += not again

    def lock(self, node: Node) -> None:
        """Protect the prefix that ends with `node` from eviction, once more."""
        while node.parent is not None:
            node.locks += 1
            if node.locks > 1:  # it has its parent locked already
                return
            self.num_evictable -= len(node.pages)
            node = node.parent

    def unlock(self, node: Node) -> None:
        while node.parent is not None:
            assert node.locks > 0, "unlocked more often than locked"
            node.locks -= 1
            if node.locks:
                return
            self.num_evictable += len(node.pages)
            self._enqueue(node)
            node = node.parent

    def insert(self, node: Node, tokens: Int32, pages: Int32, now: float = 0.0) -> Node:
        """Take `pages`, holding the KV of `tokens` behind `node`, their match; return the node that ends with them."""
        leaf = Node(tokens.copy(), pages.copy(), node)
        self._uses += 1
        leaf.uses, leaf.last_used, leaf.used_at = 1, self._uses, now
        node.children[self._page(tokens)] = leaf
        self.num_pages += len(leaf.pages)
        self.num_evictable += len(leaf.pages)
        self._enqueue(leaf)
        if self.listener is not None:
            self.listener.stored(int(node.pages[-1]) if len(node.pages) else None, leaf.tokens, leaf.pages)
        return leaf

    def evict(self, count: int) -> Int32:
        """Drop up to `count` unlocked pages, from the ends of the leaves with the lowest keys; return their ids."""
        dropped: list[Int32] = [EMPTY]
        missing = min(count, self.num_evictable)
        put_back: set[Node] = set()
        while missing > 0:
            key, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.evictable and node not in put_back and self.eviction.key(node) > key:
                put_back.add(node)
                self._enqueue(node)
            elif node.evictable:
                dropped.append(self._trim(node, min(missing, len(node.pages))))
                missing -= len(dropped[-1])
        return np.concatenate(dropped)

    def _page(self, tokens: Int32) -> bytes:
        return tokens[: self.page_size].tobytes()

    def _descend(self, node: Node, tokens: Int32) -> Node:
        """The node that ends the longest cached part of `tokens` behind `node`, split off if need be."""
        data, page, at = tokens.tobytes(), self.page_size * tokens.itemsize, 0
        while (child := node.children.get(data[at : at + page])) is not None:
            run = child.tokens.tobytes()  # one comparison of bytes for each node
            if not data.startswith(run, at):
                rest = tokens[at // tokens.itemsize :][: len(child.tokens)]
                different = child.tokens[: len(rest)] != rest
                first = int(different.argmax())
                return self._split(child, (first if different[first] else len(rest)) // self.page_size)
            node, at = child, at + len(run)
        return node

    def _split(self, node: Node, count: int) -> Node:
        """The node that ends after `count` pages of `node`: itself, or a new one above it; `node` keeps its own end."""
        if count == len(node.pages):
            return node
        assert node.parent is not None, "the root has no pages to split"
        middle = count * self.page_size
        upper = Node(node.tokens[:middle].copy(), node.pages[:count].copy(), node.parent)
        upper.locks = int(node.locks > 0)
        upper.uses, upper.last_used, upper.used_at = node.uses, node.last_used, node.used_at
        node.parent.children[self._page(upper.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[middle:].copy(), node.pages[count:].copy(), upper
        upper.children[self._page(node.tokens)] = node
        return upper

    def _trim(self, leaf: Node, count: int) -> Int32:
        """Take the last `count` pages off an unlocked leaf that has left the queue; unlink it when none remain."""
        keep = len(leaf.pages) - count
        pages = leaf.pages[keep:]
        if self.listener is not None:
            self.listener.removed(pages)
        self.num_pages -= count
        self.num_evictable -= count
        if keep:
            leaf.pages, leaf.tokens = leaf.pages[:keep].copy(), leaf.tokens[: keep * self.page_size].copy()
            leaf.end -= count
            self._enqueue(leaf)
        else:
            assert leaf.parent is not None, "the root is no leaf"
            del leaf.parent.children[self._page(leaf.tokens)]
            leaf.end = -1
            self._enqueue(leaf.parent)
        return pages

    def _enqueue(self, node: Node) -> None:
        if node.evictable and not node.queued:
            node.queued = True
            self._entries += 1
            heapq.heappush(self._queue, (self.eviction.key(node), self._entries, node))
