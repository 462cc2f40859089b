import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.bundled import bundled_prompts
from minisgl.build import read_eos_token_ids
from minisgl.core.model_config import read_spec
from minisgl.formats.gguf import GgufFile
from minisgl.formats.hub import bundled_model, locate_model

DOCUMENTS = (
    "The year 1999 had 365 days; 2000 had 366.",
    "def area(r):\n    if r < 0:\n        raise ValueError(r)\n    return 3.14159 * r ** 2\n",
    "Invoice #20431: 12 x $1,234.50 = $14,814.00 (VAT 19%).\n\n\tDue: 2024-07-01",
    "It's what they'd said -- \"we'll see\"...   Ça va? 你好，世界 ½ ² Ⅷ 😀\n",
    "<|im_start|>user\nWhat is 17 * 23?<|im_end|>\n<|im_start|>assistant\n",
)
CORE_ALONE = Path(__file__).parents[1] / "helpers" / "core_alone.py"


@pytest.fixture(scope="module")
def folder() -> Path:
    """The bundled model, converted once into the user's own cache folder."""
    return locate_model(None)


def test_the_bundled_model_is_described_as_its_publisher_does(folder: Path) -> None:
    spec = read_spec(folder)
    assert (spec.architecture, spec.num_layers, spec.num_heads, spec.num_kv_heads) == ("LlamaForCausalLM", 30, 9, 3)
    assert (spec.hidden_size, spec.head_dim, spec.vocab_size, spec.max_position) == (576, 64, 49152, 8192)
    assert (spec.rms_eps, spec.rope.theta, spec.tie_embeddings) == (1e-5, 1e5, True)
    assert read_eos_token_ids(folder, spec.vocab_size) == (2,)


def test_q_and_k_rows_are_in_the_order_of_the_rotary_embedding(folder: Path) -> None:
    """GGUF's row 2i + j of a head is row 32j + i here; in the wrong order the model knows nothing."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    file = GgufFile(bundled_model())
    for name, module in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        stored = file.floats(f"blk.7.{name}.weight")
        ours = getattr(model.model.layers[7].self_attn, module).weight.detach().numpy()
        rows = [64 * head + 2 * i + j for head in range(len(ours) // 64) for j in range(2) for i in range(32)]
        assert (ours == stored[rows]).all()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("The capital of France is").ids])).logits
    assert tokenizer.id_to_token(int(logits[0, -1].argmax())) == "ĠParis"


def test_the_bundled_tokenizer_cuts_every_digit_off_and_loses_nothing(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in DOCUMENTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode("it is 1999").ids] == ["it", "Ġis", "Ġ", *"1999"]


def test_the_bundled_chat_template_and_tokens_are_kept(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = [{"role": "user", "content": "hi"}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(text)[0] == 1
    assert tokenizer.encode("hi")[0] != 1


def test_core_alone_says_of_twenty_prompts_what_transformers_says() -> None:
    """The innermost ring runs a real model on a CPU by itself."""
    torch.set_num_threads(1)
    folder = locate_model(None, dtype="float32")
    prompts = bundled_prompts(folder)
    command = [sys.executable, str(CORE_ALONE), str(folder), "8"]
    said = subprocess.run(command, input=json.dumps(prompts), text=True, check=True, capture_output=True).stdout
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, answer in zip(prompts, json.loads(said), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
        assert len(answer) == 8
