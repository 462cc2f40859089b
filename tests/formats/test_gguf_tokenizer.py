import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from helpers.gguf_files import TEMPLATE, tokenizer_metadata, write_gguf
from helpers.tiny_tokenizers import CORPUS, byte_level_json
from minisgl.formats.gguf import SPLITS, GgufFile, GgufTokenizer, pre_tokenizer

TEXT = "It's 2024!\n\n  a Öl  naïveTest they'LL"


def read(tmp_path: Path, metadata: dict[str, Any], kind: str = "llama") -> GgufTokenizer:
    return GgufTokenizer(GgufFile(write_gguf(tmp_path / "t.gguf", kind, {**metadata, "x": np.ones(4, np.float32)})))


CUTS = {
    "gpt-2": "It|'s| 2024|!|\n\n | a| Öl| | naïveTest| they|'|LL",
    "smollm": "It|'s| |2|0|2|4|!|\n\n | a| Öl| | naïveTest| they|'|LL",
    "llama-bpe": "It|'s| |202|4|!\n\n| | a| Öl| | naïveTest| they|'LL",
    "qwen2": "It|'s| |2|0|2|4|!\n\n| | a| Öl| | naïveTest| they|'LL",
    "tekken": "It|'s| |2|0|2|4|!\n\n| | a| Öl| | naïve|Test| they|'LL",
    "default": "It|'|s| |202|4|!|\n\n | a| Öl| | naïveTest| they|'|LL",
}


@pytest.mark.parametrize("rule", CUTS)
def test_each_rule_cuts_text_where_the_model_was_taught_to(rule: str) -> None:
    found = pre_tokenizer(rule).pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in found] == CUTS[rule].split("|")
    # The regexes of two are those of transformers.
    assert SPLITS["qwen2"] == (PRETOKENIZE_REGEX,)
    assert SPLITS["llama-bpe"] == (inspect.signature(TikTokenConverter).parameters["pattern"].default,)


def test_the_vocabulary_gives_the_ids_it_was_trained_with(tmp_path: Path) -> None:
    ours = read(tmp_path, tokenizer_metadata("gpt-2")).tokenizer
    theirs = tokenizers.Tokenizer.from_str(byte_level_json())
    for text in (*CORPUS, TEXT, "<s>hi</s><|im_end|>"):
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


ADD_BOS, ADD_EOS, RULE = (f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "pre"))


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, []),
        ({ADD_BOS: True}, [0]),
        ({RULE: "llama-bpe"}, [0]),
        ({RULE: "llama-bpe", ADD_BOS: False}, []),
        ({ADD_BOS: True, ADD_EOS: True}, [0, 1]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_or_rule_says(
    tmp_path: Path, changes: dict[str, Any], ids: list[int]
) -> None:
    assert read(tmp_path, {**tokenizer_metadata("gpt-2"), **changes}).tokenizer.encode("").ids == ids


@pytest.mark.parametrize(("rule", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_a_word_without_merges_is_a_token_where_the_rule_ignores_them(tmp_path: Path, rule: str, whole: bool) -> None:
    metadata = tokenizer_metadata(rule)
    metadata["tokenizer.ggml.tokens"] += ["zqzq"]
    metadata["tokenizer.ggml.token_type"] += [1]
    assert ("zqzq" in read(tmp_path, metadata).tokenizer.encode("zqzq").tokens) == whole


def test_names_template_and_every_eos_id_are_kept(tmp_path: Path) -> None:
    found = read(tmp_path, tokenizer_metadata())
    assert found.eos_token_ids() == [1, 3]
    assert {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}.items() <= found.config().items()
    named = read(tmp_path, {**tokenizer_metadata(), "tokenizer.chat_template.tool_use": "T"}).config()["chat_template"]
    assert named == [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}]


def test_a_qwen_file_without_a_rule_gets_qwens(tmp_path: Path) -> None:
    state = read(tmp_path, tokenizer_metadata(None), "qwen2").tokenizer.to_str()
    assert state == read(tmp_path, tokenizer_metadata("qwen2")).tokenizer.to_str()
    assert json.loads(state)["normalizer"] == {"type": "NFC"}


def sentence_piece_metadata() -> dict[str, Any]:
    """A SentencePiece BPE vocabulary trained on a few lines; a piece's score is its age."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    age = backend.get_vocab()
    pieces = sorted(age)  # the order of ids tells nothing
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(age[piece]) for piece in pieces],
        **{f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))},
    }


def sentence_piece_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's own rule, slowly: join the neighbours whose piece scores highest, the leftmost of equals."""
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


def test_sentence_piece_vocabularies_give_sentence_pieces_ids(tmp_path: Path) -> None:
    metadata = sentence_piece_metadata()
    ours = read(tmp_path, metadata).tokenizer
    for text in ("a", "Numbers: 1 22 333", "the quick  brown fox", "Grüße 你好 😀 xyz", *CORPUS):
        assert ours.encode(text).ids == [1, *sentence_piece_ids(text, metadata)]
        assert ours.decode(ours.encode(text).ids) == text
    bare = read(tmp_path, {**metadata, "tokenizer.ggml.add_space_prefix": False}).tokenizer
    assert bare.decode(bare.encode(" a b").ids) == " a b"
    assert "▁" not in bare.encode("a").tokens


def test_the_piece_with_the_higher_score_wins_whatever_its_id(tmp_path: Path) -> None:
    metadata = {
        **sentence_piece_metadata(),
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "▁a"],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 7],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -2.0],
    }
    assert sentence_piece_ids("abc", metadata) == [9, 8]
    assert read(tmp_path, metadata).tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
