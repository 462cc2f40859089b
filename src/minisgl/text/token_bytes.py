"""The bytes that one token stands for, also where they are a part of a character."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"
"""U+2581, a space in SentencePiece's vocabularies."""


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2, Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@functools.cache
def byte_of_character() -> Mapping[str, int]:
    """The byte that each of those characters stands for."""
    return {character: byte for byte, character in enumerate(byte_characters())}


class TokenBytes:
    """The bytes of each token of a vocabulary. A token at the start of a text may lose its space there."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {i: token.content.encode() for i, token in backend.get_added_tokens_decoder().items()}
        kinds = decoder_types(backend)
        self._byte_level = "ByteLevel" in kinds
        self._byte_tokens = "ByteFallback" in kinds

    def __call__(self, token: int) -> bytes:
        """The bytes of a token id; none for an id outside the vocabulary."""
        if (added := self._added.get(token)) is not None:
            return added
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            table = byte_of_character()
            return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        if self._byte_tokens and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text.replace(SPACE, " ").encode()


def decoder_types(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """The types of a tokenizer's decoder and of what it is composed of."""
    if backend.decoder is None:
        return frozenset()
    found: list[str] = []
    todo: list[dict[str, Any]] = [json.loads(backend.decoder.__getstate__())]
    while todo:
        part = todo.pop()
        found.append(part["type"])
        todo += part.get("decoders", [])
    return frozenset(found)
