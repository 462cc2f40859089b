"""From a step's plan to its tokens, on one device."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisgl.core.attention import PlannedAttention, SequenceBatch
from minisgl.core.decoder import Decoder, ForwardBatch
from minisgl.core.kv_cache import DeviceTables, KVCache, upload
from minisgl.core.logits import LogitsProcessors, StepOutput
from minisgl.core.plan import Int32, Masks, NewRows, StepPlan


class GraphRunner(Protocol):
    """Steps of some kind as graphs, over a runner's tables and cache."""

    def takes(self, plan: StepPlan) -> bool: ...

    def run(self, plan: StepPlan) -> StepOutput:
        """The whole step, the sampled tokens written back to the tables; the output is good until the next step."""


class ModelRunner:
    """Runs plans in order against its tables and its cache. The host never waits for the device here."""

    def __init__(self, decoder: Decoder, kv: KVCache, rows: int, max_seq_len: int, device: torch.device) -> None:
        self.decoder = decoder
        self.kv = kv
        self.device = device
        self.tables = DeviceTables(rows, -(-max_seq_len // kv.page_size), kv.num_pages, device)
        self.logits_processors = LogitsProcessors(decoder, self.tables, device)
        self.graphs: list[GraphRunner] = []
        # That of the decoder, or the same by graphs between the attentions.
        self.forward: Callable[[ForwardBatch, PlannedAttention, KVCache], Tensor] = decoder.forward

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Run a step; where rows wait for masks, the logits processors are left for `finish`."""
        if plan.init is not None and plan.init.logits is not None:
            self.logits_processors.admit(plan.init.logits)
        graphs = next((graphs for graphs in self.graphs if graphs.takes(plan)), None)
        output = self._forward_and_sample(plan) if graphs is None else graphs.run(plan)
        if plan.logits is not None and len(plan.logits.constrained) == 0:
            self.logits_processors.run(plan, output, None)
        return output

    @torch.inference_mode()
    def finish(self, plan: StepPlan, output: StepOutput, masks: Masks) -> StepOutput:
        """The second half of the step that ran last, for rows that follow a grammar."""
        self.logits_processors.run(plan, output, masks)
        return output

    def _forward_and_sample(self, plan: StepPlan) -> StepOutput:
        # 1) Bring the tables up to date: rows that start, and new pages.
        if plan.init is not None:
            self._admit(plan.init)
        step = upload_step(plan, self.device)
        if len(plan.page_ids):
            self.tables.page_table.index_put_((step["page_slots"], step["page_indices"]), step["page_ids"])
        # 2) Run the layers over all of the step's tokens.
        attention = self.decoder.attention.plan(*self._sequences(plan, step), self.kv)
        hidden = self.forward(self._forward_batch(step), attention, self.kv)
        # 3) The sampled rows come first, then the prompt tokens that are scored.
        slots = step["sampled_slots"]
        output = self._sample(slots, hidden[: len(slots)])
        if len(hidden) > len(slots):
            self.logits_processors.score_prompts(plan, hidden[len(slots) :], output)
        return output

    def _sample(self, slots: Tensor, hidden: Tensor) -> StepOutput:
        if len(hidden) == 0:
            return StepOutput(torch.empty(0, dtype=torch.int32, device=self.device), hidden)
        logits, positions = self.decoder.logits(hidden), self.tables.length.index_select(0, slots)
        tokens = self.decoder.ops.sample(logits, self.tables.sampling, slots, positions)
        self.tables.last_token.index_copy_(0, slots, tokens)
        return StepOutput(tokens, logits)

    def _admit(self, init: NewRows) -> None:
        values = upload({"slots": init.slots.astype(np.int64), **init.sampling}, self.device)
        slots = values.pop("slots")
        for name, value in values.items():
            getattr(self.tables.sampling, name).index_copy_(0, slots, value)

    def _forward_batch(self, step: dict[str, Tensor]) -> ForwardBatch:
        """The step's tokens, decode rows first; sets the rows' lengths to what the step reaches."""
        tables = self.tables
        for kind in ("decode", "prefill"):
            tables.length.index_copy_(0, step[f"{kind}_slots"], step[f"{kind}_ends"])
        return ForwardBatch(
            ids=torch.cat([tables.last_token.index_select(0, step["decode_slots"]), step["prefill_tokens"]]),
            positions=step["positions"],
            slot_mapping=tables.slot_mapping(step["slots"], step["positions"], self.kv.page_size),
            logits_indices=step["logits_indices"] if len(step["prefill_slots"]) else None,
        )

    def _sequences(self, plan: StepPlan, step: dict[str, Tensor]) -> tuple[SequenceBatch, SequenceBatch]:
        def rows(kind: str, query_lens: Int32, kv_lens: Int32) -> SequenceBatch:
            pages = -(-int(kv_lens.max(initial=0)) // self.kv.page_size)
            return SequenceBatch(
                page_table=self.tables.page_table[:, :pages].index_select(0, step[f"{kind}_slots"]),
                query_lens=query_lens, kv_lens=kv_lens, cu_query_lens=step[f"{kind}_query_starts"],
                kv_lens_device=step[f"{kind}_ends"],
            )  # fmt: skip

        decode = rows("decode", np.ones_like(plan.decode_lens), plan.decode_lens + 1)
        return decode, rows("prefill", plan.prefill_lens, plan.prefill_starts + plan.prefill_lens)


def upload_step(plan: StepPlan, device: torch.device) -> dict[str, Tensor]:
    """A plan's integers on the device: p new pages, d decode rows, c chunks of t tokens, n rows sampled, q scored.

    Indices are int64, contents of the tables int32.
    """
    lens, decodes = plan.prefill_lens, len(plan.decode_slots)
    ends = np.cumsum(lens)  # of each chunk, among the prefill tokens
    wanted: list[NDArray[Any]] = [np.arange(decodes), decodes + ends[plan.prefill_final] - 1]
    if plan.logits is not None:
        wanted.append(plan.logits.prompt_rows)
    positions = np.arange(len(plan.prefill_tokens)) + np.repeat(plan.prefill_starts - (ends - lens), lens)
    arrays: dict[str, NDArray[Any]] = {
        "page_slots": plan.page_slots.astype(np.int64),  # (p,)
        "page_indices": plan.page_indices.astype(np.int64),  # (p,)
        "page_ids": plan.page_ids,  # (p,)
        "decode_slots": plan.decode_slots.astype(np.int64),  # (d,)
        "decode_query_starts": np.arange(decodes + 1, dtype=np.int32),  # (d + 1,) among the step's tokens
        "decode_ends": plan.decode_lens + 1,  # (d,) tokens in the cache, the new one included
        "prefill_slots": plan.prefill_slots.astype(np.int64),  # (c,)
        "prefill_query_starts": np.concatenate([[0], ends]).astype(np.int32),  # (c + 1,) among the t, and t
        "prefill_ends": plan.prefill_starts + lens,  # (c,) tokens in the cache, the new ones included
        "prefill_tokens": plan.prefill_tokens,  # (t,)
        "slots": np.concatenate([plan.decode_slots, np.repeat(plan.prefill_slots, lens)]).astype(np.int64),  # (d + t,)
        "positions": np.concatenate([plan.decode_lens, positions]).astype(np.int32),  # (d + t,)
        "logits_indices": np.concatenate(wanted).astype(np.int64),  # (n + q,) among the step's d + t tokens
        "sampled_slots": plan.sampled_slots.astype(np.int64),  # (n,)
    }
    return upload(arrays, device)
