"""The offline API: the engine in this process, prompts in, completions out."""

import dataclasses
import itertools
import operator
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from numbers import Integral
from types import FrameType
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minisgl.build import build_engine
from minisgl.config import Config, make_config
from minisgl.core.types import Request, SamplingParams, TokenEvent, TokenLogprobs
from minisgl.errors import ConfigError, InvalidRequestError
from minisgl.text.tokenizer import RequestOutput, Tokenizer

Message = dict[str, Any]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]
Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
Step = list[tuple[RequestOutput, TokenEvent, str]]  # with the text that an event adds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The output for one prompt; log-probabilities where they were asked for."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop", "length" or "error"
    prompt_token_ids: list[int]
    cached_tokens: int  # of the prompt
    logprobs: list[TokenLogprobs] | None = None  # of each of `token_ids`
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of each of `prompt_token_ids`, None for the first
    stop_reason: int | str | None = None  # the stop string or the one of `stop_token_ids` that ended it
    error: str | None = None  # how a grammar failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What a step adds to a completion; the last one carries `finish_reason`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None


class LLM(AbstractContextManager["LLM"]):
    """A model, loaded and ready. Keyword arguments are the fields of `Config`; or `config` gives them all.

    Not thread-safe. Raises ConfigError or ModelError when the model cannot be served as asked.

        with LLM("Qwen/Qwen3-0.6B") as llm:
            print(llm.generate(["The capital of France is"])[0].text)
    """

    def __init__(
        self, model: str | None = None, *, config: Config | None = None, progress: bool = True, **settings: Any
    ) -> None:
        if config is not None and (model is not None or settings):
            raise ConfigError("LLM takes a config or the fields of one, not both")
        self.config = config or make_config(model=model, **settings)
        built = build_engine(self.config, progress=progress)
        self.engine, self.notes, self.model = built.engine, built.notes, built.engine.model
        self.tokenizer = Tokenizer.load(built.folder) if Tokenizer.exists(built.folder) else None
        self._ids = itertools.count()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def generate(self, prompts: Prompts, sampling_params: Params = None, *, progress: bool = True) -> list[Completion]:
        """Complete every prompt (texts, or lists of token ids), in their order; all run together.

        One `SamplingParams` serves all prompts, a sequence gives each its own. Raises InvalidRequestError before
        anything is generated when one of them cannot be served. Ctrl-C ends the completions after the current step,
        and the model can be used again.
        """
        several: list[Any] = [prompts] if isinstance(prompts, (str, bytes, dict)) else list(prompts)
        if several and isinstance(several[0], Integral):  # the ids of one
            several = [several]
        params = SamplingParams() if sampling_params is None else sampling_params
        each = [with_types(params)] * len(several) if isinstance(params, SamplingParams) else [*map(with_types, params)]
        if len(each) != len(several):
            raise InvalidRequestError(f"{len(several)} prompts, but {len(each)} sampling_params")
        outputs = [self._output(prompt, p, bool(p.stop)) for prompt, p in zip(several, each, strict=True)]
        self._run(outputs, progress)
        return [self._completion(output) for output in outputs]

    def chat(
        self, messages: Conversations, sampling_params: Params = None, *, progress: bool = True, **template: Any
    ) -> list[Completion]:
        """Complete one conversation, or several, through the model's chat template; `template` goes to it."""
        conversations: Any = [messages] if len(messages) == 0 or isinstance(messages[0], dict) else messages
        prompts = [self.text.encode_chat(list(conversation), **template) for conversation in conversations]
        return self.generate(prompts, sampling_params, progress=progress)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Complete one prompt, a delta a step. Closing the iterator early aborts the request."""
        params = with_types(sampling_params or SamplingParams())
        output = self._output(prompt, params, bool(params.stop) or self.tokenizer is not None)
        with closing(self._steps([output])) as steps:
            for step in steps:
                for _, event, text in step:
                    yield Delta(text=text, token_ids=event.tokens, finish_reason=output.finish)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer; raises InvalidRequestError when the model has none."""
        if self.tokenizer is None:
            raise InvalidRequestError("this model's folder has no tokenizer: give prompts as token ids")
        return self.tokenizer

    def _require_idle(self) -> None:
        if self.engine.has_work:
            raise InvalidRequestError("another completion is still being streamed: finish or close it first")

    def _output(self, prompt: Prompt, params: SamplingParams, decodes: bool) -> RequestOutput:
        ids = self.text.encode(prompt) if isinstance(prompt, str) else as_ids(prompt)
        params = self.text.with_bad_words(params.validate()) if params.bad_words else params
        ids = self.model.truncate(ids, params)
        self.model.check(ids, params)
        request = Request.make(str(next(self._ids)), ids, params)
        return RequestOutput(request, self.text.stream(params, prompt=request.prompt) if decodes else None)

    def _run(self, outputs: Sequence[RequestOutput], progress: bool) -> None:
        rate = TextColumn("{task.fields[rate]}")
        columns = TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), rate
        display = Progress(*columns, console=Console(stderr=True), disable=not progress)
        with display as bar, closing(self._steps(outputs)) as steps:
            task = bar.add_task("", total=len(outputs), rate="")
            generated = ended = 0
            for step in steps:
                generated += sum(len(event.tokens) for _, event, _ in step)
                ended += sum(output.finish is not None for output, _, _ in step)
                elapsed = bar.tasks[task].elapsed or 0.0
                bar.update(task, completed=ended, rate=f"{generated / elapsed:,.0f} tok/s" if elapsed > 0 else "")

    def _steps(self, outputs: Sequence[RequestOutput]) -> Generator[Step, None, None]:
        """Run all to their end: what comes of each in a step. When this ends, nothing is in the engine."""
        self._require_idle()
        unfinished = {output.request.id: output for output in outputs}
        try:
            for output in outputs:
                with defer_sigint():
                    self.engine.add(output.request)
            while unfinished:
                step: Step = []
                with defer_sigint():
                    for event in self.engine.step():
                        if event.id not in unfinished:  # it has ended, by a stop string
                            continue
                        output = unfinished[event.id]
                        step.append((output, event, output.take(event)))
                        if output.finish is not None:
                            del unfinished[event.id]
                            if event.finish is None:
                                self.engine.abort([event.id])
                    while not unfinished and self.engine.has_work:  # who sees the last delta may ask anew
                        self.engine.step()
                yield step
        finally:
            with defer_sigint():
                self.engine.abort(unfinished)
                while self.engine.has_work:
                    self.engine.step()

    def _completion(self, output: RequestOutput) -> Completion:
        params, prompt = output.request.params, output.request.prompt
        text = "" if output.stream is None else output.stream.text
        if output.stream is None and self.tokenizer is not None:
            text = self.tokenizer.decode(output.shown_ids, params.skip_special_tokens, prompt)
        return Completion(
            text=text,
            token_ids=output.token_ids,
            finish_reason=str(output.finish),
            prompt_token_ids=prompt.tolist(),
            cached_tokens=output.cached_tokens,
            logprobs=None if params.logprobs is None else output.logprobs,
            prompt_logprobs=None if params.prompt_logprobs is None else output.prompt_logprobs,
            stop_reason=output.stop_reason,
            error=output.error,
        )


def as_ids(prompt: Iterable[Any]) -> list[int]:
    """A prompt's ids, of any integer type. Raises InvalidRequestError for anything else."""
    try:
        if isinstance(prompt, bytes):
            raise TypeError("bytes are neither")
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise InvalidRequestError(f"a prompt is text or token ids: {error}", param="prompt") from error


def with_types(params: SamplingParams) -> SamplingParams:
    """The same with numpy's values as Python's. Raises InvalidRequestError for one that is not of its field's type."""
    try:
        fields = msgspec.structs.asdict(params)
        plain = msgspec.to_builtins(fields, enc_hook=lambda v: v.tolist() if hasattr(v, "tolist") else list(v))
        return msgspec.convert(plain, SamplingParams)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequestError(f"sampling parameters: {error}") from error


@contextmanager
def defer_sigint() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block; a second one is not deferred.

    After a step that an exception interrupts the engine is broken. Only the main thread has a Ctrl-C to defer.
    """
    handler = signal.getsignal(signal.SIGINT)
    pending: list[FrameType | None] = []

    def defer(number: int, frame: FrameType | None) -> None:
        pending.append(frame)
        if len(pending) > 1 and callable(handler):
            handler(number, frame)

    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pending:
        handler(signal.SIGINT, pending[0])
