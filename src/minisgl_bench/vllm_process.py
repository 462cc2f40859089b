"""vLLM's process: an order as JSON on stdin, the figures as the last line of stdout."""

import importlib
import json
import sys
import time
from typing import Any, Final

from minisgl_bench.workload import random_tokens

WARM_TOKENS: Final = 16


def main() -> None:
    order: dict[str, Any] = json.load(sys.stdin)
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(seed=order["seed"], **order["settings"])
    prompts: list[list[int]] = order["prompts"]
    others = random_tokens([len(prompt) for prompt in prompts], max(map(max, prompts)) + 1, -1)

    def generate(tokens: list[list[int]], lengths: list[int]) -> int:
        same = {"temperature": order["temperature"], "ignore_eos": True, "detokenize": False}
        params = [vllm.SamplingParams(max_tokens=length, **same) for length in lengths]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in tokens], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    generate(others, [min(length, WARM_TOKENS) for length in order["max_tokens"]])
    started = time.perf_counter()
    generated = generate(prompts, order["max_tokens"])
    seconds = time.perf_counter() - started
    print(json.dumps({"version": vllm.__version__, "output_tokens": generated, "seconds": seconds}))


if __name__ == "__main__":
    main()
