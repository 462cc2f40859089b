"""What an engine is doing, for `/debug/engine` and `/debug/events`: no text and no token ids, bounded in size."""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from minisgl.core.engine import Engine, Observer
from minisgl.core.radix_cache import Node
from minisgl.core.request_state import State
from minisgl.core.types import StepRecord

KEPT: Final = 512  # steps, for viewers that ask 20 times a second
RECENT: Final = 64  # of them that a snapshot has
REQUESTS: Final = 256  # running ones, and again as many waiting ones
NODES: Final = 1000  # of the radix tree
STATES: Final = {number: name.lower() for name, number in vars(State).items() if name.isupper()}


class StepLog(Observer):
    def __init__(self) -> None:
        self.records: deque[StepRecord] = deque(maxlen=KEPT)

    def observe(self, record: StepRecord) -> None:
        self.records.append(record)

    def after(self, step: int) -> tuple[int, bytes]:
        """The number of the last step, and those after `step`, if they are kept, as server-sent events."""
        records = [record for record in self.records if record.step > step]
        events = b"".join(b"data: %b\n\n" % msgspec.json.encode(record) for record in records)
        return records[-1].step if records else step, events


def snapshot(engine: Engine, compiling: Iterable[str], steps: Sequence[StepRecord]) -> bytes:
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
    return msgspec.json.encode({"step": scheduler.step, "counts": counts, **shown, "recent": steps[-RECENT:]})


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
