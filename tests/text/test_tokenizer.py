import itertools
import json
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from helpers.tiny_tokenizers import byte_fallback_json, byte_level_json, metaspace_json, write_tokenizer
from minisgl.core.types import FinishReason, Request, SamplingParams, TokenEvent
from minisgl.errors import InvalidRequestError, ModelError
from minisgl.formats.hub import locate_model
from minisgl.text.chat_template import cut_after
from minisgl.text.tokenizer import RequestOutput, TextStream, Tokenizer, byte_of_character, make_byte_tokenizer

# Templates in the manner of two families: what they use of the template language is what counts.
QWEN_STYLE = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- "<|im_start|>system\\nToday: " + date_string + "\\n\\n" + system_message + "<|im_end|>" }}
{%- endif %}
{%- if tools is not none %}{{- "tools!" }}{% endif %}
{%- set ns = namespace(last=-1, found=false) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% set ns.found = true %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content.split('</think>')[-1] }}<|im_end|>
{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{{- {"last": ns.last, "text": "<é> & 'q'"} | tojson }}
{{- [1, 2] | tojson(false, 2) }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL_STYLE = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token }}
    {% else %}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}
"""
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": " Hello 世界 <b>&amp;</b> "},
    {"role": "assistant", "content": "<think>hm</think>\n\nHi 😀"},
    {"role": "user", "content": "bye"},
]
SYSTEM: dict[str, Any] = {"role": "system", "content": " Be brief. "}


@pytest.mark.parametrize(
    ("template", "messages"),
    [(QWEN_STYLE, TALK), (QWEN_STYLE, [SYSTEM, *TALK]), (MISTRAL_STYLE, TALK)],
    ids=["qwen", "qwen system", "mistral"],
)
def test_conversations_render_and_encode_as_in_transformers(
    tmp_path: Path, template: str, messages: list[dict[str, Any]]
) -> None:
    ours = Tokenizer.load(write_tokenizer(tmp_path, template=template, add_bos=True))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    options: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"date_string": "1 Jan 2026"})
    for prompt, more in itertools.product((True, False), options):
        kwargs = {"add_generation_prompt": prompt, **more}
        expected = theirs.apply_chat_template(messages, tokenize=False, **kwargs)
        assert ours.render_chat(messages, **kwargs) == expected
        assert ours.encode_chat(messages, **kwargs) == theirs.apply_chat_template(messages, return_dict=False, **kwargs)


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=MISTRAL_STYLE, add_bos=True))
    assert tokenizer.encode_chat(TALK[:1]).count(0) == 1
    ids = tokenizer.encode("ab")
    assert ids[0] == 0
    assert tokenizer.encode("ab", add_special_tokens=False) == ids[1:]
    assert tokenizer.starts(ids, "ab")[:2] == [0, 0]  # the text does not show it


def test_what_the_template_refuses_and_lone_surrogates_are_the_users_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=MISTRAL_STYLE))
    refused: tuple[tuple[list[dict[str, Any]], dict[str, Any], str], ...] = (
        (TALK[1:], {}, "roles must alternate"),
        ([{"role": "user", "content": 5}], {}, "chat template refuses"),
        (TALK, {"bos_token": "x"}, "bos_token cannot be set here"),
        ([{"role": "user", "content": "\udc00"}], {}, "lone surrogate"),
    )
    for messages, kwargs, words in refused:
        with pytest.raises(InvalidRequestError, match=words):
            tokenizer.encode_chat(messages, **kwargs)
    with pytest.raises(InvalidRequestError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800b")


def test_a_hostile_template_stays_in_its_sandbox(tmp_path: Path) -> None:
    for template in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns._Namespace__attrs = 1 %}{{ ns._Namespace__attrs.real }}",
        "{{ dict.mro() }}",
        "{{ dict.__base__.x }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ):
        tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template))
        with pytest.raises(InvalidRequestError):
            tokenizer.render_chat(TALK)


def test_a_continued_conversation_ends_with_its_last_content(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, template=template))
    for contents, expected in (
        (("hi", "so far"), "[hi][so far"),
        (("so far", "so far"), "[so far][so far"),
        (("hi", " one, one "), "[hi][one, one"),
    ):
        said = [{"content": content} for content in contents]
        assert tokenizer.render_chat(said, continue_final_message=True) == expected


def test_a_continued_text_is_cut_behind_the_content_with_the_blanks_that_the_template_shows() -> None:
    assert cut_after("a: x\na: so far <end>", "so far ") == "a: x\na: so far "
    assert cut_after("a: so far<end>", " so far ") == "a: so far"
    for content in ("", "  \n", "not shown"):
        with pytest.raises(InvalidRequestError, match="no content that can be continued"):
            cut_after("a: other<end>", content)


def test_the_template_is_found_in_each_of_its_places_and_special_tokens_may_be_objects(tmp_path: Path) -> None:
    own, eos = "C{{ messages[0].content }}{{ eos_token }}", {"content": "<|im_end|>", "lstrip": False}
    inline = write_tokenizer(tmp_path / "inline", chat_template="A{{ messages[0].content }}")
    both = write_tokenizer(tmp_path / "both", template=own, chat_template="A", eos_token=eos)
    rendered = [Tokenizer.load(folder).render_chat([{"content": "x"}]) for folder in (inline, both)]
    assert rendered == ["Ax", "Cx<|im_end|>"]


def test_a_model_without_template_completes_but_does_not_chat_and_truncation_is_not_applied(tmp_path: Path) -> None:
    text = json.loads(byte_level_json())
    text["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (write_tokenizer(tmp_path) / "tokenizer.json").write_text(json.dumps(text))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat(TALK)
    assert tokenizer.decode(tokenizer.encode("a b c d e f g h i")) == "a b c d e f g h i"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    assert not Tokenizer.exists(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # transformers 5.0 does it
def test_without_tokenizer_json_the_folder_is_converted(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as older GPT-2-like checkpoints have."""
    model = json.loads(byte_level_json())["model"]
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The quick brown 世界")) == "The quick brown 世界"
    assert tokenizer.backend.get_vocab_size() >= len(model["vocab"])


TEXTS = ("Hello, 世界! 😀👩‍👩‍👧 naïve  café", " leading and trailing ", "a\n\n\tb", "🏳️‍🌈" * 3, "��", "")


BYTE_LEVEL, BYTE_FALLBACK = (
    Tokenizer(tokenizers.Tokenizer.from_str(text), tokens={}) for text in (byte_level_json(), byte_fallback_json())
)
LETTERS = {letter: BYTE_LEVEL.encode(letter)[0] for letter in "abxSTOP"}
FALLBACK = {token: BYTE_FALLBACK.backend.get_vocab()[token] for token in ("a", "h", "▁b", "▁he")} | {
    byte: 3 + byte for byte in (0x61, 0x62, 0xC3, 0xA9, 0xBD, 0xE4, 0xFF)
}


def collect(stream: TextStream, ids: Sequence[int], cuts: Sequence[int] = ()) -> str:
    """Push `ids` in pieces that end at `cuts`, and finish."""
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    text = "".join(stream.push(ids[start:end]) for start, end in itertools.pairwise(bounds)) + stream.finish()
    assert stream.text == text
    return text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_encoded_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert collect(tokenizer.stream(SamplingParams()), ids) == tokenizer.decode(ids) == text


STATES = {
    "byte level": byte_level_json(),
    "byte fallback": byte_fallback_json(),
    "byte level, BOS": byte_level_json(add_bos=True),
    **{f"Metaspace, {prepend}": metaspace_json(prepend) for prepend in ("always", "first", "never")},
}


@pytest.mark.parametrize("name", STATES)
@given(
    text=st.text("ab he.世😀é\ufffd", min_size=1, max_size=20),
    at=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    skip=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_completion_goes_on_where_its_prompts_text_ends(
    name: str, text: str, at: int, cuts: list[int], skip: bool
) -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(STATES[name]), tokens={})
    ids = tokenizer.encode(text)
    prompt, rest = ids[:at], ids[at:]
    shown, whole = tokenizer.decode(prompt, skip), tokenizer.decode(ids, skip)
    before = b"".join(map(tokenizer.token_bytes, prompt))
    if before.decode(errors="ignore").encode() != before:  # the prompt ends within a character
        return
    assert tokenizer.decode(rest, skip, prompt) == whole[len(shown) :]
    stream = tokenizer.stream(SamplingParams(skip_special_tokens=skip), prompt=memoryview(array("i", prompt)))
    assert collect(stream, rest, cuts) == whole[len(shown) :]


@pytest.mark.parametrize(
    ("prompt", "ids", "text"),
    [
        (["▁a"], ["▁b", "▁he"], " b he"),
        (["<s>", "▁a"], ["▁b"], " b"),
        (["<s>"], ["▁b"], "b"),  # the first word of all has no space before it
        (["▁a", "</s>"], ["▁b"], " b"),
        (["▁"], ["▁b"], " b"),
        ([], ["▁b"], "b"),
        (["▁a", 999], ["▁b"], " b"),  # an id that only the model has
        (["▁a", "<0xE4>"], ["▁b"], " b"),  # the prompt ends within a character
        (["▁a", "<0xC3>", "<0xA9>"], ["▁b"], " b"),
        (["▁a"], ["<0xC3>", "<0xA9>", "b"], "éb"),
        (["▁a"], ["<0xFF>", "▁b"], "\ufffd b"),
        (["<0x61>"], ["<0xFF>", "▁b"], "\ufffd b"),  # they are one run of bytes, which is broken
    ],
)
def test_the_first_word_keeps_its_space_behind_a_prompt(prompt: list[str | int], ids: list[str], text: str) -> None:
    numbers = BYTE_FALLBACK.backend.get_vocab()
    before = [token if isinstance(token, int) else numbers[token] for token in prompt]
    after = [numbers[token] for token in ids]
    assert BYTE_FALLBACK.decode(after, prompt=before) == text
    assert collect(BYTE_FALLBACK.stream(SamplingParams(), prompt=before), after, range(9)) == text


def test_a_stop_string_may_begin_with_the_space_of_the_first_word() -> None:
    numbers = BYTE_FALLBACK.backend.get_vocab()
    for stop, text in ((" b", ""), (" b he", ""), (" he", " b"), ("b", " ")):
        stream = BYTE_FALLBACK.stream(SamplingParams(stop=(stop,)), prompt=[numbers["▁a"]])
        assert (collect(stream, [numbers["▁b"], numbers["▁he"]]), stream.matched) == (text, stop)


@given(st.lists(st.integers(0, 420), max_size=60), st.lists(st.integers(0, 60), max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_what_decode_says_for_any_ids(ids: list[int], cuts: list[int], skip: bool) -> None:
    stream = BYTE_LEVEL.stream(SamplingParams(skip_special_tokens=skip))
    assert collect(stream, ids, cuts) == BYTE_LEVEL.decode(ids, skip)
    assert len(stream.starts) == len(ids)


BLANK = 3 + 0x20  # the byte: where it begins a broken run, a stream has shown it, and counts one character more


@given(
    st.lists(st.integers(0, 280).filter(lambda token: token != BLANK), max_size=40)
    | st.text("ab he.世😀é", max_size=40).map(BYTE_FALLBACK.encode)
)
@settings(max_examples=400, deadline=None)
def test_byte_fallback_pieces_join_to_what_decode_says_behind_broken_byte_runs(ids: list[int]) -> None:
    """A run of byte tokens that turns out invalid changes text that was shown already; what follows still comes."""
    text, decoded = collect(BYTE_FALLBACK.stream(SamplingParams()), ids), BYTE_FALLBACK.decode(ids)
    assert len(text) == len(decoded)
    assert text.rpartition("\ufffd")[2] == decoded.rpartition("\ufffd")[2]
    assert "\ufffd" in decoded or text == decoded


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([0xE4, 0xBD, "a", "▁b"], ["", "", "\ufffd\ufffda", " b", ""]),
        (["a", 0x61, 0xFF, "▁b", "▁he", "h"], ["a", "a", "", "\ufffd b", " he", "h", ""]),
        (["a", 0x61, 0x62, 0xFF, 0x61, "▁b", 0xC3, 0xA9], ["a", "a", "b", "", "", "\ufffd\ufffd b", "", "é", ""]),
        (["a", 0x61, 0xFF], ["a", "a", "", "\ufffd"]),
    ],
)
def test_a_broken_byte_run_comes_once_and_the_next_tokens_whole(tokens: list[str | int], pieces: list[str]) -> None:
    stream = BYTE_FALLBACK.stream(SamplingParams())
    assert [*(stream.push([FALLBACK[token]]) for token in tokens), stream.finish()] == pieces


def test_the_bundled_tokenizer_streams_what_it_decodes() -> None:
    tokenizer = Tokenizer.load(locate_model(None))
    ids = tokenizer.encode("Größe 123 世界 😀👩‍👩‍👧  two  spaces\n\tdef f(): pass")
    assert collect(tokenizer.stream(SamplingParams()), ids, range(len(ids))) == tokenizer.decode(ids)
    assert "user" in tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_half_a_character_is_held_back_and_at_the_end_a_replacement() -> None:
    ids = BYTE_LEVEL.encode("🧮")
    stream = BYTE_LEVEL.stream(SamplingParams())
    assert [stream.push([token]) for token in ids] == ["", "", "🧮"]
    assert stream.push(ids[:-1]) == ""
    assert "\ufffd" in stream.finish()


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    ids = BYTE_LEVEL.encode(text := "<|im_start|>hi<|im_end|>")
    assert collect(BYTE_LEVEL.stream(SamplingParams()), ids) == "hi"
    assert collect(BYTE_LEVEL.stream(SamplingParams(), keep=["<|im_end|>"]), ids) == "hi<|im_end|>"
    assert collect(BYTE_LEVEL.stream(SamplingParams(skip_special_tokens=False)), ids) == text


def cut_at_first_completed(text: str, stops: Sequence[str], include: bool = False) -> str:
    """The plain twin: scan the text character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: end if include else min(starts)]
    return text


ALPHABET = "ab世😀 "


@given(
    st.text(alphabet=ALPHABET, max_size=40),
    st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 60), max_size=6),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_whatever_the_token_split(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected = cut_at_first_completed(text, stops, include)
    for ids in (BYTE_LEVEL.encode(text), [t for character in text for t in BYTE_LEVEL.encode(character)]):
        stream = BYTE_LEVEL.stream(SamplingParams(stop=tuple(stops), include_stop_str_in_output=include))
        assert collect(stream, ids, cuts) == expected
        assert (stream.matched is not None) == any(stop in text for stop in stops)


@pytest.mark.parametrize(
    ("text", "params", "pieces", "end"),
    [
        ("aSTOPb", SamplingParams(stop=("STOP",)), ["a", "", "", "", "", ""], ("", "STOP", 5)),
        ("STOaST", SamplingParams(stop=("STOP",)), ["", "", "", "STOa", "", ""], ("ST", None, 6)),
        ("abxabx", SamplingParams(stop=("ab",), min_tokens=3), ["", "ab", "x", "", "", ""], ("", "ab", 5)),
    ],
    ids=["held back, then cut", "shown where it does not come", "does not act before min_tokens"],
)
def test_a_stop_string_over_several_tokens(text: str, params: SamplingParams, pieces: list[str], end: Any) -> None:
    stream = BYTE_LEVEL.stream(params)
    assert [stream.push([LETTERS[letter]]) for letter in text] == pieces
    assert (stream.finish(), stream.matched, len(stream.starts)) == end


def test_the_stop_token_is_no_part_of_the_text() -> None:
    for end in (*FinishReason, None):
        for params in (SamplingParams(), SamplingParams(include_stop_str_in_output=True)):
            output = RequestOutput(Request.make(id="a", prompt=[1], params=params), None)
            output.take(TokenEvent(id="a", tokens=(5, 6), finish=end))
            hidden = end is FinishReason.STOP and not params.include_stop_str_in_output
            assert (output.token_ids, output.shown_ids) == ([5, 6], [5] if hidden else [5, 6])


def test_bad_words_become_tokens_at_a_beginning_and_behind_a_space() -> None:
    for word in ("fox", " fox", "世界", "a b"):
        found = BYTE_LEVEL.with_bad_words(SamplingParams(bad_words=(word,), bad_word_ids=((7, 8),))).bad_word_ids
        assert found[0] == (7, 8)
        assert {BYTE_LEVEL.decode(ids) for ids in found[1:]} == {word, " " + word.lstrip()}
    plain = SamplingParams()
    assert BYTE_LEVEL.with_bad_words(plain) is plain


def test_long_streams_take_linear_time() -> None:
    assert collect(BYTE_LEVEL.stream(SamplingParams()), [1] * 200_000) == ""  # hidden tokens
    ids = random.Random(0).choices(range(400), k=3000)
    assert collect(BYTE_LEVEL.stream(SamplingParams()), ids, range(0, 3000, 7)) == BYTE_LEVEL.decode(ids)


def joined(tokenizer: Tokenizer, text: str) -> str:
    return b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False))).decode()


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str) -> None:
    assert joined(BYTE_LEVEL, text) == text
    if text:
        assert joined(BYTE_FALLBACK, text).replace("▁", " ") == " " + text.replace("▁", " ")


def test_special_tokens_are_their_text_and_unknown_ids_nothing() -> None:
    assert BYTE_LEVEL.token_bytes(1) == b"</s>"
    assert BYTE_LEVEL.token_bytes(10**6) == b""
    assert BYTE_FALLBACK.token_bytes(3 + 0xE4) == b"\xe4"
    assert sorted(byte_of_character().values()) == list(range(256))
    assert byte_of_character()["Ġ"] == 0x20


@given(st.text(alphabet="aé世😀 <s>x", max_size=20))
@settings(max_examples=200, deadline=None)
def test_tokens_start_where_their_text_does(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    starts = BYTE_LEVEL.starts(ids, text)
    assert starts == sorted(starts)
    for index, (token, start, end) in enumerate(zip(ids, starts, [*starts, len(text)][1:], strict=True)):
        if BYTE_LEVEL.token_bytes(token) != text[start:end].encode():
            # A part of a character begins where that character does.
            assert b"".join(map(BYTE_LEVEL.token_bytes, ids[:index])).startswith(text[:start].encode())


def test_a_byte_tokenizer_encodes_text_as_its_bytes_and_decodes_other_tokens_as_numbers() -> None:
    tokenizer, text = make_byte_tokenizer(151_936), "Grüße, 世界!\n\t😀 \x00"
    assert tokenizer.backend.get_vocab_size() == 151_936
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == joined(tokenizer, text) == text
    stream = tokenizer.stream(SamplingParams())
    pieces = [stream.push([token]) for token in (256, 151_935, *"ü".encode(), 2999)]
    assert pieces == [" 256", " 151935", "", "ü", " 2999"]
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    small = make_byte_tokenizer(100)  # has the first bytes
    assert (small.backend.get_vocab_size(), small.encode("AzB")) == (100, [65, 66])
