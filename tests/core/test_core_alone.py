"""The innermost ring runs a real model on a CPU by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.bundled import bundled_prompts
from minisgl.formats.hub import locate_model

PROGRAM = Path(__file__).parents[1] / "helpers" / "core_alone.py"
TOKENS = 8


def test_core_alone_says_of_twenty_prompts_what_transformers_says() -> None:
    torch.set_num_threads(1)
    folder = locate_model(None, dtype="float32")
    prompts = bundled_prompts(folder)
    command = [sys.executable, str(PROGRAM), str(folder), str(TOKENS)]
    said = subprocess.run(command, input=json.dumps(prompts), text=True, check=True, capture_output=True).stdout
    model = AutoModelForCausalLM.from_pretrained(folder)
    how = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = [model.generate(torch.tensor([p]), **how)[0, len(p) :].tolist() for p in prompts]
    assert json.loads(said) == theirs
