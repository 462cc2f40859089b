"""What every endpoint works with, and the work that is done off the event loop: parse, render, tokenise, check."""

from __future__ import annotations

import dataclasses
import secrets
import time
import uuid
from collections.abc import Sequence

import msgspec

from minisgl.errors import InvalidRequestError, ModelNotFoundError
from minisgl.server.protocol import ChatRequest, CompletionRequest
from minisgl.server.service import EngineService
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import ModelInfo, Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Api:
    """One served model. `created` is a Unix time in s, `health_timeout` in s."""

    service: EngineService
    model: ModelInfo
    tokenizer: Tokenizer
    health_timeout: float = 5.0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def prepare_chat(self, body: bytes) -> tuple[ChatRequest, list[Request]]:
        """A chat request and what goes to the engine for it; raises InvalidRequestError."""
        chat = ChatRequest.parse(body)
        self.check_model(chat.model)
        params = chat.params()
        messages = [message.for_template() for message in chat.messages]
        try:
            prompt = self.tokenizer.encode_chat(messages, **chat.template_variables())
            return chat, self.requests("chatcmpl", [prompt], params)
        except InvalidRequestError as error:
            if error.param in (None, "prompt"):
                error.param = "messages"
            raise

    def prepare_completion(self, body: bytes) -> tuple[CompletionRequest, list[Request]]:
        """A completion request and what goes to the engine for it; raises InvalidRequestError."""
        completion = CompletionRequest.parse(body)
        self.check_model(completion.model)
        params = completion.params()
        try:
            prompts = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in completion.prompts()]
            return completion, self.requests("cmpl", prompts, params)
        except InvalidRequestError as error:
            error.param = error.param or "prompt"
            raise

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for any other model than the one served; none named means that one."""
        if name is not None and name != self.model.name:
            raise ModelNotFoundError(f"the model {name!r} is not served here; {self.model.name!r} is", param="model")

    def requests(self, kind: str, prompts: Sequence[list[int]], params: SamplingParams) -> list[Request]:
        """Checked requests whose ids are the answer's id and an index. Without a seed each gets one of its own."""
        base = f"{kind}-{uuid.uuid4().hex}"
        for prompt in prompts:
            self.model.check(prompt, params)
        return [
            Request(id=f"{base}-{index}", prompt=prompt, params=with_seed(params))
            for index, prompt in enumerate(prompts)
        ]


def with_seed(params: SamplingParams) -> SamplingParams:
    """The parameters with a seed, so that what follows is a function of the request."""
    return params if params.seed is not None else msgspec.structs.replace(params, seed=secrets.randbits(63))
