"""Compiles kernels for Hopper, which needs no GPU, in a process without the interpreter."""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minisgl.gpu.kernels import attention, decode, elementwise, fp8, linear, moe
from minisgl.gpu.kernels.jit import compiling

HOPPER = GPUTarget("cuda", 90, 32)
BF16, F32, FP8, INT = "*bf16", "*fp32", "*fp8e4nv", "*i32"


def compile_for_hopper(kernel: Any, types: dict[str, str], warps: int = 4, stages: int = 3, **constants: Any) -> None:
    """Arguments that are neither in `types` nor constants are integers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})


class NoGpu:
    """Triton's driver where there is nothing to launch on."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_at_once() -> None:
    compiled: list[str] = []
    triton.knobs.compilation.listener = lambda **event: compiled.append(event["src"].name)
    triton.runtime.driver.set_active(NoGpu())
    x, weight = torch.ones((3, 64), dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    with compiling():
        for width in (16, 32, 64, 16):
            elementwise.rms_norm(x[:, :width], weight[:width], 1e-6)
    assert compiled == ["_norm_kernel"] * 3, compiled


def main() -> None:
    gemm = {"x": FP8, "x_scale": F32, "weight": FP8, "weight_scale": F32, "bias": BF16}
    for splits, rows, ahead in ((1, 16, 512), (4, 64, 0)):
        compile_for_hopper(
            fp8._linear_kernel, {**gemm, "out": F32 if splits > 1 else BF16}, INNER=3072, LENGTH=3072 // splits,
            BIAS=splits == 1, ROWS=rows, COLUMNS=64, BLOCK=256, AHEAD=ahead, LINE=fp8.LINE, PDL=True,
        )  # fmt: skip
    compile_for_hopper(
        linear._linear_kernel, dict.fromkeys(("x", "weight", "bias", "out"), BF16), INNER=1024, LENGTH=1024, BIAS=True,
        GATED=True, ROWS=16, COLUMNS=32, BLOCK=256, PREFETCH=True, LINES=16, LINE=linear.LINE, PDL=True,
    )  # fmt: skip
    for group, out in ((0, BF16), (1024, FP8), (128, FP8)):
        norm = {"x": F32, "residual": BF16, "weight": BF16, "out": out, "scale_out": F32, "eps": "fp32"}
        compile_for_hopper(elementwise._norm_kernel, norm, ADD=True, PARTS=4, GROUP=group, ROWS=2, BLOCK=1024, PDL=True)
        activation = {"gate_up": BF16, "out": out, "scale": F32}
        compile_for_hopper(elementwise._silu_mul_kernel, activation, GROUP=group, BLOCK=1024, PDL=True)
    quantized = {"x": BF16, "data": FP8, "scale": F32}
    compile_for_hopper(elementwise._quantize_kernel, quantized, GROUP=8192, BLOCK=8192, PDL=True)
    lists = dict.fromkeys(("lists", "counts"), INT)
    for shape in (moe.MOE_TILES[0], moe.MOE_TILES[-1]):
        for operand, scale, sharing in ((BF16, BF16, 0), (FP8, F32, 1), (FP8, F32, 128)):
            options = {
                "EXPERTS": 128, "BLOCK_EXPERTS": 128, "ROWS": shape.rows, "INNER": 128 if sharing else shape.inner,
                "SHARING": sharing, "warps": shape.warps, "stages": shape.stages,
            }  # fmt: skip
            types = {**lists, "x": operand, "x_scale": scale, "weight": operand, "scale": scale, "hidden": BF16}
            compile_for_hopper(moe._gate_up_kernel, types, TOP_K=8, COLUMNS=shape.gate_up_columns, **options)
            types |= {"hidden": operand, "hidden_scale": scale, "shares": BF16, "parts": BF16}
            compile_for_hopper(moe._down_kernel, types, COLUMNS=shape.down_columns, **options)
    compile_for_hopper(attention._merge_kernel, {"ones": BF16, "out": BF16, "starts": INT}, BLOCK=1024, PDL=True)
    compile_for_hopper(decode._tiles_kernel, {"lens": INT, "starts": INT}, NEW=1, TILE=64, BLOCK=256, PDL=True)
    step = dict.fromkeys(("q", "q_norm", "k_norm", "out"), BF16) | dict.fromkeys(
        ("cos_sin", "partial", "log_sums"), F32
    )
    step |= dict.fromkeys(("table", "lens", "starts", "arrived"), INT) | dict.fromkeys(("eps", "scale"), "fp32")
    for cache, whole, tile in ((FP8, True, 32), (FP8, False, 64), (BF16, False, 16)):
        compile_for_hopper(
            decode._decode_kernel, {**step, "k": cache, "v": cache}, warps=2, stages=5, FUSED_ROPE=True, NORM=True,
            HEADS=8, GROUP=5, HEAD_DIM=128, PAGE=16, ROWS=256, M=16, D=128, TILE=tile, WHOLE=whole, FP8=cache == FP8,
            PDL=True,
        )  # fmt: skip


main()
compile_at_once()
