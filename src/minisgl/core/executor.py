"""The executor for one device: a GPU's stream, or on the CPU a thread in place of one."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from minisgl.core.logits import StepOutput
from minisgl.core.model_runner import ModelRunner
from minisgl.core.plan import Masks, Scores, StepPlan, StepResult

P = ParamSpec("P")
T = TypeVar("T")
CheckAlive = Callable[[], None]
Moment = float | torch.cuda.Event

# How often a rank that waits for a step asks whether the others are alive: on the CPU, and on a GPU, where steps take
# milliseconds and the next one is in the stream already.
ALIVE_SECONDS, POLL_SECONDS = 0.1, 2e-5


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
        self._pending: deque[PendingStep] = deque()
        # The step that waits for its masks, and when it began.
        self._unmasked: tuple[StepPlan, Future[StepOutput], Future[Moment] | None] | None = None

    @property
    def num_pages(self) -> int:
        return self.runner.kv.num_pages

    def launch(self, plan: StepPlan) -> None:
        assert self._unmasked is None, "the step before waits for its masks"
        began = self._start(self._clock.now) if plan.timed else None
        output = self._start(self.runner.run, plan)
        if len(plan.constrained_slots):
            self._unmasked = plan, output, began
        else:
            self._fetch(plan.step, output, began)

    def finish(self, masks: Masks) -> None:
        assert self._unmasked is not None, "no step waits for masks"
        (plan, output, began), self._unmasked = self._unmasked, None
        self._fetch(plan.step, self._start(lambda: self.runner.finish(plan, output.result(), masks)), began)

    def collect(self) -> StepResult:
        step = self._pending.popleft()
        while self._alive is not None and not step.output.done():
            self._alive()
            wait([step.output], ALIVE_SECONDS)
        output, device = step.output.result(), None
        if step.copied is not None:
            while self._alive is not None and not step.copied.query():  # type: ignore[no-untyped-call]
                self._alive()
                time.sleep(POLL_SECONDS)
            step.copied.synchronize()
        if step.moments is not None:
            began, ended = (self._clock.seconds(moment.result()) for moment in step.moments)
            device = began, ended
        scores, prompt_scores = _each(output.scores, Tensor.numpy), _each(output.prompt_scores, Tensor.numpy)
        return StepResult(
            step=step.number, tokens=output.tokens.numpy(), scores=scores, prompt_scores=prompt_scores, device=device
        )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        else:
            torch.cuda.synchronize(self.device)
            self.runner.graphs, self.runner.forward = [], self.runner.decoder.forward

    def _start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._worker is not None:
            return self._worker.submit(work, *args, **kwargs)
        done: Future[T] = Future()  # a GPU's stream has the work when this returns
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done

    def _fetch(self, step: int, output: Future[StepOutput], began: Future[Moment] | None) -> None:
        """Start the copy of a step's results to the host."""
        moments = None if began is None else (began, self._start(self._clock.now))
        copied = None
        if self._worker is None:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            output = self._start(_copy_to_host, output, copied)
        self._pending.append(PendingStep(step, output, copied, moments))


class DeviceClock:
    """The moments at which a device reaches what it was told, on the host's monotonic clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero: tuple[float, torch.cuda.Event] | None = None  # one moment on both clocks

    def now(self) -> Moment:
        """Note the moment at which the device gets here."""
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


@dataclass(frozen=True)
class PendingStep:
    """A launched step. Its results are on the host once `output` and `copied` are done."""

    number: int
    output: Future[StepOutput]
    copied: torch.cuda.Event | None
    moments: tuple[Future[Moment], Future[Moment]] | None  # the device's, at its beginning and end


def _copy_to_host(output: Future[StepOutput], copied: torch.cuda.Event) -> StepOutput:
    result = output.result()
    no_logits = result.tokens[:0]  # the next step may take their memory
    scores, prompt_scores = _each(result.scores, _pinned), _each(result.prompt_scores, _pinned)
    pinned = StepOutput(_pinned(result.tokens), no_logits, scores, prompt_scores)
    copied.record()
    return pinned


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _each(scores: Scores[Tensor] | None, convert: Callable[[Tensor], T]) -> Scores[T] | None:
    return None if scores is None else Scores(*map(convert, scores))
