"""`python core_alone.py FOLDER TOKENS < prompts.json`: greedy answers by `minisgl.core` alone, as JSON.

Not a module of the helpers' package: it imports nothing of the tests. Every other part of the package, and every
package but those that core may import, cannot be imported.
"""

import json
import sys
from pathlib import Path

INNER = ("minisgl.core", "minisgl.config", "minisgl.errors")
OUTER = ("rich", "zmq", "tokenizers", "transformers", "gguf", "fastapi", "starlette", "uvicorn", "pydantic", "jinja2")


class Barrier:
    """A finder that refuses outer modules."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        is_outer = name.startswith("minisgl.") and not any(f"{name}.".startswith(f"{inner}.") for inner in INNER)
        if is_outer or name.partition(".")[0] in OUTER:
            raise ImportError(f"core imports {name}")


def main() -> None:
    sys.meta_path.insert(0, Barrier())
    import torch

    from minisgl.config import Config
    from minisgl.core.attention import Attention, TorchAttention
    from minisgl.core.decoder import Decoder, pack_weights
    from minisgl.core.engine import Engine
    from minisgl.core.executor import LocalExecutor
    from minisgl.core.kv_cache import allocate_kv
    from minisgl.core.model_config import read_spec
    from minisgl.core.model_runner import ModelRunner
    from minisgl.core.types import ModelInfo, Request, SamplingParams
    from minisgl.core.weights import load_weights

    folder, tokens, prompts = Path(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin)
    device, dtype, limit, rows, page_size = torch.device("cpu"), torch.float32, 128, 8, 16
    spec = read_spec(folder)
    weights = load_weights(folder, spec, dtype, device)
    pack_weights(weights)
    decoder = Decoder(spec, weights, Attention(TorchAttention(), TorchAttention()), limit)
    kv = allocate_kv(spec, 64, page_size, dtype, device)
    executor = LocalExecutor(ModelRunner(decoder, kv, rows, limit, device))
    model = ModelInfo(name="bundled", vocab_size=spec.vocab_size, max_seq_len=limit, eos_token_ids=())
    config = Config(page_size=page_size, max_running_requests=rows, max_prefill_length=64)
    engine = Engine(executor, model, config)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    answers: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add(Request.make(id=str(index), prompt=prompt, params=params))
    while engine.has_work:
        for event in engine.step():
            answers[int(event.id)] += event.tokens
    engine.close()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
