"""The executor for one device: a GPU's stream, or a thread that stands in for one on the CPU.

The device may be one of a tensor-parallel group: then `spec` and weights are its share, and the decoder's operations
add up what the ranks computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.attention import GraphBackend
from minisgl.core.decoder import Decoder, pack_weights
from minisgl.core.kv_cache import allocate_kv
from minisgl.core.logits import StepOutput, TokenScores
from minisgl.core.model_config import ModelSpec
from minisgl.core.model_runner import Runner
from minisgl.core.ops import Operations
from minisgl.core.plan import Masks, Scores, StepPlan, StepResult
from minisgl.core.weights import Weights, dummy_weights, load_weights
from minisgl.distributed.collectives import TPGroup
from minisgl.distributed.select import Equipment, equip
from minisgl.distributed.shard import cutter, local_spec
from minisgl.gpu.attention.select import Shape, make_attention
from minisgl.gpu.cuda_graphs import largest_piece
from minisgl.gpu.memory import available_memory, measure_pages, require_pages_fit, require_weights_fit
from minisgl.gpu.operations import operations_for

ALIVE_SECONDS = 0.1
"""How often a rank that waits for a step on the CPU asks whether the others are alive."""
POLL_SECONDS = 2e-5
"""The same on a GPU, where a step of some milliseconds is waited for; the next one is in its stream already."""
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LocalExecutor:
    """Runs plans on `config.device` with weights that lie there. `config` is resolved and says `num_pages`.

    On one rank of several `alive` raises when the group is broken; it is asked while a result is waited for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        config: Config,
        max_seq_len: int,
        ops: Operations | None = None,
        alive: Callable[[], None] | None = None,
    ) -> None:
        assert config.num_pages is not None
        assert config.max_running_requests is not None
        self.device = torch.device(config.device)
        dtype = TORCH_DTYPES[config.dtype]
        max_seq_len = min(max_seq_len, config.num_pages * config.page_size)
        kv = allocate_kv(
            spec.num_layers, config.num_pages, config.page_size, spec.num_kv_heads, spec.head_dim, dtype, self.device
        )
        attention, choice = make_attention(config.attn, attention_shape(spec, config), self.device)
        ops = ops or operations_for(self.device, spec.hidden_size)
        decoder = Decoder(spec, weights, attention, max_seq_len, ops)
        self.equipment: Equipment | None = None
        self._alive = alive
        self.runner = Runner(decoder, kv, config.max_running_requests, max_seq_len, self.device)
        self.attention_choice = str(choice)
        self.kernels = ops.name
        if config.cuda_graph_max_bs and isinstance(attention.decode, GraphBackend):
            self.runner.capture_graphs(config.cuda_graph_max_bs, max_seq_len)
        elif config.cuda_graph_max_bs:
            self.attention_choice += "; its decode cannot be captured, so there are no CUDA graphs"
        if tokens := largest_piece(config):
            self.runner.capture_pieces(tokens)
        self._num_pages = config.num_pages
        self._worker = ThreadPoolExecutor(1, "minisgl-step") if self.device.type == "cpu" else None
        self._results: deque[Callable[[], StepResult]] = deque()
        self._half: tuple[StepPlan, Callable[[], StepOutput]] | None = None  # launched, and to be finished

    @property
    def num_pages(self) -> int:
        """KV pages the scheduler may hand out."""
        return self._num_pages

    def launch(self, plan: StepPlan) -> None:
        """Start a step behind those already started."""
        assert self._half is None, "the step before waits for its masks"
        output = self._start(lambda: self.runner.run(plan))
        if len(plan.constrained_slots):
            self._half = plan, output
        else:
            self._results.append(self._fetch(plan.step, output))

    def finish(self, masks: Masks) -> None:
        """Start the tail of the step launched last."""
        assert self._half is not None, "no step waits for masks"
        (plan, first), self._half = self._half, None
        self._results.append(self._fetch(plan.step, self._start(lambda: self.runner.finish(plan, first(), masks))))

    def _start(self, work: Callable[[], StepOutput]) -> Callable[[], StepOutput]:
        """Have the device do this; the function returned gives what it leaves there, or raises what it raised.

        It is for later work and for `collect`: on the CPU it waits.
        """
        if self._worker is not None:
            future = self._worker.submit(work)
            return lambda: _await(future, self._alive)
        try:
            output = work()
        except Exception as error:
            return _raiser(error)
        return lambda: output

    def _fetch(self, step: int, output: Callable[[], StepOutput]) -> Callable[[], StepResult]:
        """Start the copy of a step's results to the host; the function returned waits for it."""
        if self._worker is not None:
            return lambda: _result(step, output())
        try:
            return _copy(step, output(), self._alive)
        except Exception as error:
            return _raiser(error)

    def collect(self) -> StepResult:
        """Wait for the oldest step and return its tokens, or raise what it raised."""
        return self._results.popleft()()

    def close(self) -> None:
        """Wait for every launched step, and give the graphs up."""
        if self._worker is not None:
            self._worker.shutdown()
        else:
            torch.cuda.synchronize(self.device)
            self.runner.graphs = self.runner.pieces = None


def _await(output: Future[StepOutput], alive: Callable[[], None] | None) -> StepOutput:
    while alive is not None and not wait([output], ALIVE_SECONDS).done:
        alive()
    return output.result()


def _copy(step: int, output: StepOutput, alive: Callable[[], None] | None) -> Callable[[], StepResult]:
    """Start copies to pinned memory, with an event behind them that the function returned waits for."""

    def pinned(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def scores(there: TokenScores | None) -> TokenScores | None:
        return None if there is None else TokenScores(*map(pinned, there))

    no_logits = output.tokens[:0]  # the next step may take their memory
    here = StepOutput(pinned(output.tokens), no_logits, scores(output.scores), scores(output.prompt_scores))
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def fetch() -> StepResult:
        while alive is not None and not done.query():  # type: ignore[no-untyped-call]
            alive()
            time.sleep(POLL_SECONDS)
        done.synchronize()
        return _result(step, here)

    return fetch


def _result(step: int, output: StepOutput) -> StepResult:
    """The numbers of an output on the host."""

    def numbers(scores: TokenScores | None) -> Scores | None:
        return None if scores is None else Scores(*(tensor.numpy() for tensor in scores))

    return StepResult(
        step=step,
        tokens=output.tokens.numpy(),
        scores=numbers(output.scores),
        prompt_scores=numbers(output.prompt_scores),
    )


def _raiser(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def attention_shape(spec: ModelSpec, config: Config) -> Shape:
    """What the attention backends must be able to compute."""
    return Shape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=TORCH_DTYPES[config.dtype],
        page_size=config.page_size,
    )


def build_local_executor(
    config: Config,
    folder: Path,
    spec: ModelSpec,
    max_seq_len: int,
    progress: bool = False,
    group: TPGroup | None = None,
    alive: Callable[[], None] | None = None,
) -> LocalExecutor:
    """Load the model in `folder`, or make weights up where `config.dummy_weight`, and size the KV cache.

    `config` is resolved. On a rank of a group only its share is loaded, and every rank gets the pages that fit on all.
    Raises ModelError for weights that cannot be read, ConfigError when memory does not suffice.
    """
    device, dtype = torch.device(config.device), TORCH_DTYPES[config.dtype]
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    share, cut = local_spec(spec, size), None if group is None else cutter(spec, rank, size)
    require_pages_fit(config, share, dtype)
    ops, equipment = operations_for(device, spec.hidden_size), None
    if group is not None:
        equipment = equip(config, group, spec, ops, dtype)
        ops = equipment.operations
    before = available_memory(device)
    require_weights_fit(spec, dtype, device, cut)
    if config.dummy_weight:
        weights = dummy_weights(spec, dtype, device, cut=cut)
    else:
        weights = load_weights(folder, spec, dtype, device, progress, cut)
    pack_weights(weights)
    attention, _ = make_attention(config.attn, attention_shape(share, config), device)
    decoder = Decoder(share, weights, attention, max_seq_len, ops)
    num_pages = measure_pages(config, decoder, dtype, max_seq_len, before)
    if group is not None:
        num_pages = group.least(num_pages)
    executor = LocalExecutor(share, weights, config.replace(num_pages=num_pages), max_seq_len, ops, alive)
    executor.equipment = equipment
    return executor
