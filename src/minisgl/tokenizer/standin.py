"""A tokenizer for a model of random weights that comes without one: its answers mean nothing, but can be streamed."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minisgl.tokenizer.token_bytes import byte_characters
from minisgl.tokenizer.tokenizer import Tokenizer


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
