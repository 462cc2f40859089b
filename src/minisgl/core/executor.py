"""The executor for one device: a GPU's stream, or on the CPU a thread in place of one."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from minisgl.core.logits import StepOutput
from minisgl.core.model_runner import ModelRunner
from minisgl.core.plan import Masks, Scores, StepPlan, StepResult

T = TypeVar("T")
CheckAlive = Callable[[], None]
Moment = float | torch.cuda.Event

# How often a rank that waits for a step asks whether the others are alive: on the CPU, and on a GPU, where steps take
# milliseconds and the next one is in the stream already.
ALIVE_SECONDS, POLL_SECONDS = 0.1, 2e-5


@dataclass
class LaunchedStep:
    """A step that is not collected yet. Its results are on the host once `output` and `copied` are done."""

    plan: StepPlan
    output: Future[StepOutput] = field(init=False)
    copied: torch.cuda.Event | None = None
    moments: list[Moment] = field(default_factory=list)  # the device's, at the beginning and end of a timed step


class LocalExecutor:
    """Runs plans on the runner's device. `attention_choice` names the attention backends and why they were chosen.

    With tensor parallelism `alive` raises when the group is broken; it is called while a result is waited for.
    """

    def __init__(self, runner: ModelRunner, attention_choice: str = "torch", alive: CheckAlive | None = None) -> None:
        self.runner = runner
        self.device = runner.device
        self.attention_choice = attention_choice
        self.kernels = runner.decoder.ops.name
        self._alive = alive
        self._clock = DeviceClock(runner.device)
        self._worker = ThreadPoolExecutor(1, "minisgl-step") if self.device.type == "cpu" else None
        self._steps: deque[LaunchedStep] = deque()

    @property
    def num_pages(self) -> int:
        return self.runner.kv.num_pages

    def launch(self, plan: StepPlan) -> None:
        step = LaunchedStep(plan)
        step.output = self._start(lambda: self._run(step))
        self._steps.append(step)

    def finish(self, masks: Masks) -> None:
        step = self._steps[-1]
        launched = step.output
        step.output = self._start(lambda: self._end(step, self.runner.finish(step.plan, launched.result(), masks)))

    def collect(self) -> StepResult:
        step = self._steps.popleft()
        while self._alive is not None and not step.output.done():
            self._alive()
            wait([step.output], ALIVE_SECONDS)
        output, device = step.output.result(), None
        if step.copied is not None:
            while self._alive is not None and not step.copied.query():  # type: ignore[no-untyped-call]
                self._alive()
                time.sleep(POLL_SECONDS)
            step.copied.synchronize()
        if step.moments:
            began, ended = map(self._clock.seconds, step.moments)
            device = began, ended
        scores, prompt_scores = _each(output.scores, Tensor.numpy), _each(output.prompt_scores, Tensor.numpy)
        return StepResult(
            step=step.plan.step, tokens=output.tokens.numpy(), scores=scores, prompt_scores=prompt_scores, device=device
        )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        else:
            torch.cuda.synchronize(self.device)
            self.runner.graphs, self.runner.forward = [], self.runner.decoder.forward

    def _start(self, work: Callable[[], StepOutput]) -> Future[StepOutput]:
        if self._worker is not None:
            return self._worker.submit(work)
        done: Future[StepOutput] = Future()  # a GPU's stream has the work when this returns
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    def _run(self, step: LaunchedStep) -> StepOutput:
        if step.plan.timed:
            step.moments.append(self._clock.now())
        output = self.runner.run(step.plan)
        return output if len(step.plan.constrained_slots) else self._end(step, output)

    def _end(self, step: LaunchedStep, output: StepOutput) -> StepOutput:
        """Note when a step ends, and on a GPU start the copy of its results to the host."""
        if step.plan.timed:
            step.moments.append(self._clock.now())
        if self._worker is not None:
            return output
        no_logits = output.tokens[:0]  # the next step may take their memory
        scores, prompt_scores = _each(output.scores, _pinned), _each(output.prompt_scores, _pinned)
        copied = StepOutput(_pinned(output.tokens), no_logits, scores, prompt_scores)
        step.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        step.copied.record()
        return copied


class DeviceClock:
    """The moments at which a device reaches what it was told, on the host's monotonic clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero: tuple[float, torch.cuda.Event] | None = None  # one moment on both clocks

    def now(self) -> Moment:
        if self._device.type == "cpu":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        if self._zero is None:
            event.synchronize()
            self._zero = time.monotonic(), event
        return event

    def seconds(self, moment: Moment) -> float:
        if isinstance(moment, float):
            return moment
        assert self._zero is not None
        host, zero = self._zero
        return host + float(zero.elapsed_time(moment)) / 1e3


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _each(scores: Scores[Tensor] | None, convert: Callable[[Tensor], T]) -> Scores[T] | None:
    return None if scores is None else Scores(*map(convert, scores))
