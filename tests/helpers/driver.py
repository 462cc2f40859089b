"""Drives a runner with hand-made plans, one row at a time or several together."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minisgl.core.attention import Attention, PlannedAttention, TorchAttention
from minisgl.core.decoder import Decoder, ForwardBatch
from minisgl.core.kv_cache import KVCache, allocate_kv
from minisgl.core.model_config import ModelSpec
from minisgl.core.model_runner import ModelRunner
from minisgl.core.plan import NewRows, StepPlan
from minisgl.core.weights import Weights

CPU = torch.device("cpu")


class RecordingDecoder(Decoder):
    """Keeps the logits of every token of every step, sampled or not."""

    last: Tensor  # (T, V)

    def forward(self, batch: ForwardBatch, attention: PlannedAttention, kv: KVCache) -> Tensor:
        hidden = super().forward(dataclasses.replace(batch, logits_indices=None), attention, kv)
        self.last = self.logits(hidden)
        return hidden if batch.logits_indices is None else hidden.index_select(0, batch.logits_indices)


class Driver:
    """A runner and what a scheduler would know: which pages a row has and how many of its tokens are cached."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, *, rows: int = 4, page_size: int = 4, num_pages: int = 256,
        max_seq_len: int = 256, dtype: torch.dtype = torch.float32, device: torch.device = CPU,
    ) -> None:  # fmt: skip
        attention = Attention(TorchAttention(), TorchAttention())
        self.decoder = RecordingDecoder(spec, weights, attention, max_seq_len)
        kv = allocate_kv(spec, num_pages, page_size, dtype, device)
        self.runner = ModelRunner(self.decoder, kv, rows, max_seq_len, device)
        self.page_size = page_size
        self.free = np.random.default_rng(0).permutation(num_pages).tolist()
        self.pages: dict[int, list[int]] = {slot: [] for slot in range(rows)}
        self.length = dict.fromkeys(range(rows), 0)
        self.steps = 0

    @property
    def logits(self) -> Tensor:
        """Logits (T, V) of the last step's tokens: decode rows first, then chunks."""
        return self.decoder.last

    def share(self, slot: int, owner: int, tokens: int) -> list[tuple[int, int, int]]:
        """Start a row on the first `tokens` tokens of another, whole pages of it; the writes for the next step."""
        count = tokens // self.page_size
        self.pages[slot] = self.pages[owner][:count]
        self.length[slot] = count * self.page_size
        return [(slot, index, page) for index, page in enumerate(self.pages[slot])]

    def step(
        self, decode: Sequence[int] = (), chunks: Mapping[int, Sequence[int]] | None = None, *,
        unfinished: Sequence[int] = (), init: NewRows | None = None, writes: Sequence[tuple[int, int, int]] = (),
    ) -> list[int]:  # fmt: skip
        """Decode rows and prefill chunks in one step; the sampled tokens. Chunks of `unfinished` rows are not final."""
        chunks = chunks or {}
        lens = {slot: len(tokens) for slot, tokens in chunks.items()}
        starts, decode_lens = ([self.length[slot] for slot in slots] for slots in (chunks, decode))
        writes = [*writes, *(write for slot in decode for write in self._grow(slot, 1))]
        writes += [write for slot in chunks for write in self._grow(slot, lens[slot])]
        page_slots, page_indices, page_ids = np.array(writes, np.int32).reshape(-1, 3).T.copy()
        self.steps += 1
        plan = StepPlan(
            step=self.steps, init=init, page_slots=page_slots, page_indices=page_indices, page_ids=page_ids,
            decode_slots=np.array(decode, np.int32), decode_lens=np.array(decode_lens, np.int32),
            prefill_slots=np.array(list(chunks), np.int32), prefill_starts=np.array(starts, np.int32),
            prefill_lens=np.array(list(lens.values()), np.int32),
            prefill_final=np.array([slot not in unfinished for slot in chunks], np.bool_),
            prefill_tokens=np.array([token for tokens in chunks.values() for token in tokens], np.int32),
        )  # fmt: skip
        tokens: list[int] = self.runner.run(plan).tokens.tolist()
        return tokens

    def _grow(self, slot: int, count: int) -> list[tuple[int, int, int]]:
        self.length[slot] += count
        pages, writes = self.pages[slot], []
        while len(pages) * self.page_size < self.length[slot]:
            writes.append((slot, len(pages), self.free[0]))
            pages.append(self.free.pop(0))
        return writes
