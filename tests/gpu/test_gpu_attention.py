"""Every attention backend on the GPU, bfloat16, against the torch backend in float32."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.attention import Case, random_case
from minisgl.core.attention import AttentionBackend, TorchAttention
from minisgl.core.kv_cache import KVCache
from minisgl.core.quantization import to_fp8
from minisgl.gpu.attention.interface import GraphBackend, decode_batch
from minisgl.gpu.attention.select import Shape, available_backends, make_attention, refusal

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
KV_HEADS = 2
XQA_COMPILED = {(group, 128) for group in (2, 4, 5)}  # those of other head groups take half a minute each to compile
# Head group, head dimension, page size.
SHAPES = [(1, 64, 1), (2, 128, 16), (5, 128, 16), (8, 64, 256), (2, 64, 64), (5, 128, 64), (8, 128, 16), (2, 128, 32)]
DECODES = [(1,), (1, 17, 64, 300, 8000), tuple(int(n) for n in np.random.default_rng(1).integers(1, 2000, 70))]
# Rows as (new tokens, tokens in all): whole prompts, chunks behind a cached prefix, and both.
PREFILLS = [((1, 1),), ((700, 700), (3, 3), (64, 64)), ((130, 8000), (1, 500), (2048, 2048)), ((7, 4000), (5, 9))]


def backends(name: str, group: int, head_dim: int, page_size: int) -> tuple[AttentionBackend, AttentionBackend]:
    """A backend for prefill and decode, or a skip where it is missing or refuses."""
    shape = Shape(head_dim=head_dim, dtype=torch.bfloat16, page_size=page_size)
    if reason := available_backends(DEVICE)[name] or refusal(name, shape):
        pytest.skip(f"{name}: {reason}")
    if name == "trtllm" and (group, head_dim) not in XQA_COMPILED:
        pytest.skip("XQA would compile for this shape")
    attention, _ = make_attention(name, shape, DEVICE)
    return attention.prefill, attention.decode


def exact(case: Case, window: int) -> Tensor:
    kv = KVCache(case.kv.k.float(), case.kv.v.float())
    return TorchAttention().plan(case.rows, kv, case.decode).run(case.q.float(), 1, window)


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected)
    assert error < 1e-2, f"relative error {error:.2e}"  # NaN fails too


# Not with windows for fi and trtllm: FlashInfer would compile its kernels for them.
@pytest.mark.parametrize(("group", "head_dim", "page_size"), SHAPES)
@pytest.mark.parametrize(
    ("name", "window"), [("fa", 0), ("fa", 100), ("fi", 0), ("trtllm", 0), ("triton", 0), ("triton", 100)]
)
def test_backend_equals_float32(name: str, group: int, head_dim: int, page_size: int, window: int) -> None:
    prefill, decode = backends(name, group, head_dim, page_size)
    for lens in DECODES:
        case = random_case(lens, None, KV_HEADS, group, head_dim, page_size, torch.bfloat16, DEVICE)
        assert_close(decode.plan(case.rows, case.kv, decode=True).run(case.q, 1, window), exact(case, window))
    for chunks in PREFILLS:
        query_lens, lens = zip(*chunks, strict=True)
        case = random_case(lens, query_lens, KV_HEADS, group, head_dim, page_size, torch.bfloat16, DEVICE)
        assert_close(prefill.plan(case.rows, case.kv, decode=False).run(case.q, 1, window), exact(case, window))


@pytest.mark.parametrize(("name", "limit"), [("triton", 1e-2), ("fa", 5e-2)])  # fa has queries in FP8, too
@pytest.mark.parametrize(("group", "head_dim", "page_size"), [(2, 128, 16), (5, 128, 64), (8, 64, 256)])
def test_keys_and_values_in_fp8(name: str, limit: float, group: int, head_dim: int, page_size: int) -> None:
    prefill, decode = backends(name, group, head_dim, page_size)
    cases = [random_case(lens, None, KV_HEADS, group, head_dim, page_size, torch.bfloat16, DEVICE) for lens in DECODES]
    for chunks in PREFILLS:
        query_lens, lens = zip(*chunks, strict=True)
        cases.append(random_case(lens, query_lens, KV_HEADS, group, head_dim, page_size, torch.bfloat16, DEVICE))
    for case in cases:
        kept = KVCache(to_fp8(case.kv.k), to_fp8(case.kv.v))
        backend = decode if case.decode else prefill
        out = backend.plan(case.rows, kept, case.decode).run(case.q, 1, 0)
        assert out.dtype == torch.bfloat16
        expected = exact(dataclasses.replace(case, kv=kept), 0)
        error = torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected)
        assert error < limit, f"relative error {error:.2e}"


@pytest.mark.parametrize(("rows", "page_size"), [(1, 64), (5, 16), (40, 16), (140, 16), (140, 64)])
@pytest.mark.parametrize("name", ["fa", "fi", "trtllm", "triton"])
def test_replayed_graph_follows_lengths_and_pages(name: str, page_size: int, rows: int) -> None:
    decode = backends(name, 2, 128, page_size)[1]
    assert isinstance(decode, GraphBackend)
    generator, longest = np.random.default_rng(rows), 3000
    first = random_case([longest] * rows, None, KV_HEADS, 2, 128, page_size, torch.bfloat16, DEVICE)
    kv = first.kv
    table = torch.full((rows, longest // page_size + 9), kv.num_pages, dtype=torch.int32, device=DEVICE)
    lens, q = torch.ones(rows, dtype=torch.int32, device=DEVICE), first.q.clone()
    graph = decode.graph_decode(decode_batch(table, lens, table.shape[1] * page_size), kv)
    graph.prepare(np.ones(rows, np.int32))
    for layer in (0, 1):
        graph.attention.run(q, layer, 0)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = [graph.attention.run(q, layer, 0) for layer in (0, 1)]
    table[:, : first.rows.page_table.shape[1] - 20] = first.rows.page_table[:, :-20]
    host = generator.integers(1, longest - 40, rows).astype(np.int32)
    for step in range(40):
        host = host + 1 if step % 8 else generator.integers(1, longest - 40, rows).astype(np.int32)
        q.copy_(torch.randn_like(q))
        lens.copy_(torch.from_numpy(host))
        graph.prepare(host)
        captured.replay()
        if step in (0, 1, 15, 16, 39):
            rows_now = dataclasses.replace(first.rows, kv_lens=host, kv_lens_device=lens.clone())
            case = dataclasses.replace(first, q=q, rows=rows_now)
            assert_close(out[1], exact(case, 0))
            assert_close(out[1], decode.plan(case.rows, kv, decode=True).run(q, 1, 0).float())


@pytest.mark.parametrize("name", ["fa", "fi", "triton"])
def test_steps_in_flight_keep_their_own_plans(name: str) -> None:
    """Plans are made while earlier steps still run: none may see another's."""
    prefill, decode = backends(name, 2, 128, 16)
    cases = [
        random_case([50 + 97 * step, 3000 - 190 * step, 7], None, KV_HEADS, 2, 128, 16, torch.bfloat16, DEVICE, step)
        for step in range(12)
    ]
    expected = [exact(case, 0) for case in cases]
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device=DEVICE)
    outs = []
    for case in cases:
        busy = busy @ busy * 1e-3  # the host runs ahead of the GPU
        outs.append(decode.plan(case.rows, case.kv, decode=True).run(case.q, 1, 0))
    for out, wanted in zip(outs, expected, strict=True):
        assert_close(out, wanted)
    chunk = random_case([900, 40], [300, 40], KV_HEADS, 2, 128, 16, torch.bfloat16, DEVICE)
    assert_close(prefill.plan(chunk.rows, chunk.kv, decode=False).run(chunk.q, 1, 0), exact(chunk, 0))
