"""`minisgl bench fidelity`: log-probabilities under quantisation against those of the same model without it."""

import argparse
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from minisgl.config import Config
from minisgl.core.types import SamplingParams, TokenLogprobs
from minisgl.errors import ConfigError
from minisgl.llm import LLM, Completion
from minisgl_bench.report import Report, engine_path, table
from minisgl_bench.workload import random_tokens

PROMPT_LEN: Final = 64  # of random prompts, for random weights and models without a tokenizer
QUESTIONS: Final = (
    "What is the capital of France?", "Name three colours.", "Write a haiku about the sea.", "What is 17 + 25?",
    "Explain gravity to a child.", "Who wrote Hamlet?", "List the planets in order.", "Translate 'good day' to French.",
    "What does a compiler do?", "Give me a recipe for pancakes.",
)  # fmt: skip
BEGINNINGS: Final = (
    "Once upon a time", "The year 1999 had", "def area(radius):\n    ", "In the beginning", "Dear Sir or Madam,\n",
    "The three laws of motion are", "Invoice #20431: 12 x $1,234.50 =", "She opened the door and", "import numpy as",
    "Water boils at",
)  # fmt: skip


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    plain = config.replace(quantization=None, kv_cache_dtype="auto")
    if plain == config:
        raise ConfigError("bench fidelity: give --quantization or --kv-cache-dtype, whose effect is to be measured")
    report = Report("fidelity", arguments, engine_path(config, options.json, "fidelity"))
    with LLM(config=plain) as llm:
        prompts = fidelity_prompts(llm, options.output_len)
        answers = greedy(llm, prompts, options.output_len)
        texts = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
        exact = scores(llm, texts)
    with LLM(config=config) as llm:
        report.figures["config"] = list(llm.notes)
        prefill = differences(exact, scores(llm, texts))
        decode = decode_differences(answers, greedy(llm, prompts, options.output_len))
        title = f"{llm.model.name}: log-probabilities of given tokens, against the model without quantisation"
    report.figures |= {"prefill": prefill, "decode": decode}
    rows = [(name, *(f"{value:,.4g}" for value in report.figures[name].values())) for name in ("prefill", "decode")]
    report.print(table(title, ("computed in", "tokens", "mean", "p99", "maximum", "same first"), rows))
    report.finish()
    return 0


def fidelity_prompts(llm: LLM, output_len: int) -> list[list[int]]:
    if llm.tokenizer is not None and not llm.config.dummy_weight:
        return [llm.tokenizer.encode(text) for text in (*QUESTIONS, *BEGINNINGS)]
    length = min(PROMPT_LEN, llm.model.max_seq_len - output_len - 1)
    return random_tokens([max(1, length)] * (len(QUESTIONS) + len(BEGINNINGS)), llm.model.vocab_size, 0)


def greedy(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    return llm.generate(prompts, params, progress=False)


def scores(llm: LLM, texts: Sequence[Sequence[int]]) -> list[TokenLogprobs]:
    """What each token of the texts, but the first of each, is scored at in prefill."""
    completions = llm.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=1), progress=False)
    return [token for each in completions for token in each.prompt_logprobs or () if token is not None]


def decode_differences(exact: Sequence[Completion], others: Sequence[Completion]) -> dict[str, Any]:
    """Of answers as long as they are the same, and the token after that."""
    ours: list[TokenLogprobs] = []
    theirs: list[TokenLogprobs] = []
    for a, b in zip(exact, others, strict=True):
        same = int(np.cumprod(np.equal(a.token_ids, b.token_ids)).sum())
        ours += (a.logprobs or [])[: same + 1]
        theirs += (b.logprobs or [])[: same + 1]
    return differences(ours, theirs)


def differences(exact: Sequence[TokenLogprobs], others: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Absolute differences in nats, and the share of positions at which the same token is the most probable."""
    apart = np.abs([a.logprob - b.logprob for a, b in zip(exact, others, strict=True)])
    same = np.mean([a.top_ids == b.top_ids for a, b in zip(exact, others, strict=True)])
    return {
        "tokens": len(apart), "mean": float(apart.mean()), "p99": float(np.percentile(apart, 99)),
        "maximum": float(apart.max()), "same_first": float(same),
    }  # fmt: skip
