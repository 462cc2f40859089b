"""GEMMs of a large weight with a few rows, against torch's."""

import itertools

import pytest
import torch

from helpers.gemm import error, matrices
from minisgl.core import ops as reference
from minisgl.gpu.kernels import stream
from minisgl.gpu.kernels.cuda import available, compile_all
from minisgl.gpu.kernels.stream import TOKENS, StreamTile, stream_tile_for

TILES = [StreamTile(*values) for values in itertools.product((16, 64, 96), (1, 2), (1, 2, 4))]
TILES += [StreamTile(tokens, 2, 2, 3) for tokens in (16, 64, 96)]  # three resident thread blocks, so fewer stages


@pytest.fixture(scope="module")
def hopper() -> torch.device:
    """A GPU that has these kernels, which are compiled in parallel."""
    if why := available(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip(why)
    dtypes = (torch.float16, torch.bfloat16)
    compile_all([stream.source(t, gated, dtype) for t in TILES for gated in (False, True) for dtype in dtypes])
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
def test_it_is_the_gemm_with_every_tile(tile: StreamTile, half: torch.dtype, hopper: torch.device) -> None:
    for rows, columns, inner in ((tile.tokens, 128, 1024), (tile.tokens - 3, 384, 64 * 9), (1, 256, 256)):
        x, weight, bias = matrices(rows, columns, inner, half, hopper)
        wanted = x.float() @ weight.float().T
        out = stream.linear(x, weight, tile=tile)
        assert error(out, wanted) < 5e-3
        assert error(stream.linear(x, weight, bias, tile=tile), wanted + bias.float()) < 5e-3
        assert torch.equal(stream.linear(x, weight, tile=tile), out)
    for rows, columns, inner in ((tile.tokens, 256, 1024), (2, 640, 640)):
        x, weight, _ = matrices(rows, columns, inner, half, hopper)
        wanted = reference.silu_mul((x.float() @ weight.float().T).to(half)).float()
        assert error(stream.linear(x, weight, gated=True, tile=tile), wanted) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 33, 96])
def test_rows_of_a_wider_tensor_are_read_where_they_lie(rows: int, hopper: torch.device) -> None:
    wide, weight, _ = matrices(rows, 256, 1024, torch.bfloat16, hopper)
    x = wide[:, 512:]
    found = stream.linear(x, weight[:, 512:].contiguous())
    assert torch.equal(found, stream.linear(x.contiguous(), weight[:, 512:].contiguous()))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_row_does_not_depend_on_the_others(tokens: int, hopper: torch.device) -> None:
    x, weight, _ = matrices(tokens, 256, 2048, torch.bfloat16, hopper)
    order = torch.randperm(tokens, device=hopper)
    for splits in (1, 4):
        tile = StreamTile(tokens, 2, splits)
        assert torch.equal(stream.linear(x[order], weight, tile=tile), stream.linear(x, weight, tile=tile)[order])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 16, 64, 96])
def test_a_chain_in_a_graph_is_the_chain_one_by_one(rows: int, hopper: torch.device) -> None:
    """Each kernel starts while the one before it runs, and blocks of both are on the GPU at once."""
    x, *_ = matrices(rows, 128, 2048, torch.bfloat16, hopper)
    up, down = (matrices(1, *size, torch.bfloat16, hopper)[1] for size in ((2 * 4096, 2048), (2048, 4096)))
    one_by_one = found = x
    for _ in range(40):
        hidden = stream.linear(one_by_one, up, gated=True)
        torch.cuda.synchronize()
        one_by_one = torch.tanh(stream.linear(hidden, down)) + x
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(40):
            found = torch.tanh(stream.linear(stream.linear(found, up, gated=True), down)) + x
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, one_by_one)


def test_only_few_rows_and_large_matrices_fit() -> None:
    weight = torch.empty(7168, 5120, dtype=torch.bfloat16, device="meta")
    one, few, many = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (1, 96, 97))
    vocabulary = torch.empty(151936, 5120, dtype=torch.bfloat16, device="meta")
    assert stream.fits(few, weight)
    assert stream.fits(few[:, :2560], weight[:, :2560].contiguous())
    for x, matrix in ((one, weight), (many, weight), (few.float(), weight.float()), (few, vocabulary)):
        assert not stream.fits(x, matrix)
    assert not stream.fits(few, weight[:1024])
    assert not stream.fits(few, weight[:-64])
    assert not stream.fits(few[:, :5100], weight[:, :5100].contiguous())
    assert not stream.fits(few[:, :2560], weight[:, :2560])
    assert not stream.fits(few[:, ::2], weight[:, ::2].contiguous())


@pytest.mark.parametrize("columns", [1024, 2560, 3584, 5120, 7168, 12800, 17408, 34816])
def test_a_tile_holds_the_rows_and_fills_the_gpu_where_it_can(columns: int) -> None:
    for rows in range(1, stream.MAX_ROWS + 1):
        tile = stream_tile_for(rows, columns)
        blocks = columns // stream.TILE * tile.splits
        assert tile.tokens >= rows
        assert tile.tokens // tile.sides % 8 == 0  # the rows of a swizzle
        assert tile.sides * tile.splits <= 8  # blocks of a cluster
        assert tile.splits == 4 or blocks >= 130
        last = blocks % (132 * tile.resident)
        assert not 0 < last < 66 or blocks < 66


@pytest.mark.parametrize("resident", [2, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_what_splits_exchange_fits_into_the_ring(tokens: int, resident: int) -> None:
    tile = StreamTile(tokens, 2, 4, resident)
    ring = stream.stages(tile) * stream.slab_bytes(tokens)
    assert stream.stages(tile) > 2
    assert ring >= tokens * stream.TILE * 4
    assert resident * (ring + 4096) <= 227 * 1024


def test_the_source_says_its_tile() -> None:
    text = stream.source(StreamTile(32, 2, 4), gated=True, dtype=torch.float16)
    assert "#define TOKENS 32\n#define SIDES 2\n#define SPLITS 4\n" in text
    assert "m64n32k16.f32.f16.f16" in text
    assert "%14, %15}, %16, %17, adds" in text
