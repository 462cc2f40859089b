"""A decoder whose rows take turns: in which order it computes, begins additions and ends them, and what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from helpers.driver import CPU, Driver
from helpers.ranked import SPECS
from minisgl.core.ops import PLAIN, Norm, Turns
from minisgl.core.weights import Weights, dummy_weights

PARTS = {5: "A", 7: "B", 12: "all"}
TOKENS = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5, 0, 11]
TURNS = """
input_norm 0 A, qkv 0 A, input_norm 0 B, qkv 0 B, o 0 A, begin A, o 0 B, begin B,
end post_norm 0 A, gate_up 0 A, down 0 A, begin A, end post_norm 0 B, gate_up 0 B, down 0 B, begin B,
end input_norm 1 A, qkv 1 A, end input_norm 1 B, qkv 1 B,
o 1 all, add post_norm 1 all, gate_up 1 all, down 1 all, add norm all
"""
AT_ONCE = """
input_norm 0 all, qkv 0 all, o 0 all, add post_norm 0 all, gate_up 0 all, down 0 all,
add input_norm 1 all, qkv 1 all, o 1 all, add post_norm 1 all, gate_up 1 all, down 1 all, add norm all
"""


class Recorder:
    """Operations that write down what is done for which rows; 12 of them go as 5 and 7 if they take turns."""

    def __init__(self, weights: Weights, turns: bool) -> None:
        self.said: list[str] = []
        named = {f"{name} {index}": t for index, layer in enumerate(weights.layers) for name, t in vars(layer).items()}
        self.names = {t.data_ptr(): name for name, t in named.items() if t is not None}
        self.names[weights.norm.data_ptr()] = "norm"
        self.operations = dataclasses.replace(
            PLAIN, linear=self.linear, linear_into=self.linear_into, project=self.linear, gated=self.gated,
            rms_norm=self.rms_norm, add_rms_norm=self.add_rms_norm,
        )  # fmt: skip
        if turns:
            self.operations = dataclasses.replace(self.operations, cut=lambda x: Turns((5, 7), self.add))

    def note(self, *words: str | Tensor, x: Tensor) -> None:
        names = [word if isinstance(word, str) else self.names[word.data_ptr()] for word in words]
        self.said.append(" ".join([*names, PARTS[len(x)]]))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.note(weight, x=x)
        return PLAIN.linear(x, weight, bias)

    def linear_into(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        self.note(weight, x=x)
        PLAIN.linear_into(x, weight, bias, out)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.note(weight, x=x)
        return PLAIN.gated(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.note(weight, x=x)
        return PLAIN.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.note("add", weight, x=x)
        return PLAIN.add_rms_norm(x, residual, weight, eps)

    def add(self, x: Tensor) -> Norm:
        self.note("begin", x=x)

        def norm(residual: Tensor, weight: Tensor, eps: float) -> Tensor:
            self.note("end", weight, x=x)
            return PLAIN.add_rms_norm(x, residual, weight, eps)

        return norm


@pytest.mark.parametrize(("turns", "order"), [(True, TURNS), (False, AT_ONCE)])
def test_a_part_is_added_while_another_is_computed(turns: bool, order: str) -> None:
    weights = dummy_weights(SPECS["qwen3"], torch.float32, CPU)
    recorder, driver = Recorder(weights, turns), Driver(SPECS["qwen3"], weights)
    driver.decoder.ops = recorder.operations
    driver.step(chunks={0: TOKENS})
    assert recorder.said == order.replace("\n", " ").strip().split(", ")


@pytest.mark.parametrize("model", ["llama-biased", "qwen2", "qwen3", "qwen3-moe", "mistral"])
def test_rows_that_take_turns_say_what_they_say_at_once(model: str) -> None:
    torch.set_num_threads(1)
    spec = SPECS[model]
    weights = dummy_weights(spec, torch.float32, CPU)
    at_once, by_turns = Driver(spec, weights), Driver(spec, weights)
    plain = by_turns.decoder.ops

    def cut(residual: Tensor) -> Turns | None:
        rows = len(residual)
        return Turns((rows // 3, rows - rows // 3), plain.turns(residual).add) if rows > 3 else None

    by_turns.decoder.ops = dataclasses.replace(plain, cut=cut)
    for driver in (at_once, by_turns):
        driver.step(chunks={0: TOKENS, 1: TOKENS[3:]}, unfinished=[1])
        driver.step(decode=[0], chunks={1: TOKENS[4:]})
    torch.testing.assert_close(by_turns.logits, at_once.logits)
    torch.testing.assert_close(by_turns.runner.kv.k, at_once.runner.kv.k)
