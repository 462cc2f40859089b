"""/tokenize, /detokenize and /tokenizer_info: what the model's tokenizer makes of a text, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pydantic_core

from minisgl.errors import InvalidRequestError
from minisgl.server.native import DetokenizeRequest, TokenizeConversation, TokenizeText
from minisgl.server.prompts import render

if TYPE_CHECKING:
    from minisgl.server.preparation import Preparation


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """A text's tokens; `token_strs` are their names in the vocabulary, where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What clients need to know of the tokenizer to work with /tokenize: special tokens, and the chat template."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """What tokens say."""

    prompt: str


def tokenize(preparation: Preparation, body: bytes) -> Tokens:
    """The tokens of a text or a conversation; raises InvalidRequestError."""
    asked: TokenizeConversation | TokenizeText
    if has_messages(body):
        asked = TokenizeConversation.parse(body)
        asked.check_continuation()
        text, field = render(preparation.tokenizer, preparation.template, asked, list(asked.tools or ())), "messages"
    else:
        asked = TokenizeText.parse(body)
        text, field = asked.prompt, "prompt"
    preparation.check_model(asked.model)
    try:
        ids = preparation.tokenizer.encode(text, asked.with_special_tokens)
    except InvalidRequestError as error:
        error.param = error.param or field
        raise
    names = [preparation.tokenizer.backend.id_to_token(token) for token in ids] if asked.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=preparation.model.max_seq_len, tokens=ids, token_strs=names)


def detokenize(preparation: Preparation, body: bytes) -> Text:
    """The text of tokens; raises InvalidRequestError."""
    asked = DetokenizeRequest.parse(body)
    preparation.check_model(asked.model)
    if any(not 0 <= token < preparation.model.vocab_size for token in asked.tokens):
        raise InvalidRequestError(f"token ids must be between 0 and {preparation.model.vocab_size - 1}", param="tokens")
    return Text(prompt=preparation.tokenizer.decode(asked.tokens, bool(asked.skip_special_tokens)))


def tokenizer_info(preparation: Preparation) -> TokenizerInfo:
    """The tokenizer, as its configuration file names things."""
    template = preparation.tokenizer.chat_template
    named = {
        name: preparation.tokenizer.tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return TokenizerInfo(
        **named,
        chat_template=None if template is None else template.source,
        vocab_size=preparation.model.vocab_size,
        model_max_length=preparation.model.max_seq_len,
    )


def has_messages(body: bytes) -> bool:
    """Whether this is a JSON object with messages; what is no JSON is found out later."""
    try:
        value: Any = pydantic_core.from_json(body)
    except ValueError:
        return False
    return isinstance(value, dict) and "messages" in value
