from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_tokenizers import byte_fallback_json, byte_level_json, write_tokenizer
from minisgl.errors import InvalidRequestError
from minisgl.text.chat_template import cut_after
from minisgl.text.token_bytes import byte_of_character
from minisgl.text.tokenizer import Tokenizer, make_standin

BYTE_LEVEL = Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json()), tokens={})
BYTE_FALLBACK = Tokenizer(tokenizers.Tokenizer.from_str(byte_fallback_json()), tokens={})


def joined(tokenizer: Tokenizer, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str) -> None:
    assert joined(BYTE_LEVEL, text) == text
    if text:
        assert joined(BYTE_FALLBACK, text).replace("▁", " ") == " " + text.replace("▁", " ")


def test_every_byte_has_one_character() -> None:
    assert sorted(byte_of_character().values()) == list(range(256))
    assert byte_of_character()["Ġ"] == 0x20


def test_special_tokens_are_their_text_and_unknown_ids_nothing() -> None:
    assert BYTE_LEVEL.token_bytes(1) == b"</s>"
    assert BYTE_LEVEL.token_bytes(10**6) == b""
    assert BYTE_FALLBACK.token_bytes(3 + 0xE4) == b"\xe4"


def test_a_standin_has_bytes_too() -> None:
    tokenizer = make_standin(400)
    assert joined(tokenizer, "Grüße 世界") == "Grüße 世界"


@given(st.text(alphabet="aé世😀 <s>x", max_size=20))
@settings(max_examples=200, deadline=None)
def test_tokens_start_where_their_text_does(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    starts = BYTE_LEVEL.starts(ids, text)
    assert starts == sorted(starts)
    for index, (token, start) in enumerate(zip(ids, starts, strict=True)):
        whole = BYTE_LEVEL.token_bytes(token)
        follows = starts[index + 1] if index + 1 < len(ids) else len(text)
        if whole == text[start:follows].encode():
            continue
        # A part of a character begins where that character does.
        assert b"".join(map(BYTE_LEVEL.token_bytes, ids[:index])).startswith(text[:start].encode())


def test_a_bos_that_the_text_does_not_show_takes_no_room(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, add_bos=True))
    ids = tokenizer.encode("ab")
    assert ids[0] == 0
    assert tokenizer.starts(ids, "ab")[:2] == [0, 0]
    assert tokenizer.encode("ab", add_special_tokens=False) == ids[1:]


@pytest.mark.parametrize(
    ("rendered", "content", "expected"),
    [
        ("u: hi\na: so far<end>\n", "so far", "u: hi\na: so far"),
        ("a: x\na: so far <end>", "so far ", "a: x\na: so far "),
        ("a: so far<end>", " so far ", "a: so far"),
        ("a: one, one<end>", "one", "a: one, one"),
    ],
)
def test_a_conversation_is_cut_after_its_last_content(rendered: str, content: str, expected: str) -> None:
    assert cut_after(rendered, content) == expected


@pytest.mark.parametrize("content", ["", "  \n", "not shown"])
def test_what_is_not_shown_cannot_be_continued(content: str) -> None:
    with pytest.raises(InvalidRequestError, match="no content that can be continued"):
        cut_after("a: other<end>", content)
