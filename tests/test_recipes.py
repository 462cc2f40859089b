"""The recipes of CONTRIBUTING.md, carried out on a copy of the sources; core/test_policies.py has those of policies."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ("architecture", "operation", "attention backend", "logits processor")
CONFIG = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 1,
}  # fmt: skip

CHECK = """
import sys
import torch
from helpers.interpreter import quicken
from helpers.tiny_tokenizers import write_tokenizer
from pathlib import Path
import minisgl
from minisgl.config import ATTENTION_BACKENDS
from minisgl.core import logits, ops
from minisgl.core.types import SamplingParams
from minisgl.gpu.attention.select import BACKENDS
from minisgl.gpu.kernels import elementwise
from minisgl.llm import LLM
from minisgl.server.protocol import CompletionRequest

folder = Path(sys.argv[1])
assert Path(minisgl.__file__).is_relative_to(folder), minisgl.__file__
torch.set_num_threads(1)

# The architecture says what Llama says, with either backend.
def answers(architecture, **settings):
    model = folder / architecture
    params = [SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **extra) for extra in EXTRAS]
    with LLM(str(model), dummy_weight=True, device="cpu", num_pages=20, page_size=4, **settings) as llm:
        return [found.token_ids for found in llm.generate([[*range(5, 30)]] * 3 + [[7] * 9], params, progress=False)]

calls = []
clip = ops.PLAIN.clip
object.__setattr__(ops.PLAIN, "clip", lambda *arguments: calls.append(1) or clip(*arguments))
EXTRAS = [{}, {"logit_cap": 1.0}, {"logit_cap": 2.0, "presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
plain = answers("LlamaForCausalLM")
assert answers("YiForCausalLM", attn="naive", max_prefill_length=8) == plain
assert plain[0] == plain[1] != plain[2], "a cap alone keeps the order"
assert tuple(BACKENDS) == ATTENTION_BACKENDS

# The operation was called, and its kernel does what its twin does.
assert calls
quicken()
for shape in ((1, 3), (7, 600)):
    x = torch.linspace(-9, 9, shape[0] * shape[1]).view(shape)
    assert torch.equal(elementwise.clip(x.clone(), 4.0), ops.clip(x.clone(), 4.0))

# The processor, alone and as a parameter.
x = torch.tensor([[3.0, -50.0], [3.0, -50.0]])
capped = logits.cap(x.clone(), torch.tensor([[0.0], [2.0]]))
assert torch.equal(capped[0], x[0]) and capped[1].abs().max() <= 2.0
body = CompletionRequest(model="m", prompt="x", logit_cap=2.0)
assert body.sampling_params().validate().logit_cap == 2.0
print("done")
"""


def blocks(page: str, recipe: str) -> list[str]:
    section = re.findall(rf"\n## Add an? {recipe}\n(.*?)(?=\n## )", page, re.DOTALL)
    return re.findall(r"```diff\n(.*?)```", section[0], re.DOTALL)


def apply(block: str, sources: Path) -> None:
    """Change the files that a block names; the lines that it keeps or takes out must stand there once."""
    for part in block.split("--- ")[1:]:
        name, _, rest = part.partition("\n")
        path = sources / name
        text = path.read_text() if path.exists() else ""
        for hunk in re.split(r"^@@.*\n", rest, flags=re.MULTILINE)[1:]:
            lines = [line or " " for line in hunk.splitlines()]
            old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
            assert text.count(old) == 1 or not (text or old), f"{name}: {old}"
            text = text.replace(old, new) if text else new
        path.write_text(text)


def test_a_model_runs_with_all_recipes(tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    sources = tmp_path / "src" / "minisgl"
    shutil.copytree(ROOT / "src" / "minisgl", sources, ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in RECIPES:
        (block,) = blocks(page, recipe)
        apply(block, sources)
    for name in ("LlamaForCausalLM", "YiForCausalLM"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [name], **CONFIG}))
    paths = os.pathsep.join((str(tmp_path / "src"), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert found.stdout == "done\n", found.stderr


def test_every_recipe_is_carried_out() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    written = re.findall(r"\n## Add an? (.*)\n", page)
    assert set(written) == {*RECIPES, "scheduling policy", "eviction policy", "setting"}
