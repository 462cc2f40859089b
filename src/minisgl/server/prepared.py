"""What becomes of a request's body: requests for the engine, and how their answers are to look.

All of it travels between processes, so it is made of msgspec structs and of dataclasses that msgspec knows.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from minisgl.core.types import Request
from minisgl.server.reading import Reading

Kind = Literal["chat", "completion", "generate", "tokenize", "detokenize"]
"""What a body asks for."""


class Echo(msgspec.Struct, frozen=True):
    """A prompt as text, and where in it the text of each of its tokens begins, in characters."""

    text: str
    starts: list[int]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is to look. Of `copies` answers to each prompt `num_choices` are shown.

    `logprobs` shows those of the answer, `token_ids` writes tokens as `token_id:7`. With `hidden` only the prompt is
    shown. The last four are /generate's: a list of answers, the likeliest tokens, the prompt position from which
    log-probabilities are shown, and the texts of tokens beside them.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    num_choices: int = 1
    copies: int = 1
    hidden: bool = False
    logprobs: bool = False
    token_ids: bool = False
    is_batch: bool = False
    top_logprobs: bool = False
    prompt_logprobs_from: int | None = None
    logprob_texts: bool = False


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag="prepared"):
    """A request that generates. `reading` is for chats, `echoes` has each prompt that is to be shown.

    `grammar_field` is the field that the answer's grammar comes from; whether it can be enforced is not known yet.
    """

    requests: list[Request]
    wanted: Wanted
    reading: Reading = Reading()
    echoes: list[Echo] = []
    grammar_field: str | None = None


class Converted(msgspec.Struct, frozen=True, tag="converted"):
    """A request that generates nothing: the JSON of its whole answer."""

    json: bytes
