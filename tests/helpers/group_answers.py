"""`python -m helpers.group_answers JSON`: one engine in a process of its own, what it says as one line of JSON.

JSON: {"settings": fields of Config, "prompts": [[id, ...]], "params": [fields of SamplingParams]}. The line:
{"tokens": [[id, ...]], "logprobs": [[x, ...]], "prompt_logprobs": [[x, ...]], "tops": [[x, ...]], "notes": [...]},
log-probabilities of the tokens, and the highest at each place of the prompt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from minisgl import LLM, SamplingParams
from minisgl.core.types import TokenLogprobs


def ask(settings: dict[str, Any], prompts: list[list[int]], params: list[dict[str, Any]]) -> dict[str, Any]:
    """What an engine with these settings says, from another process; raises with its errors when it fails."""
    question = json.dumps({"settings": settings, "prompts": prompts, "params": params})
    command = [sys.executable, "-m", "helpers.group_answers", question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def main() -> None:
    """Answer the question on the command line."""
    question = json.loads(sys.argv[1])
    with LLM(progress=False, **question["settings"]) as llm:
        params = [SamplingParams(**fields) for fields in question["params"]]
        found = llm.generate(question["prompts"], params, progress=False)
        scores = [[score.logprob for score in completion.logprobs or ()] for completion in found]
        prompts: list[list[TokenLogprobs | None]] = [list(completion.prompt_logprobs or ()) for completion in found]
        answer = {
            "tokens": [completion.token_ids for completion in found],
            "logprobs": scores,
            "prompt_logprobs": [[score.logprob for score in prompt if score is not None] for prompt in prompts],
            "tops": [[max(s.top_logprobs, default=s.logprob) for s in prompt if s is not None] for prompt in prompts],
            "notes": list(llm.notes),
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
