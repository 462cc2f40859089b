"""FP8 kernels against their twins, on a GPU: the interpreter has no FP8."""

import pytest
import torch
import torch.nn.functional as F

from helpers.attention import random_case
from helpers.gemm import error, in_blocks, matrices
from helpers.gpu import DEVICE
from minisgl.core.attention import TorchAttention
from minisgl.core.kv_cache import KVCache
from minisgl.core.ops import RopeStore
from minisgl.core.quantization import BLOCK, Fp8Weight, quantize, quantize_fp8, to_fp8
from minisgl.gpu.attention.interface import device_batch
from minisgl.gpu.kernels import elementwise, fp8, fp8_rows
from minisgl.gpu.kernels.decode import DecodeAttention, DecodeSplit, Workspaces
from minisgl.gpu.kernels.elementwise import add_rms_norm, rope_store_kv
from minisgl.gpu.kernels.fp8_rows import RowsTile

pytestmark = pytest.mark.gpu


def multiplied(x: torch.Tensor, weight: Fp8Weight, offset: torch.Tensor | None = None) -> torch.Tensor:
    """`fp8_linear`, with x quantised as the kernel for so many rows wants it."""
    rows, width = x.shape
    group = BLOCK if elementwise.in_runs(rows, weight) else width
    data, scale = quantize(x, group)
    spread = data.float() * scale.repeat_interleave(group, dim=1)[:, :width]
    return F.linear(spread, weight.dequantize(torch.float32), None if offset is None else offset.float())


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (7, 5120), (300, 17408), (3, 384), (5, 40)])
def test_rows_are_quantised_as_by_the_twin(rows: int, width: int, blocks: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=DEVICE) * torch.logspace(-6, 4, rows, device=DEVICE)[:, None]
    x[rows // 2] = 0.0 if rows > 1 else x[0]
    x = x.bfloat16()
    data = torch.empty((BLOCK, width), device=DEVICE)
    reader = Fp8Weight(data, torch.empty((1, -(-width // BLOCK)) if blocks else (BLOCK, 1)))
    got = elementwise.quantize_rows(x, elementwise.in_runs(rows, reader))
    data, scale = quantize(x, BLOCK if elementwise.in_runs(rows, reader) else None)
    torch.testing.assert_close(got.scale[:rows], scale, rtol=1e-6, atol=0.0)
    found = got.data[:rows].float()
    assert (found != data.float()).float().mean() < 1e-3  # a quotient that rounds another way
    torch.testing.assert_close(found, data.float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["channel", "block"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 64, 65, 130, 512])
@pytest.mark.parametrize(("columns", "inner"), [(4096, 1024), (1024, 3072), (7168, 5120), (384, 640), (1000, 520)])
def test_linear_is_the_twins(rows: int, columns: int, inner: int, form: str, bias: bool) -> None:
    if form == "block" and (columns % BLOCK or inner % BLOCK):
        pytest.skip("no whole blocks")
    x, exact, offset = matrices(rows, columns, inner, torch.bfloat16, DEVICE)
    weight = in_blocks(exact) if form == "block" else quantize_fp8(exact)
    added = offset if bias else None
    assert error(fp8.linear(x, weight, added), multiplied(x, weight, added)) < 5e-3


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    "tile", [RowsTile(8, 2, 3, 1), RowsTile(4, 4, 4, 1), RowsTile(4, 4, 4, 4), RowsTile(8, 2, 3, 3)]
)
def test_few_rows_are_multiplied_with_every_tile(tile: RowsTile, blocks: bool, half: torch.dtype) -> None:
    if why := fp8_rows.trial(DEVICE):
        pytest.skip(why)
    for rows, columns, inner in ((8, 256, 1024), (5, 384, 128), (1, 512, 1152)):  # also fewer runs of K than warps
        x, exact, offset = matrices(rows, columns, inner, half, DEVICE)
        weight = in_blocks(exact) if blocks else quantize_fp8(exact)
        rows_in_fp8, wanted = elementwise.quantize_rows(x, runs=True), multiplied(x, weight)
        sums = fp8_rows.linear(rows_in_fp8, weight, None, split=True, tile=tile)
        assert sums.shape == (tile.splits, rows, columns)
        assert error(sums.sum(0), wanted) < 1e-5
        if tile.splits == 1:
            out = fp8_rows.linear(rows_in_fp8, weight, offset, split=False, tile=tile)
            assert error(out, wanted + offset.float()) < 5e-3
            alone = elementwise.quantize_rows(x[-1:], runs=True)
            assert torch.equal(fp8_rows.linear(alone, weight, offset, split=False, tile=tile)[0], out[-1])


@pytest.mark.parametrize("split", [DecodeSplit(16, 1, 7, 0), DecodeSplit(16, 4, 2, 3), DecodeSplit(128, 4, 2, 2)])
def test_decode_writes_and_reads_the_cache_as_rope_and_attention_do(split: DecodeSplit) -> None:
    case = random_case((300, 16, 17, 1), None, 2, 5, 128, 16, torch.bfloat16, DEVICE)
    kv = KVCache(to_fp8(case.kv.k), to_fp8(case.kv.v))
    rows = device_batch(case.rows)
    plan = DecodeAttention(rows, kv, Workspaces(DEVICE), 132, split)
    positions = rows.kv_lens - 1
    pages = rows.page_table.gather(1, (positions // 16).long().unsqueeze(1)).squeeze(1).long()
    qkv = torch.randn(4, 14 * 128, device=DEVICE).bfloat16()
    cos_sin, gain = torch.randn(320, 128, device=DEVICE), torch.randn(128, device=DEVICE).bfloat16()
    k, v = kv.k[1].clone(), kv.v[1].clone()
    rope = RopeStore(rope_store_kv, gain, gain, 1e-6, cos_sin, positions, pages * 16 + positions % 16, k, v)
    plan.begin([0])
    out = plan.run_qkv(qkv, rope, 1, 0)
    q = rope(qkv)
    for ours, theirs in ((kv.k[1], k), (kv.v[1], v)):
        assert (ours.view(torch.uint8) != theirs.view(torch.uint8)).float().mean() < 1e-4
    exact = KVCache(kv.k.float(), kv.v.float())
    expected = TorchAttention().plan(case.rows, exact, decode=True).run(q.float(), 1, 0)
    assert error(out, expected) < 1e-2


@pytest.mark.parametrize("rows", [1, 8, 16, 40, 64])
def test_splits_are_added_up_by_the_norm(rows: int) -> None:
    x, exact, gain = matrices(rows, 1024, 3072, torch.bfloat16, DEVICE)
    weight = quantize_fp8(exact)
    splits = fp8.linear(x, weight, None, split=True)
    assert splits.shape == (4, rows, 1024)
    residual = torch.zeros(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    add_rms_norm(splits, residual, gain, 1e-6)
    assert error(residual, multiplied(x, weight)) < 5e-3


@pytest.mark.parametrize("form", ["channel", "block"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (5, 5120), (3000, 1024), (9, 17408)])
def test_norm_and_activation_quantise_what_they_return(rows: int, width: int, form: str) -> None:
    torch.manual_seed(0)
    exact = torch.randn(BLOCK, width, device=DEVICE).bfloat16()
    reader = in_blocks(exact) if form == "block" else quantize_fp8(exact)
    wide = torch.randn(rows, 2 * width, device=DEVICE).bfloat16()
    x, gain = wide[:, :width].contiguous(), wide[0, :width].contiguous()
    pairs = [(elementwise.silu_mul(wide, reader), elementwise.silu_mul(wide))]
    if width <= elementwise.MAX_NORM_DIM:
        pairs.append((elementwise.rms_norm(x, gain, 1e-6, reader), elementwise.rms_norm(x, gain, 1e-6)))
        streams = x.clone(), x.clone()
        got, plain = (
            add_rms_norm(x, stream, gain, 1e-6, of) for stream, of in zip(streams, (reader, None), strict=True)
        )
        assert torch.equal(*streams)
        pairs.append((got, plain))
    for got, plain in pairs:
        again = elementwise.quantize_rows(plain, elementwise.in_runs(rows, reader))
        assert torch.equal(got.scale[:rows], again.scale[:rows])
        assert torch.equal(got.data[:rows].view(torch.uint8), again.data[:rows].view(torch.uint8))
