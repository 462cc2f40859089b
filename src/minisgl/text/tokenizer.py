"""Text to token ids and back, through the `tokenizers` library; `transformers` is imported only as a fallback.

A tokenizer for a model of random weights that comes without one: its answers mean nothing, but can be streamed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minisgl.core.types import SamplingParams
from minisgl.errors import InvalidRequestError, ModelError
from minisgl.text.chat_template import NO_TEMPLATE, ChatTemplate, cut_after, read_template
from minisgl.text.detokenizer import TextStream
from minisgl.text.token_bytes import TokenBytes, byte_characters

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a checkpoint and its chat template. Safe to use from several threads.

    `tokens` are the checkpoint's named special tokens; `template` is the source of its chat template, if it has one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...] = (),
        template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.tokens = tokens
        self.eos_token_ids = eos_token_ids
        self._special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._chat = None if template is None else ChatTemplate(template, tokens)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether a folder holds a tokenizer."""
        return any((folder / name).is_file() for name in TOKENIZER_FILES)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a checkpoint's tokenizer. Raises ModelError, naming the file, when there is none or it is broken."""
        config = read_json(folder / "tokenizer_config.json")
        tokens = {**special_tokens(read_json(folder / "special_tokens_map.json")), **special_tokens(config)}
        backend = load_backend(folder)
        eos = [backend.token_to_id(tokens["eos_token"])] if "eos_token" in tokens else []
        eos += as_list(read_json(folder / "generation_config.json").get("eos_token_id"))
        ids = tuple(dict.fromkeys(i for i in eos if isinstance(i, int)))
        return cls(backend, tokens=tokens, eos_token_ids=ids, template=read_template(folder, config))

    @functools.cached_property
    def vocab_size(self) -> int:
        """The highest token id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of single tokens."""
        return TokenBytes(self.backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat is not None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template, if the model has one."""
        return self._chat

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with BOS where the model's post-processor adds one.

        Raises InvalidRequestError for text that is no valid Unicode.
        """
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """A conversation as the model's text. Raises InvalidRequestError when there is no template or it refuses."""
        return self._require_chat().render(messages, add_generation_prompt, **template_kwargs)

    def render_continued(self, messages: Sequence[Mapping[str, Any]], /, **template_kwargs: Any) -> str:
        """A conversation that ends within its last message, for the model to go on there; raises as `render_chat`."""
        return cut_after(
            self._require_chat().render(messages, False, **template_kwargs), str(messages[-1].get("content") or "")
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation. The template alone says which special tokens it has, so BOS never doubles."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **template_kwargs)
        return self._encode(text, add_special_tokens=False)

    def stream(self, params: SamplingParams, keep: Sequence[str] = ()) -> TextStream:
        """An incremental decoder for one request; the special tokens in `keep` are shown even where others are not."""
        hidden = (i for i, text in self._special.items() if text not in keep) if params.skip_special_tokens else ()
        return TextStream(self.backend, frozenset(hidden), params)

    def starts(self, ids: Sequence[int], text: str) -> list[int]:
        """Where in `text`, that these tokens were made of, the text of each begins, in characters."""
        hidden = frozenset(i for i, content in self._special.items() if content not in text)
        stream = TextStream(self.backend, hidden, SamplingParams())
        stream.push(ids)
        return [min(start, len(text)) for start in stream.starts]

    def _require_chat(self) -> ChatTemplate:
        if self._chat is None:
            raise InvalidRequestError(NO_TEMPLATE, param="messages")
        return self._chat

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}"
            ) from error
        # `encode` can hold the interpreter's lock for seconds on a long text; the batch form does not.
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json as it is; without one, whatever `transformers` converts the folder's files to."""
    if (file := folder / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more exact
            raise ModelError(f"{file}: not a tokenizer: {error}") from error
    if not Tokenizer.exists(folder):
        raise ModelError(f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        ).backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be read: {error}") from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one. Raises ModelError naming the file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: not a JSON object")
    return value


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of a configuration, each a string or an object with `content`."""
    found: dict[str, str] = {}
    for name in TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def as_list(value: Any) -> list[Any]:
    """A list as it is, nothing for None, anything else alone in a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def make_standin(vocab_size: int) -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, any other id n is a space and its number; no id is special.

    So every text can be encoded, a token a byte, and every token has a text. Where the vocabulary is smaller than 256,
    bytes beyond it are dropped.
    """
    names = {character: byte for byte, character in enumerate(byte_characters())}
    names |= {f"\u0120{number}": number for number in range(256, vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE({name: i for name, i in names.items() if i < vocab_size}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, tokens={})
