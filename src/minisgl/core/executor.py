"""The executor for one device: a GPU's stream, or a thread that stands in for one on the CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from minisgl.core.logits import StepOutput, TokenScores
from minisgl.core.model_runner import ModelRunner
from minisgl.core.plan import Masks, Scores, StepPlan, StepResult

P = ParamSpec("P")
T = TypeVar("T")

ALIVE_SECONDS = 0.1
"""How often a rank that waits for a step on the CPU asks whether the others are alive."""
POLL_SECONDS = 2e-5
"""The same on a GPU, where a step of some milliseconds is waited for; the next one is in its stream already."""


class LocalExecutor:
    """Runs plans on the runner's device. `attention_choice` names the attention backends and why they were chosen.

    On one rank of several `alive` raises when the group is broken; it is asked while a result is waited for.
    """

    def __init__(
        self, runner: ModelRunner, attention_choice: str = "torch", alive: Callable[[], None] | None = None
    ) -> None:
        self.runner = runner
        self.device = runner.device
        self.attention_choice = attention_choice
        self.kernels = runner.decoder.ops.name
        self._alive = alive
        self._worker = ThreadPoolExecutor(1, "minisgl-step") if self.device.type == "cpu" else None
        self._pending: deque[Pending] = deque()
        self._unmasked: tuple[StepPlan, Future[StepOutput]] | None = None  # the step that waits for its masks

    @property
    def num_pages(self) -> int:
        return self.runner.kv.num_pages

    def launch(self, plan: StepPlan) -> None:
        """Start a step behind those already started."""
        assert self._unmasked is None, "the step before waits for its masks"
        output = self._start(self.runner.run, plan)
        if len(plan.constrained_slots):
            self._unmasked = plan, output
        else:
            self._fetch(plan.step, output)

    def finish(self, masks: Masks) -> None:
        """Start the second half of the step launched last."""
        assert self._unmasked is not None, "no step waits for masks"
        (plan, output), self._unmasked = self._unmasked, None
        self._fetch(plan.step, self._start(self._finish, plan, output, masks))

    def collect(self) -> StepResult:
        """Wait for the oldest step and return its tokens, or raise what it raised."""
        return self._pending.popleft().wait(self._alive)

    def close(self) -> None:
        """Wait for every launched step, and give the graphs up."""
        if self._worker is not None:
            self._worker.shutdown()
        else:
            torch.cuda.synchronize(self.device)
            self.runner.decode_graphs = self.runner.piecewise_graphs = None

    def _finish(self, plan: StepPlan, output: Future[StepOutput], masks: Masks) -> StepOutput:
        return self.runner.finish(plan, output.result(), masks)

    def _start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have the device do this. A GPU's stream has it when this returns; what it raises is in the future."""
        if self._worker is not None:
            return self._worker.submit(work, *args, **kwargs)
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done

    def _fetch(self, step: int, output: Future[StepOutput]) -> None:
        """Start the copy of a step's results to the host."""
        if self._worker is not None:
            self._pending.append(Pending(step, output, None))
            return
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending.append(Pending(step, self._start(_copy_to_host, output, copied), copied))


class Pending:
    """A launched step whose results are on their way to the host: there once `output` and `copied` are done."""

    def __init__(self, step: int, output: Future[StepOutput], copied: torch.cuda.Event | None) -> None:
        self.step = step
        self.output = output
        self.copied = copied

    def wait(self, alive: Callable[[], None] | None) -> StepResult:
        """The results, or what the step raised, or what `alive` raises meanwhile."""
        while alive is not None and not self.output.done():
            alive()
            wait([self.output], ALIVE_SECONDS)
        output = self.output.result()
        if self.copied is not None:
            while alive is not None and not self.copied.query():  # type: ignore[no-untyped-call]
                alive()
                time.sleep(POLL_SECONDS)
            self.copied.synchronize()
        return StepResult(
            step=self.step,
            tokens=output.tokens.numpy(),
            scores=_numbers(output.scores),
            prompt_scores=_numbers(output.prompt_scores),
        )


def _copy_to_host(output: Future[StepOutput], copied: torch.cuda.Event) -> StepOutput:
    """Start copies to pinned memory, and record `copied` behind them."""
    there = output.result()
    no_logits = there.tokens[:0]  # the next step may take their memory
    here = StepOutput(
        _pinned(there.tokens), no_logits, _pinned_scores(there.scores), _pinned_scores(there.prompt_scores)
    )
    copied.record()
    return here


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _pinned_scores(scores: TokenScores | None) -> TokenScores | None:
    return None if scores is None else TokenScores(*map(_pinned, scores))


def _numbers(scores: TokenScores | None) -> Scores | None:
    return None if scores is None else Scores(*(tensor.numpy() for tensor in scores))
