"""The tokenizer that is made up for models of random weights without one."""

from __future__ import annotations

import pytest

from minisgl.core.types import SamplingParams
from minisgl.errors import InvalidRequestError
from minisgl.text.tokenizer import make_standin

TEXT = "Grüße, 世界!\n\t😀 \x00"


def test_text_is_its_bytes_and_comes_back() -> None:
    tokenizer = make_standin(1000)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_every_other_token_is_its_number() -> None:
    tokenizer = make_standin(151_936)
    stream = tokenizer.stream(SamplingParams())
    pieces = [stream.push([token]) for token in (256, 151_935, *"ü".encode(), 2999)]
    assert pieces == [" 256", " 151935", "", "ü", " 2999"]


def test_a_small_vocabulary_has_the_first_bytes() -> None:
    tokenizer = make_standin(100)
    assert tokenizer.vocab_size == 100
    assert tokenizer.encode("AzB") == [65, 66]


def test_there_is_no_chat_template() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        make_standin(300).encode_chat([{"role": "user", "content": "hi"}])
