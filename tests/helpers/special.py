"""Requests that ask for more than sampling, and their answers computed the slow way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helpers.constraints import Cycle, cycle
from helpers.driver import CPU, Driver
from helpers.models import EOS
from helpers.retract import events_of
from helpers.sampling_rows import sampling_rows
from minisgl.core.engine import Engine
from minisgl.core.model_config import ModelSpec
from minisgl.core.sampler import sample
from minisgl.core.types import Request, SamplingParams, TokenEvent, TokenLogprobs
from minisgl.core.weights import Weights


@dataclass
class Answer:
    """What a request gets: tokens, their scores, and those of the prompt."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        assert event.error is None
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs


def answers_of(engine: Engine, requests: Sequence[Request], retractions: int = 0, every: int = 4) -> dict[str, Answer]:
    """All added at once; every so many steps one is retracted, up to `retractions` times."""
    answers = {request.id: Answer() for request in requests}
    for event in events_of(engine, requests, retractions, every):
        assert not (event.prompt_logprobs and answers[event.id].tokens)
        answers[event.id].take(event)
    assert engine.cache.num_owned == 0
    return answers


@dataclass
class SlowAnswer:
    """The tokens by a direct computation, and every token's log-probability (V,) at each position from 1 on."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[NDArray[np.float32]]

    def check(self, answer: Answer, params: SamplingParams, tolerance: float = 1e-4) -> None:
        """Assert that an answer is this one and has the scores that were asked for."""
        assert answer.tokens == self.tokens
        at = len(self.prompt) - 1
        check_scores(answer.logprobs, self.tokens, self.logprobs[at:], params.logprobs, tolerance)
        first, scores = answer.prompt_logprobs[:1], answer.prompt_logprobs[1:]
        assert first == ([] if params.prompt_logprobs is None else [None])
        check_scores(scores, self.prompt[1:], self.logprobs[:at], params.prompt_logprobs, tolerance)


def check_scores(
    scores: Sequence[TokenLogprobs | None], tokens: list[int], right: list[NDArray[np.float32]], top: int | None,
    tolerance: float,
) -> None:  # fmt: skip
    """Assert that these are the scores of tokens by each position's log-probabilities (V,); `top` None: no scores."""
    assert len(scores) == (0 if top is None else len(tokens))
    for score, token, logprobs in zip(scores, tokens, right, strict=False):
        assert score is not None
        assert math.isclose(score.logprob, logprobs[token], abs_tol=tolerance)
        assert len(set(score.top_ids)) == len(score.top_ids) == len(score.top_logprobs) == top
        assert np.allclose(score.top_logprobs, np.sort(logprobs)[::-1][:top], atol=tolerance)
        assert np.allclose(score.top_logprobs, logprobs[list(score.top_ids)], atol=tolerance)


def change(logits: NDArray[np.float32], params: SamplingParams, prompt: list[int], answer: list[int]) -> None:
    """The penalties and biases of SamplingParams, one token at a time, in place."""
    one = np.float32
    factor = one(params.repetition_penalty)
    for token in set(prompt) | set(answer):
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(answer):
        logits[token] -= one(params.frequency_penalty) * answer.count(token)
        logits[token] -= one(params.presence_penalty)
    for token, bias in params.logit_bias.items():
        logits[token] += one(bias)


def slow_answer(
    spec: ModelSpec, weights: Weights, request: Request, limit: int, device: torch.device = CPU
) -> SlowAnswer:
    """One token after the other, its logits changed by loops; nothing of the engine but the model and the sampler."""
    params, prompt = request.params, list(request.prompt)
    stops = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    constraint = None if params.grammar is None else Cycle(params.grammar, spec.vocab_size, EOS)
    rows = sampling_rows(
        1, temperature=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=max(params.top_k, 0),
        seed=params.seed or 0, min_len=len(prompt) + params.min_tokens, stop_ids=[stops],
    )  # fmt: skip
    driver = Driver(spec, weights, rows=1, page_size=16, num_pages=-(-limit // 16), max_seq_len=limit, device=device)
    answer: list[int] = []
    logprobs: list[NDArray[np.float32]] = []
    while True:
        driver.step(chunks={0: answer[-1:] or prompt})
        own = driver.logits.float().cpu()
        logprobs += list(own.log_softmax(dim=-1).numpy())
        logits = own[-1].numpy().copy()
        change(logits, params, prompt, answer)
        if constraint is not None:
            allowed = constraint.allowed()
            if not allowed:
                return SlowAnswer(prompt, answer, logprobs)
            logits[np.setdiff1d(np.arange(spec.vocab_size), allowed)] = -np.inf
        if params.allowed_token_ids is not None:
            logits[[token for token in range(spec.vocab_size) if token not in params.allowed_token_ids]] = -np.inf
        for *before, last in params.bad_word_ids:
            if last < len(logits) and answer[len(answer) - len(before) :] == before:
                logits[last] = -np.inf
        if np.isneginf(logits).all():
            return SlowAnswer(prompt, answer, logprobs)
        position = torch.tensor([len(prompt) + len(answer)], dtype=torch.int32)
        token = int(sample(torch.from_numpy(logits)[None], rows, position)[0])
        answer.append(token)
        if constraint is not None:
            constraint.said += 1
        stopped = token in stops and len(answer) > params.min_tokens
        if stopped or len(answer) == params.max_tokens or len(prompt) + len(answer) == limit:
            return SlowAnswer(prompt, answer, logprobs)


def special_requests(vocab_size: int, count: int = 24) -> list[Request]:
    """All kinds of special rows, alone and together, greedy and seeded, between ordinary ones; half share a prefix.

    Request i is of kind i % 11.
    """
    rng = np.random.default_rng(2)
    shared = rng.integers(0, vocab_size, 40).tolist()
    some = {int(token): float(bias) for token, bias in zip(rng.permutation(vocab_size)[:9], range(-4, 5), strict=True)}
    few = dict.fromkeys([*shared[:8], *range(20, 28)], 4.0)  # so that answers repeat themselves, and prompts
    kinds: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 1.5, "logit_bias": few},
        {"frequency_penalty": 0.7, "logit_bias": few, "logprobs": 0},
        {"repetition_penalty": 1.7, "logit_bias": few, "min_tokens": 4},
        {"logit_bias": some, "prompt_logprobs": 3},
        {"logprobs": 5},
        {"prompt_logprobs": 0, "logprobs": 20, "min_tokens": 5},
        {"grammar": cycle(6, 5)},
        {"presence_penalty": -1.0, "frequency_penalty": -0.5, "repetition_penalty": 0.6, "logit_bias": {3: 2.0},
         "logprobs": 2, "grammar": cycle(40, 30)},
        {},
        {"grammar": cycle(2, 4), "ignore_eos": True, "logprobs": 1},
    ]  # fmt: skip
    made = []
    for i in range(count):
        own = rng.integers(0, vocab_size, rng.integers(1, 30)).tolist()
        params = {"ignore_eos": i % 4 != 0, **kinds[i % len(kinds)]}
        params |= {"temperature": 0.8 * (i % 2), "top_k": (0, 0, 20)[i % 3], "top_p": (1.0, 0.9, 1.0)[i % 3]}
        sampling = SamplingParams(seed=i, max_tokens=8 + i % 7, **params)
        made.append(Request.make(id=str(i), prompt=(shared if i % 4 < 2 else []) + own, params=sampling))
    return made
