"""CUDA graphs: a step is one graph, of decodes alone or with prompts.

Where attention of prompts cannot be captured, their steps are a graph for each part between two attentions.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisgl.config import Config
from minisgl.core.attention import PlannedAttention
from minisgl.core.decoder import Decoder, ForwardBatch
from minisgl.core.kv_cache import DeviceTables, KVCache, upload
from minisgl.core.logits import StepOutput
from minisgl.core.plan import EMPTY, Int32, StepPlan
from minisgl.gpu.attention.interface import (
    SHARED_PAIRS,
    DeviceBackend,
    DeviceBatch,
    GraphBackend,
    GraphDecode,
    are_even,
    decode_batch,
    static_step,
)

CAPTURE_MODE = "relaxed"  # kernels may be loaded meanwhile, and other threads may query events
MAX_CHUNKS = 64  # of prompts in a captured step beside decodes
FEW_CHUNKS = 8  # in one without: logits for 256 rows, and decode attention for none, take 0.3 ms on an H200
ALONE_TOKENS = 512  # up to which that matters: a prompt on an idle server
IN_FLIGHT = 4  # buffers on the host for what steps send: more than there are steps launched and not collected

Work = Callable[[], object]
Capture = Callable[[Work], Work]  # makes of some work what repeats it


def done_once(work: Work) -> Work:
    """Libraries start, and workspaces appear, when the largest step is done for the first time, before any capture."""
    work()
    return work


def captured(pool: Any, work: Work) -> Work:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=CAPTURE_MODE):
        work()
    return graph.replay


def host_buffers(count: int, device: torch.device) -> Iterator[Tensor]:
    """For each step int32 (count,) on the host, from which a GPU copies while the host goes on."""
    on_gpu = device.type == "cuda"
    return itertools.cycle([torch.zeros(count, dtype=torch.int32, pin_memory=on_gpu) for _ in range(IN_FLIGHT)])


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, each eighth to 128, each sixteenth beyond, and `largest`; none above it."""
    sizes = {1, 2, 4, *range(8, 128, 8), *range(128, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass
class DecodeStep:
    """A decode step of B rows: the tensors whose addresses its graph knows, kept alive."""

    changes: Tensor  # int32 (3, B), on the device: slots, and the index and id of a new page or -1
    batch: ForwardBatch
    rows: DeviceBatch
    attention: GraphDecode
    tokens: Tensor = field(init=False)  # int32 (B,)


class DecodeGraphs:
    """Graphs from gathered rows to sampled tokens, over one runner's tables and cache, for each of `graph_sizes`.

    They are captured when this is made, largest first. The host sends `changes` and replays the smallest graph that
    holds a step, padded with the tables' last row, whose page is scratch. All sizes write their logits to one buffer
    outside the graphs' memory, where logits processors find them. Where one of many rows is far longer than the others,
    a graph of the largest size shares out its work. `capture`: CUDA graphs in one memory pool by default.
    """

    def __init__(
        self, decoder: Decoder, kv: KVCache, tables: DeviceTables, largest: int, max_seq_len: int,
        capture: Capture | None = None,
    ) -> None:  # fmt: skip
        assert isinstance(decoder.attention.decode, GraphBackend)
        self.decoder, self.kv, self.tables = decoder, kv, tables
        self.backend, self.max_seq_len = decoder.attention.decode, max_seq_len
        self.padding = len(tables.length) - 1
        self.sizes = graph_sizes(largest)
        head = decoder.weights.head
        assert isinstance(head, torch.Tensor)
        self.logits = torch.empty((largest, len(head)), dtype=head.dtype, device=head.device)
        self._hosts = host_buffers(3 * largest, head.device)
        capture = capture or partial(captured, torch.cuda.graph_pool_handle())
        self.kv_heads = kv.k.shape[3]
        self._capture(largest, done_once, even=False)
        shares = isinstance(self.backend, DeviceBackend) and largest * self.kv_heads > SHARED_PAIRS
        self.uneven = self._capture(largest, capture, even=False) if shares else None
        self.steps = {size: self._capture(size, capture) for size in reversed(self.sizes)}

    def takes(self, plan: StepPlan) -> bool:
        """Whether the plan is a decode step that fits a graph."""
        rows = len(plan.decode_slots)
        return plan.init is None and len(plan.prefill_slots) == 0 and 0 < rows <= self.sizes[-1]

    def run(self, plan: StepPlan) -> StepOutput:
        """Replay the plan's step; the output is valid until the next step."""
        rows = len(plan.decode_slots)
        size = self.sizes[bisect.bisect_left(self.sizes, rows)]
        step, replay = self.steps[size]
        if self.uneven and rows * self.kv_heads > SHARED_PAIRS and not are_even(plan.decode_lens, self.kv_heads):
            size, (step, replay) = self.sizes[-1], self.uneven
        step.changes.copy_(self._write_changes(plan, rows, size), non_blocking=True)
        lens = np.ones(size, np.int32)
        lens[:rows] = plan.decode_lens + 1
        step.attention.prepare(lens)
        replay()
        return StepOutput(step.tokens[:rows], self.logits[:rows])

    def _write_changes(self, plan: StepPlan, rows: int, size: int) -> Tensor:
        host = next(self._hosts).numpy()[: 3 * size].reshape(3, size)
        host[0, :rows] = plan.decode_slots
        host[0, rows:] = self.padding
        host[1] = -1
        if len(plan.page_slots):
            row_of_slot = np.empty(self.padding, np.int32)
            row_of_slot[plan.decode_slots] = np.arange(rows, dtype=np.int32)
            row = row_of_slot[plan.page_slots]
            host[1, row] = plan.page_indices
            host[2, row] = plan.page_ids
        return torch.from_numpy(host)

    @torch.inference_mode()
    def _capture(self, size: int, capture: Capture, even: bool = True) -> tuple[DecodeStep, Work]:
        max_pages, device = self.tables.page_table.shape[1], self.tables.page_table.device
        ids, positions, kv_lens = (torch.zeros(size, dtype=torch.int32, device=device) for _ in range(3))
        slot_mapping = torch.zeros(size, dtype=torch.int64, device=device)
        page_table = torch.full((size, max_pages), self.kv.num_pages, dtype=torch.int32, device=device)
        batch = ForwardBatch(ids=ids, positions=positions, slot_mapping=slot_mapping, logits_indices=None)
        rows = decode_batch(page_table, kv_lens, self.max_seq_len, even)
        changes = torch.full((3, size), -1, dtype=torch.int32, device=device)
        changes[0] = self.padding
        step = DecodeStep(changes, batch, rows, self.backend.graph_decode(rows, self.kv))
        step.attention.prepare(np.ones(size, np.int32))
        work = partial(self._step, step)
        if not isinstance(self.backend, DeviceBackend):
            work()  # a first run plans
        return step, capture(work)

    def _step(self, step: DecodeStep) -> None:
        from minisgl.gpu.kernels.decode import commit_rows, gather_rows  # a machine without a GPU may lack triton

        gather_rows(step.changes, self.tables, step.batch, step.rows, self.kv.page_size)
        hidden = self.decoder.forward(step.batch, step.attention.attention, self.kv)
        logits = self.decoder.logits(hidden, self.logits[: len(hidden)])
        step.tokens = self.decoder.ops.sample(logits, self.tables.sampling, step.changes[0], step.rows.kv_lens)
        commit_rows(step.changes, step.tokens, self.tables, step.rows)


def piecewise_sizes(largest: int) -> list[int]:
    """Numbers of tokens to capture: a step is padded by half of its own tokens or by 15 at most. None for 0."""
    steps = (range(16, 64, 16), range(64, 128, 32), range(128, 512, 64), range(512, 1024, 128))
    sizes = {size for step in steps for size in step} | set(range(1024, largest + 1, 256)) | {largest}
    return sorted(size for size in sizes if 0 < size <= largest)


def piecewise_max_tokens(config: Config) -> int:
    """The most tokens that `config` asks for and a step with prompts can have; 0: no graphs."""
    if not config.piecewise_cuda_graph_max_tokens:
        return 0
    assert config.max_prefill_length is not None
    assert config.max_running_requests is not None
    return min(config.piecewise_cuda_graph_max_tokens, config.max_prefill_length + config.max_running_requests)


class MixedInputs:
    """What the host sends for a step of up to T tokens with prompts: views of one int32 buffer, by name.

    D decode rows, R sampled rows, C chunks and W new entries of page tables at most. What is not used names the tables'
    last row and the scratch page, and has no tokens.
    """

    def __init__(self, tokens: int, beside_decodes: bool, tables: DeviceTables, page_size: int) -> None:
        self.tokens, running = tokens, len(tables.length) - 1
        self.decodes = min(tokens, running) if beside_decodes else 0
        self.chunks = min(tokens, MAX_CHUNKS if beside_decodes else FEW_CHUNKS, running)
        self.rows = self.decodes or self.chunks
        self.pages = tokens // page_size + self.decodes + self.chunks
        self.sampling = vars(tables.sampling)
        widest = sorted(self.sampling.items(), key=lambda item: -item[1].itemsize)  # first, to be aligned
        sizes = {
            **{name: self.chunks * column[0].nbytes // 4 for name, column in widest},
            **dict.fromkeys(("ids", "slots", "positions"), tokens),  # id -1: the row's last token
            **dict.fromkeys(("page_slots", "page_indices", "page_ids"), self.pages),
            **dict.fromkeys(("decode_slots", "decode_ends"), self.decodes),
            **dict.fromkeys(("sampled_slots", "logits_indices"), self.rows),
            **dict.fromkeys(("chunk_slots", "chunk_ends", "new_slots"), self.chunks),
            "chunk_starts": self.chunks + 1,
        }
        ends = list(itertools.accumulate(sizes.values()))
        self.size = ends[-1]
        self.places = {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}

    def holds(self, plan: StepPlan) -> bool:
        """Whether a plan of at most `tokens` tokens fits, but for its page-table writes."""
        new = 0 if plan.init is None else len(plan.init.slots)
        return max(new, len(plan.prefill_slots)) <= self.chunks and len(plan.decode_slots) <= self.decodes

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        views = {name: buffer[place] for name, place in self.places.items()}
        for name, column in self.sampling.items():
            views[name] = views[name].view(column.dtype).view(self.chunks, *column.shape[1:])
        return views

    def write(self, host: Int32, plan: StepPlan, padding: int, scratch: int) -> None:
        """Write the plan to `host` int32 (size,). Its page-table writes are left out where they are more than W."""
        lens, decodes = plan.prefill_lens, len(plan.decode_slots)
        starts = np.concatenate([[0], np.cumsum(lens)])  # of the chunks, among the prompts' tokens
        total = decodes + int(starts[-1])

        def put(name: str, rest: int, *parts: NDArray[Any]) -> None:
            view, end = host[self.places[name]], 0
            for part in parts:
                view[end : end + len(part)] = part
                end += len(part)
            view[end:] = rest

        put("ids", 0, np.full(decodes, -1), plan.prefill_tokens)
        put("slots", padding, plan.decode_slots, np.repeat(plan.prefill_slots, lens))
        positions = np.arange(total - decodes) + np.repeat(plan.prefill_starts - starts[:-1], lens)
        put("positions", 0, plan.decode_lens, positions)
        most = self.pages if len(plan.page_ids) <= self.pages else 0
        put("page_slots", padding, plan.page_slots[:most])
        put("page_indices", 0, plan.page_indices[:most])
        put("page_ids", scratch, plan.page_ids[:most])
        put("decode_slots", padding, plan.decode_slots)
        put("decode_ends", 0, plan.decode_lens + 1)
        put("chunk_slots", padding, plan.prefill_slots)
        put("chunk_ends", 0, plan.prefill_starts + lens)
        put("chunk_starts", total, decodes + starts)
        put("sampled_slots", padding, plan.sampled_slots)
        put("logits_indices", 0, np.arange(decodes), decodes + starts[1:][plan.prefill_final] - 1)
        put("new_slots", padding, EMPTY if plan.init is None else plan.init.slots)
        for name, values in ({} if plan.init is None else plan.init.sampling).items():
            put(name, 0, values.reshape(-1).view(np.int32))  # the padding row may have any parameters


class MixedGraphs:
    """Graphs of whole steps with prompts, each for some number of tokens T; small ones also without decodes.

    As in `DecodeGraphs`, the host sends one buffer and replays the smallest graph that holds a step. Attention reads
    every length on the device; its maxima are those of the size. Log-probabilities of a prompt are not for these.
    `capture`: CUDA graphs in one memory pool by default.
    """

    def __init__(
        self, decoder: Decoder, kv: KVCache, tables: DeviceTables, largest: int, capture: Capture | None = None
    ) -> None:
        self.decoder, self.kv, self.tables = decoder, kv, tables
        self.padding, device = len(tables.length) - 1, tables.length.device
        head = decoder.weights.head
        assert isinstance(head, Tensor)
        self.logits = torch.empty((min(largest, self.padding), len(head)), dtype=head.dtype, device=device)
        self.tokens = torch.zeros(len(self.logits), dtype=torch.int32, device=device)
        kinds = [(size, beside) for size in piecewise_sizes(largest) for beside in (False, True)]
        inputs = [MixedInputs(*kind, tables, kv.page_size) for kind in kinds if kind[1] or kind[0] <= ALONE_TOKENS]
        self.sizes = [each.tokens for each in inputs]
        most = inputs[-1].size
        self.buffer = torch.zeros(most, dtype=torch.int32, device=device)
        self._hosts = host_buffers(most, device)
        capture = capture or partial(captured, torch.cuda.graph_pool_handle())
        self._capture(inputs[-1], done_once)
        self.steps = [(each, self._capture(each, capture)) for each in reversed(inputs)][::-1]

    def takes(self, plan: StepPlan) -> bool:
        wants_prompt = plan.logits is not None and len(plan.logits.prompt_rows) > 0
        return len(plan.prefill_slots) > 0 and not wants_prompt and self._step_for(plan) is not None

    def run(self, plan: StepPlan) -> StepOutput:
        """Replay the plan's step; the output is valid until the next step."""
        step, host = self._step_for(plan), next(self._hosts)
        assert step is not None
        inputs, replay = step
        if len(plan.page_ids) > inputs.pages:  # a long cached prefix
            places = {"slots": plan.page_slots.astype(np.int64), "indices": plan.page_indices.astype(np.int64)}
            new = upload({**places, "ids": plan.page_ids}, self.buffer.device)
            self.tables.page_table.index_put_((new["slots"], new["indices"]), new["ids"])
        inputs.write(host.numpy(), plan, self.padding, self.kv.num_pages)
        self.buffer[: inputs.size].copy_(host[: inputs.size], non_blocking=True)
        replay()
        sampled = len(plan.sampled_slots)
        return StepOutput(self.tokens[:sampled], self.logits[:sampled])

    def _step_for(self, plan: StepPlan) -> tuple[MixedInputs, Work] | None:
        first = bisect.bisect_left(self.sizes, plan.num_tokens)
        return next((step for step in self.steps[first : first + 2] if step[0].holds(plan)), None)

    @torch.inference_mode()
    def _capture(self, inputs: MixedInputs, capture: Capture) -> Work:
        host = next(self._hosts)[: inputs.size]
        inputs.write(host.numpy(), StepPlan(step=0), self.padding, self.kv.num_pages)
        self.buffer[: inputs.size].copy_(host)
        return capture(partial(self._step, inputs, inputs.views(self.buffer)))

    def _step(self, inputs: MixedInputs, step: dict[str, Tensor]) -> None:
        tables, kv, pages = self.tables, self.kv, self.tables.page_table
        # 1) Bring the tables up to date: new pages, and rows that start.
        pages.index_put_((step["page_slots"].long(), step["page_indices"].long()), step["page_ids"])
        new = step["new_slots"].long()
        for name, column in inputs.sampling.items():
            column.index_copy_(0, new, step[name])
        # 2) The step's tokens, and its rows for attention.
        slots, decode_slots, chunk_slots = (step[name].long() for name in ("slots", "decode_slots", "chunk_slots"))
        ids = torch.where(step["ids"] < 0, tables.last_token.index_select(0, slots), step["ids"])
        tables.length.index_copy_(0, decode_slots, step["decode_ends"])
        tables.length.index_copy_(0, chunk_slots, step["chunk_ends"])
        batch = ForwardBatch(
            ids=ids, positions=step["positions"],
            slot_mapping=tables.slot_mapping(slots, step["positions"], kv.page_size),
            logits_indices=step["logits_indices"].long(),
        )  # fmt: skip
        most = pages.shape[1] * kv.page_size
        decodes = decode_batch(pages.index_select(0, decode_slots), step["decode_ends"], most, even=False)
        ends, starts = step["chunk_ends"], step["chunk_starts"]
        chunks = DeviceBatch(pages.index_select(0, chunk_slots), ends, starts, inputs.tokens, most)
        # 3) The layers, and a token for each row that gets one.
        hidden = self.decoder.forward(batch, static_step(self.decoder.attention, decodes, chunks, kv), kv)
        logits = self.decoder.logits(hidden, self.logits[: inputs.rows])
        sampled = step["sampled_slots"].long()
        positions = tables.length.index_select(0, sampled)
        tokens = self.decoder.ops.sample(logits, tables.sampling, sampled, positions)
        tables.last_token.index_copy_(0, sampled, tokens)
        self.tokens[: inputs.rows].copy_(tokens)


@dataclass
class SplitStep:
    """A step of T tokens in parts, of which number i ends before the attention of layer i."""

    decoder: Decoder
    batch: ForwardBatch
    kv: KVCache
    queries: Tensor  # (T, H, hd) written by each part
    heads: Tensor  # (T, H, hd) the attention's result, read by the next part
    residual: Tensor = field(init=False)  # (T, D)

    def part(self, index: int) -> None:
        if index == 0:
            x, self.residual = self.decoder.embed(self.batch)
        else:
            x, self.residual = self.decoder.after_attention(index - 1, self.heads, self.residual, None)
        qkv, rope = self.decoder.before_attention(index, x, self.batch, self.kv)
        rope(qkv, out=self.queries)


class PiecewiseGraphs:
    """Graphs of all but attention for steps with prompts, captured when this is made, largest first.

    What prefill attention launches depends on lengths that only the host knows. All else depends on the number of
    tokens alone, and with few tokens launching it takes longer than running it.

    All sizes T use the first T elements of `ids` and `positions` int32 (largest,), `slot_mapping` int64 (largest,),
    `queries` (largest, H, hd), a layer's input to attention, and `heads`, its output. `capture`: CUDA graphs in one
    memory pool by default.
    """

    def __init__(self, decoder: Decoder, kv: KVCache, largest: int, capture: Capture | None = None) -> None:
        spec, table = decoder.spec, decoder.weights.embedding
        self.decoder, self.kv = decoder, kv
        self.scratch = kv.num_pages * kv.page_size
        self.ids, self.positions = torch.zeros((2, largest), dtype=torch.int32, device=table.device)
        self.slot_mapping = torch.full((largest,), self.scratch, dtype=torch.int64, device=table.device)
        self.queries = torch.zeros((largest, spec.num_heads, spec.head_dim), dtype=table.dtype, device=table.device)
        self.heads = torch.zeros_like(self.queries)
        self.sizes = piecewise_sizes(largest)
        capture = capture or partial(captured, torch.cuda.graph_pool_handle())
        self._capture(largest, done_once)
        # A step, and the replay of each of its parts.
        self.steps = {size: self._capture(size, capture) for size in reversed(self.sizes)}

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, attention: PlannedAttention, kv: KVCache) -> Tensor:
        """`Decoder.forward`; by graphs where the batch is a step with prompts that fits a size."""
        tokens = len(batch.ids)
        if batch.logits_indices is None or not 0 < tokens <= self.sizes[-1]:
            return self.decoder.forward(batch, attention, kv)
        size = self.sizes[bisect.bisect_left(self.sizes, tokens)]
        step, replays = self.steps[size]
        self.ids[:tokens].copy_(batch.ids)
        self.positions[:tokens].copy_(batch.positions)
        self.slot_mapping[:tokens].copy_(batch.slot_mapping)
        self.slot_mapping[tokens:size].fill_(self.scratch)
        queries, heads = self.queries[:tokens], self.heads[:tokens]
        for index, replay in enumerate(replays):
            replay()
            heads.copy_(attention.run(queries, index, self.decoder.spec.windows[index]))
        hidden, _ = self.decoder.after_attention(len(replays) - 1, heads, step.residual[:tokens], batch.logits_indices)
        assert isinstance(hidden, Tensor)
        return hidden

    @torch.inference_mode()
    def _capture(self, size: int, capture: Capture) -> tuple[SplitStep, list[Work]]:
        ids, positions, slot_mapping = self.ids[:size], self.positions[:size], self.slot_mapping[:size]
        batch = ForwardBatch(ids=ids, positions=positions, slot_mapping=slot_mapping, logits_indices=slot_mapping[:0])
        step = SplitStep(self.decoder, batch, self.kv, self.queries[:size], self.heads[:size])
        parts = [partial(step.part, index) for index in range(self.decoder.spec.num_layers)]
        return step, [capture(part) for part in parts]
