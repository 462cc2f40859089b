"""What an engine is doing, for `/debug/engine` and `/debug/events`: no text and no token ids, bounded in size."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from minisgl.core.engine import Engine, Observer
from minisgl.core.radix_cache import Node
from minisgl.core.request_state import State
from minisgl.core.types import StepRecord

RECENT: Final = 64  # steps
REQUESTS: Final = 256  # running ones, and again as many waiting ones
NODES: Final = 1000  # of the radix tree
STATES: Final = {number: name.lower() for name, number in vars(State).items() if name.isupper()}
FLUSH_SECONDS = 0.05


class StepLog(Observer):
    """In the engine process: keeps the last steps and, while somebody watches, sends them on in batches."""

    def __init__(self, send: Callable[[bytes, int], None]) -> None:
        self.recent: deque[StepRecord] = deque(maxlen=RECENT)
        self.links: set[int] = set()  # that watch
        self._send = send
        self._batch: list[StepRecord] = []
        self._sent = 0.0

    def watch(self, link: int, on: bool) -> None:
        (self.links.add if on else self.links.discard)(link)

    def observe(self, record: StepRecord) -> None:
        self.recent.append(record)
        if self.links:
            self._batch.append(record)

    def flush(self, idle: bool) -> None:
        """Send what has gathered as server-sent events, at once when the engine has nothing to do."""
        if self._batch and (idle or time.monotonic() - self._sent >= FLUSH_SECONDS):
            events = b"".join(b"data: %b\n\n" % msgspec.json.encode(record) for record in self._batch)
            for link in self.links:
                self._send(events, link)
            self._batch, self._sent = [], time.monotonic()


def snapshot(engine: Engine, compiling: Iterable[str], recent: Iterable[StepRecord]) -> bytes:
    """The JSON object of `/debug/engine`. `compiling` are the requests whose grammars are not compiled yet."""
    table, cache, scheduler = engine.table, engine.cache, engine.scheduler
    running = [
        {
            "id": request.request.id, "state": STATES[table.state[slot]], "priority": request.request.priority,
            "prompt_tokens": request.prompt_len, "computed_tokens": int(table.num_computed_tokens[slot]),
            "tokens": int(table.num_tokens[slot]), "max_tokens": int(table.max_tokens[slot]),
            "cached_tokens": request.cached_tokens, "pages": int(cache.row_pages[slot]),
            "borrowed_pages": cache.num_borrowed(slot),
        }
        for slot, request in enumerate(table.requests)
        if request is not None
    ]  # fmt: skip
    waiting: list[dict[str, object]] = [
        {
            "id": request.request.id, "priority": request.request.priority, "prompt_tokens": request.prompt_len,
            "tokens": len(request.tokens), "retracted": request.admitted, "why": scheduler.why_waiting(request),
        }
        for request in itertools.islice(scheduler.waiting, REQUESTS)
    ]  # fmt: skip
    for name in itertools.islice(compiling, REQUESTS - len(waiting)):
        waiting.append({"id": name, "why": "its grammar is being compiled"})
    pages = {"total": cache.num_pages, "free": cache.num_free, "cached": cache.num_cached, "owned": cache.num_owned}
    counts = {"running": len(running), "waiting": len(scheduler.waiting)}
    shown = {"running": running[:REQUESTS], "waiting": waiting, "pages": pages, "tree": tree(cache.tree.root)}
    return msgspec.json.encode({"step": scheduler.step, "counts": counts, **shown, "recent": list(recent)})


def tree(root: Node) -> dict[str, Any]:
    """Nested runs of pages, widest levels first while there is room."""
    top: dict[str, Any] = {"children": []}
    queue, shown = deque((child, top) for child in root.children.values()), 0
    while queue and shown < NODES:
        node, above = queue.popleft()
        run = {"pages": len(node.pages), "locks": node.locks, "uses": node.uses, "children": []}
        above["children"].append(run)
        queue.extend((child, run) for child in node.children.values())
        shown += 1
    return {**top, "nodes": shown, "left_out": len(queue)}
