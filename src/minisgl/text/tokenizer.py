"""Text to token ids, and back while tokens are still coming, through the `tokenizers` library."""

import dataclasses
import functools
import importlib
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from msgspec.structs import replace
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from minisgl.core.model_config import optional_fields, require_file
from minisgl.core.types import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from minisgl.errors import NO_PANICS, InvalidRequestError, ModelError, is_panic
from minisgl.text.chat_template import ChatTemplate, cut_after, read_templates, text_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MAX_CONTEXT = 64  # tokens at the end of a prompt that are looked at for a context
Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """The tokenizer of a checkpoint and its `chat_template`, if it has one. Safe to use from several threads."""

    kind = "PreTrainedTokenizerFast"  # the class that transformers has for it

    def __init__(
        self, backend: tokenizers.Tokenizer, *, tokens: dict[str, str], templates: Mapping[str, str] = {}
    ) -> None:
        self.backend = backend
        self.tokens = tokens  # the checkpoint's named special ones
        default = templates.get("default") or next(iter(templates.values()), "")
        tool_use = templates.get("tool_use") or default
        self.chat_template = ChatTemplate(default, tokens) if default else None
        self.tool_template = self.chat_template if tool_use == default else ChatTemplate(tool_use, tokens)
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = {i: token.content for i, token in added.items() if token.special}
        state = b"" if backend.decoder is None else backend.decoder.__getstate__()
        self._decoders = frozenset(re.findall(rb'"type":"(\w+)"', state))  # of the decoder and its parts, as JSON

    @classmethod
    def exists(cls, folder: Path) -> bool:
        return any((folder / name).exists() for name in TOKENIZER_FILES)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a checkpoint's tokenizer. Raises ModelError, naming the file, when there is none or it is broken."""
        config = optional_fields(folder / "tokenizer_config.json").values
        map_values = optional_fields(folder / "special_tokens_map.json").values
        tokens = {**special_tokens(map_values), **special_tokens(config)}
        loaded = cls(load_backend(folder), tokens=tokens, templates=read_templates(folder, config))
        loaded.kind = str(config.get("tokenizer_class") or cls.kind)
        return loaded

    @functools.cached_property
    def longest_token(self) -> int:  # in characters
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def template_for(self, tools: bool) -> ChatTemplate | None:
        return self.tool_template if tools else self.chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with BOS where the model adds one. Raises InvalidRequestError for text that is
        no valid Unicode, or too much for the tokenizer.
        """
        try:
            text.encode()
            # `encode` can hold the interpreter's lock for seconds on a long text; the batch form does not.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except UnicodeEncodeError as error:
            reason = f"the text is not valid Unicode: a lone surrogate at character {error.start}"
            raise InvalidRequestError(reason) from error
        except BaseException as error:
            if is_panic(error):
                raise InvalidRequestError(f"the tokenizer cannot take this text: {error}") from error
            raise

    @NO_PANICS
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> str:
        """The text of `ids` where they follow a prompt, or begin a text. Ids outside the vocabulary have no text."""
        context = self._context(prompt, self._special if skip_special_tokens else ())
        text = self.backend.decode([*context, *ids], skip_special_tokens=skip_special_tokens)
        return text[len(self.backend.decode(context, skip_special_tokens=False)) :] if context else text

    def _context(self, prompt: Sequence[int], hidden: Container[int]) -> list[int]:
        """A prompt's last token of whole characters: without it a decoder may drop the space before what follows."""
        for token in prompt[: -MAX_CONTEXT - 1 : -1]:
            text = self.token_bytes(token).decode(errors="replace")
            if text and "\ufffd" not in text and token not in hidden:
                return [token]
        return []

    def with_bad_words(self, params: SamplingParams) -> SamplingParams:
        """The same parameters with the tokens of `bad_words`, each at the beginning of a text and behind a space."""
        texts = {text for word in params.bad_words for text in (word, " " + word.lstrip())}
        ids = {tuple(self.encode(text, add_special_tokens=False)) for text in texts} - {()}
        return replace(params, bad_word_ids=(*params.bad_word_ids, *sorted(ids))) if ids else params

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character; empty for an id outside the vocabulary."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        text = self.backend.id_to_token(token) or ""
        if b"ByteLevel" in self._decoders:
            table = byte_of_character()
            return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        if b"ByteFallback" in self._decoders and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text.replace("▁", " ").encode()

    def render_chat(
        self, messages: Messages, /, *, add_generation_prompt: bool = True, continue_final_message: bool = False,
        **template: Any,
    ) -> str:  # fmt: skip
        """A conversation as the model's text. Raises InvalidRequestError when there is no template or it refuses."""
        chosen = self.template_for(bool(template.get("tools")))
        if chosen is None:
            reason = "this model has no chat template: it is a base model, use /v1/completions with a plain prompt"
            raise InvalidRequestError(reason, param="messages")
        text = chosen.render(messages, add_generation_prompt and not continue_final_message, **template)
        return cut_after(text, str(text_of(messages[-1].get("content")))) if continue_final_message else text

    def encode_chat(self, messages: Messages, /, **template: Any) -> list[int]:
        """Token ids of a conversation. The template alone writes special tokens, so BOS never doubles."""
        return self.encode(self.render_chat(messages, **template), add_special_tokens=False)

    def stream(self, params: SamplingParams, keep: Sequence[str] = (), prompt: Sequence[int] = ()) -> "TextStream":
        """An incremental decoder of what follows `prompt`; the special tokens in `keep` are always shown."""
        special = self._special.items() if params.skip_special_tokens else ()
        hidden = frozenset(i for i, text in special if text not in keep)
        return TextStream(self.backend, hidden, params, self._context(prompt, hidden))

    def starts(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each token's text begins in `text`, which these tokens were encoded from; in characters."""
        hidden = frozenset(i for i, content in self._special.items() if content not in text)
        stream = TextStream(self.backend, hidden, SamplingParams())
        stream.push(ids)
        return [min(start, len(text)) for start in stream.starts]


def make_byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer for a model that has none: its text means nothing, but can be streamed. Ids 0 to 255 are the bytes of
    UTF-8, any other id n is a space and its number; bytes beyond a smaller vocabulary are dropped.
    """
    names = {**byte_of_character(), **{f"\u0120{number}": number for number in range(256, vocab_size)}}
    backend = tokenizers.Tokenizer(models.BPE({name: i for name, i in names.items() if i < vocab_size}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, tokens={})


@functools.cache
def byte_of_character() -> Mapping[str, int]:
    """The byte that each printable character of a byte-level vocabulary stands for (GPT-2, Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, or what `transformers` converts the folder's other files to; it truncates and pads nothing."""
    backend: Any
    if (file := folder / "tokenizer.json").exists():
        require_file(file)
        try:
            with NO_PANICS:
                backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more exact
            raise ModelError(f"{file}: not a tokenizer: {error}") from error
    else:
        backend = convert_tokenizer(folder)
    assert isinstance(backend, tokenizers.Tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def convert_tokenizer(folder: Path) -> Any:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise ModelError(f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    for file in files:
        require_file(file)
    if files[0].suffix == ".model" and files[0].read_bytes()[:1] == b"\n":  # as a message of protobuf begins
        try:
            for package in ("sentencepiece", "google.protobuf"):
                importlib.import_module(package)
        except ImportError as error:
            needed = "needs a tokenizer.json beside it, or the packages sentencepiece and protobuf"
            raise ModelError(f"{files[0]}: a SentencePiece model, which {needed}") from error
    from transformers import AutoTokenizer  # seconds that other models need not wait

    try:
        with NO_PANICS:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            backend = found.backend_tokenizer
    except Exception as error:  # of any of the packages that it converts with
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{files[0]}: the tokenizer cannot be read: {reason}") from error
    if len(backend.get_vocab()) <= len(backend.get_added_tokens_decoder()):
        raise ModelError(f"{files[0]}: the tokenizer cannot be read: transformers finds no tokens in it")
    return backend


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    values = {name: config.get(name) for name in TOKEN_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class TextStream:
    """The texts that `push` and `finish` return, joined, are what `Tokenizer.decode` says of all tokens, cut where the
    stop string that is completed first (`matched`) begins, or ends if it is to be shown; further tokens are ignored.
    `hidden` are token ids that have no text; `context` are tokens before the first.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, hidden: frozenset[int], params: SamplingParams, context: Sequence[int] = ()
    ) -> None:
        self.num_characters = 0  # decoded, those held back included
        self.starts: list[int] = []  # characters before each token taken in, with that which completed a stop string
        self.matched: str | None = None
        self._backend = backend
        self._hidden = hidden
        self._params = params
        self._context = list(context)
        self._decoder = DecodeStream(ids=self._context, skip_special_tokens=False)
        self._ids: list[int] = []
        self._pending = False  # the last tokens have given no text yet
        self._held = ""  # decoded, but it may begin a stop string
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._shown)

    @NO_PANICS
    def push(self, tokens: Sequence[int]) -> str:
        before = len(self._shown)
        for token in tokens:
            if self.matched is not None:
                break
            self.starts.append(self.num_characters)
            if token not in self._hidden and (piece := self._decode(token)):
                self._take(piece)
        return "".join(self._shown[before:])

    @NO_PANICS
    def finish(self) -> str:
        """What was held back, when the request ended for another reason than a stop string."""
        before = len(self._shown)
        if self._pending and self.matched is None:
            self._take(self._rest())
        if self.matched is None:
            self._shown.append(self._held)
        return "".join(self._shown[before:])

    def _decode(self, token: int) -> str:
        """The text that `token` completes; empty while its end may be half a character."""
        self._ids.append(token)
        try:
            piece = self._decoder.step(self._backend, token) or ""
        except Exception:  # the decoder's own type: earlier text changed, as byte-fallback runs can
            piece = self._rest()
            self._decoder = DecodeStream(ids=[token], skip_special_tokens=False)
        self._pending = not piece
        self.num_characters += len(piece)
        return piece

    def _rest(self) -> str:
        before = len(self._backend.decode(self._context, skip_special_tokens=False))
        text = self._backend.decode(self._context + self._ids, skip_special_tokens=False)
        return text[before + self.num_characters :]

    def _take(self, piece: str) -> None:
        """Show what cannot belong to a stop string any more; a match must end inside `piece`."""
        if not self._params.stop:
            self._shown.append(piece)
            return
        text = self._held + piece
        # (end, start, stop string) of each one that is completed within `piece`
        at = ((text.find(stop, max(0, len(self._held) - len(stop) + 1)), stop) for stop in self._params.stop)
        matches = [(start + len(stop), start, stop) for start, stop in at if start >= 0]
        if matches and len(self.starts) >= self._params.min_tokens:
            end, start, self.matched = min(matches)  # the one completed first; of several, the longest
            safe = end if self._params.include_stop_str_in_output else start
            self._held = ""
        else:
            safe = len(text) - max(partial_end(text, stop) for stop in self._params.stop)
            self._held = text[safe:]
        if safe:
            self._shown.append(text[:safe])


def partial_end(text: str, marker: str) -> int:
    """The length of the longest end of `text` that is a beginning of `marker`, but not all of it."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """What has come of one request; with a `stream` its text too, cut at stop strings."""

    request: Request
    stream: TextStream | None
    finish: FinishReason | None = None
    matched: int | str | None = None  # the stop token or string that ended it
    error: str | None = None
    cached_tokens: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    shown_ids: list[int] = dataclasses.field(default_factory=list)  # without a stop token that is not to be shown
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=list)

    @property
    def stop_reason(self) -> int | str | None:
        known = isinstance(self.matched, str) or self.matched in self.request.params.stop_token_ids
        return self.matched if known else None

    def take(self, event: TokenEvent) -> str:
        """Take in an event; the new text. A stop string sets `finish` before the engine knows: nothing follows it."""
        if self.finish is not None:
            return ""
        self.finish, self.error, self.cached_tokens = event.finish, event.error, event.cached_tokens
        taken = shown = event.tokens
        if event.finish is FinishReason.STOP:
            self.matched = taken[-1] if taken else None
            shown = taken if self.request.params.include_stop_str_in_output else taken[:-1]
        text = ""
        if self.stream is not None:
            before = len(self.stream.starts)
            text = self.stream.push(shown)
            if self.stream.matched is not None:
                self.finish, self.matched = FinishReason.STOP, self.stream.matched
                taken = taken[: len(self.stream.starts) - before]
            elif self.finish is not None:
                text += self.stream.finish()
        self.token_ids += taken
        self.shown_ids += shown
        self.logprobs += event.logprobs[: len(taken)]
        self.prompt_logprobs += event.prompt_logprobs
        return text
