"""What CUDA graphs will take of a card, by arithmetic: when they are captured the KV has its memory already."""

from __future__ import annotations

import torch

from minisgl.config import Config
from minisgl.engine.piecewise import largest_piece, piece_sizes
from minisgl.models.spec import ModelSpec

GRAPH_BYTES = 256 << 10
"""What the driver keeps for a graph of some ten kernels; a decode step's are few enough not to count."""


def graph_bytes(config: Config, spec: ModelSpec, vocab: int, dtype: torch.dtype, max_seq_len: int) -> int:
    """Bytes of all graphs that `config` asks for, on a rank with the share `spec` and `vocab` tokens of the head.

    On an H200 Qwen3-0.6B's decode graphs took 134 MB, of which this counts 133.
    """
    total, item = 0, dtype.itemsize
    if rows := config.cuda_graph_max_bs:
        from minisgl.engine.graphs import graph_sizes

        tables = 4 * sum(graph_sizes(rows)) * -(-max_seq_len // config.page_size)
        total += rows * (vocab * item + token_bytes(spec, item)) + tables
    if tokens := largest_piece(config):
        sizes = piece_sizes(tokens)
        ends = 2 * spec.num_heads * spec.head_dim * item  # queries and what attention finds
        total += tokens * (token_bytes(spec, item) + ends) + sum(sizes) * spec.hidden_size * item
        total += len(sizes) * spec.num_layers * GRAPH_BYTES
    return total


def token_bytes(spec: ModelSpec, item: int) -> int:
    """Bytes of a token's activations in a layer, if nothing is given back before its end; `item`: of an element."""
    attention = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    mlp = 3 * spec.intermediate_size
    if spec.moe is not None:
        mlp = max(mlp, spec.moe.top_k * (3 * spec.moe.width + spec.hidden_size))
    return (4 * spec.hidden_size + attention + mlp) * item
