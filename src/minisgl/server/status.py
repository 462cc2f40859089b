"""A line every few seconds while there is work: what runs, what waits, how full the cache is, tokens a second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from minisgl.core.types import EngineStats
from minisgl.errors import EngineDeadError
from minisgl.server.exposition import share
from minisgl.server.service import EngineService

STATUS_SECONDS = 5.0

logger = logging.getLogger("minisgl.status")


async def report_status(
    service: EngineService, every: float = STATUS_SECONDS, live: Callable[[], int] | None = None
) -> None:
    """Log such lines until cancelled; nothing while nothing happens. Ends when the engine is gone.

    `live` counts requests that have not ended, where the service does not.
    """
    before, since = service.stats, time.monotonic()
    while service.dead is None:
        await asyncio.sleep(every)
        try:
            stats = await service.ping(every)
        except EngineDeadError as error:
            count = service.num_live if live is None else live()
            if service.dead is None and count:
                logger.warning("%s; %d requests wait", error.message, count)
            continue
        now = time.monotonic()
        if stats.steps != before.steps or stats.waiting:
            logger.info("%s", describe(before, stats, now - since))
        before, since = stats, now


def describe(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """The line for what happened between two counts."""
    prompt = now.prompt_tokens - before.prompt_tokens
    cached = now.cached_prompt_tokens - before.cached_prompt_tokens
    used = share(now.pages_total - now.pages_free - now.pages_cached, now.pages_total)
    return (
        f"running {now.running}, waiting {now.waiting}, KV owned {used:.0%}, cached "
        f"{share(now.pages_cached, now.pages_total):.0%}, prompt {prompt / seconds:.1f} tok/s, "
        f"generated {(now.generated_tokens - before.generated_tokens) / seconds:.1f} tok/s, "
        f"prefix hits {share(cached, prompt):.0%}, retracted {now.retracted - before.retracted}"
    )
