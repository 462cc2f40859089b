"""How long one user alone waits: from the start to the first token, and from one token to the next."""

from __future__ import annotations

import itertools
import random
import time
from statistics import median
from typing import Final

from minisgl.bench.report import process_seconds
from minisgl.bench.workload import HIGHEST_TOKEN
from minisgl.core.types import SamplingParams
from minisgl.llm import LLM

CONTEXT: Final = 1024
TOKENS: Final = 64


def start_to_first_token(llm: LLM) -> float:
    """Seconds from the start of this process to the first token of its first, short request."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for _ in llm.stream(random_prompt(llm, min(8, llm.model.max_seq_len - 1)), params):
        pass
    return process_seconds()


def decode_step_alone(llm: LLM) -> float:
    """Median seconds of a decode step at batch 1, with CONTEXT tokens in the cache, or as many as the model holds."""
    tokens = min(TOKENS, llm.model.max_seq_len // 2)
    prompt = random_prompt(llm, max(1, min(CONTEXT, llm.model.max_seq_len - tokens) - tokens // 2))
    times: list[float] = []
    for delta in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)):
        times += [time.perf_counter()] * len(delta.token_ids)
    return median(later - earlier for earlier, later in itertools.pairwise(times))


def random_prompt(llm: LLM, length: int) -> list[int]:
    """Tokens of no workload."""
    draw = random.Random(-1)
    return [draw.randint(0, min(HIGHEST_TOKEN, llm.model.vocab_size - 1)) for _ in range(length)]
