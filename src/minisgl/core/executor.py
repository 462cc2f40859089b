"""The executor for one device: a GPU's stream, or a thread that stands in for one on the CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from minisgl.core.logits import StepOutput, TokenScores
from minisgl.core.model_runner import Runner
from minisgl.core.plan import Masks, Scores, StepPlan, StepResult

ALIVE_SECONDS = 0.1
"""How often a rank that waits for a step on the CPU asks whether the others are alive."""
POLL_SECONDS = 2e-5
"""The same on a GPU, where a step of some milliseconds is waited for; the next one is in its stream already."""


class LocalExecutor:
    """Runs plans on the runner's device. `attention_choice` says which attention backends run, and why.

    On one rank of several `alive` raises when the group is broken; it is asked while a result is waited for.
    """

    def __init__(
        self, runner: Runner, attention_choice: str = "torch", alive: Callable[[], None] | None = None
    ) -> None:
        self.runner = runner
        self.device = runner.device
        self.attention_choice = attention_choice
        self.kernels = runner.decoder.ops.name
        self._alive = alive
        self._worker = ThreadPoolExecutor(1, "minisgl-step") if self.device.type == "cpu" else None
        self._results: deque[Callable[[], StepResult]] = deque()
        self._half: tuple[StepPlan, Callable[[], StepOutput]] | None = None  # launched, and to be finished

    @property
    def num_pages(self) -> int:
        """KV pages the scheduler may hand out."""
        return self.runner.kv.num_pages

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
            self.runner.decode_graphs = self.runner.piecewise_graphs = None


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
