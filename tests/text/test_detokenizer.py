from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_tokenizers import byte_fallback_json, byte_level_json
from minisgl.core.types import FinishReason, SamplingParams, TokenEvent
from minisgl.text.tokenizer import TextStream, Tokenizer, shown_tokens

TEXTS = ("Hello, 世界! 😀👩‍👩‍👧 naïve  café", " leading and trailing ", "a\n\n\tb", "🏳️‍🌈" * 3, "��", "")


def load(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), tokens={})


BYTE_LEVEL = load(byte_level_json())
BYTE_FALLBACK = load(byte_fallback_json())
LETTERS = {letter: BYTE_LEVEL.encode(letter)[0] for letter in "abxSTOP"}
FALLBACK = {token: BYTE_FALLBACK.backend.get_vocab()[token] for token in ("a", "h", "▁b", "▁he")} | {
    byte: 3 + byte for byte in (0x61, 0x62, 0xC3, 0xA9, 0xBD, 0xE4, 0xFF)
}


def collect(stream: TextStream, ids: Sequence[int], cuts: Sequence[int] = ()) -> str:
    """Push `ids` in pieces that end at `cuts`, and finish."""
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    text = "".join(stream.push(ids[start:end]) for start, end in pairwise(bounds)) + stream.finish()
    assert stream.text == text
    return text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_encoded_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert collect(tokenizer.stream(SamplingParams()), ids) == tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 420), max_size=60), st.lists(st.integers(0, 60), max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_what_decode_says_for_any_ids(ids: list[int], cuts: list[int], skip: bool) -> None:
    stream = BYTE_LEVEL.stream(SamplingParams(skip_special_tokens=skip))
    assert collect(stream, ids, cuts) == BYTE_LEVEL.decode(ids, skip)
    assert stream.num_tokens == len(ids)


@given(st.lists(st.text(alphabet=st.sampled_from("ab he.世😀é"), max_size=6), max_size=8))
@settings(max_examples=200, deadline=None)
def test_byte_fallback_pieces_join_to_what_decode_says(words: list[str]) -> None:
    ids = [token for word in words for token in BYTE_FALLBACK.encode(word)]
    assert collect(BYTE_FALLBACK.stream(SamplingParams()), ids) == BYTE_FALLBACK.decode(ids)


@given(st.lists(st.integers(0, 280), max_size=40))
@settings(max_examples=200, deadline=None)
def test_behind_a_broken_byte_run_the_text_is_what_decode_says(ids: list[int]) -> None:
    """A run of byte tokens that turns out invalid changes text that was shown already; what follows still comes."""
    text, decoded = collect(BYTE_FALLBACK.stream(SamplingParams()), ids), BYTE_FALLBACK.decode(ids)
    assert len(text) == len(decoded)
    assert text.rpartition("\ufffd")[2] == decoded.rpartition("\ufffd")[2]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ((0xE4, 0xBD, "a", "▁b"), ("", "", "\ufffd\ufffda", " b", "")),
        (("a", 0x61, 0xFF, "▁b", "▁he", "h"), ("a", "a", "", "\ufffd b", " he", "h", "")),
        (("a", 0x61, 0x62, 0xFF, 0x61, "▁b", 0xC3, 0xA9), ("a", "a", "b", "", "", "\ufffd\ufffd b", "", "é", "")),
        (("a", 0x61, 0xFF), ("a", "a", "", "\ufffd")),
    ],
)
def test_a_broken_byte_run_comes_once_and_the_next_tokens_whole(
    tokens: Sequence[str | int], pieces: Sequence[str]
) -> None:
    stream = BYTE_FALLBACK.stream(SamplingParams())
    assert (*(stream.push([FALLBACK[token]]) for token in tokens), stream.finish()) == pieces


def test_half_a_character_is_held_back_and_at_the_end_a_replacement() -> None:
    ids = BYTE_LEVEL.encode("🧮")
    assert len(ids) > 1
    stream = BYTE_LEVEL.stream(SamplingParams())
    assert [stream.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["🧮"]
    assert stream.push(ids[:-1]) == ""
    assert "\ufffd" in stream.finish()


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    ids = BYTE_LEVEL.encode(text := "<|im_start|>hi<|im_end|>")
    assert collect(BYTE_LEVEL.stream(SamplingParams()), ids) == "hi"
    assert collect(BYTE_LEVEL.stream(SamplingParams(), keep=["<|im_end|>"]), ids) == "hi<|im_end|>"
    assert collect(BYTE_LEVEL.stream(SamplingParams(skip_special_tokens=False)), ids) == text


def cut_at_first_completed(text: str, stops: Sequence[str]) -> str:
    """The plain twin: scan the text character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


ALPHABET = "ab世😀 "


@given(
    st.text(alphabet=ALPHABET, max_size=40),
    st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 60), max_size=6),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_whatever_the_token_split(text: str, stops: list[str], cuts: list[int]) -> None:
    expected = cut_at_first_completed(text, stops)
    for ids in (BYTE_LEVEL.encode(text), [t for character in text for t in BYTE_LEVEL.encode(character)]):
        stream = BYTE_LEVEL.stream(SamplingParams(stop=tuple(stops)))
        assert collect(stream, ids, cuts) == expected
        assert stream.stopped == (expected != text)


@pytest.mark.parametrize(
    ("text", "params", "pieces", "rest", "matched", "num_tokens"),
    [
        ("aSTOPb", SamplingParams(stop=("STOP",)), ["a", "", "", "", "", ""], "", "STOP", 5),
        ("STOaST", SamplingParams(stop=("STOP",)), ["", "", "", "STOa", "", ""], "ST", None, 6),
        ("abxabx", SamplingParams(stop=("ab",), min_tokens=3), ["", "ab", "x", "", "", ""], "", "ab", 5),
    ],
    ids=["held back, then cut", "shown where it does not come", "does not act before min_tokens"],
)
def test_a_stop_string_over_several_tokens(
    text: str, params: SamplingParams, pieces: list[str], rest: str, matched: str | None, num_tokens: int
) -> None:
    stream = BYTE_LEVEL.stream(params)
    assert [stream.push([LETTERS[letter]]) for letter in text] == pieces
    assert (stream.finish(), stream.matched, stream.num_tokens) == (rest, matched, num_tokens)


def test_the_stop_token_is_no_part_of_the_text() -> None:
    shown = {end: shown_tokens(TokenEvent(id="a", tokens=(5, 6), finish=end)) for end in (*FinishReason, None)}
    assert [end for end, tokens in shown.items() if tokens != (5, 6)] == [FinishReason.STOP]
    assert shown[FinishReason.STOP] == (5,)


def test_long_streams_take_linear_time() -> None:
    assert collect(BYTE_LEVEL.stream(SamplingParams()), [1] * 200_000) == ""  # hidden tokens
    ids = random.Random(0).choices(range(400), k=3000)
    assert collect(BYTE_LEVEL.stream(SamplingParams()), ids, range(0, 3000, 7)) == BYTE_LEVEL.decode(ids)
