"""Files of a model that are not what they should be: one line, which names the file."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import save_model
from minisgl.build import read_eos_token_ids
from minisgl.core.model_config import read_json, read_spec
from minisgl.core.weights import HEAD, INDEX, load_weights
from minisgl.errors import ModelError
from minisgl.formats.hub import locate_model
from minisgl.text.tokenizer import Tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
DEEP = "[" * 200_000
PIECES = b"\n\x0e\n\x05<unk>"  # as a SentencePiece model begins


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "model")
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


def read_all(folder: Path) -> None:
    locate_model(str(folder))
    load_weights(folder, read_spec(folder), torch.float32, torch.device("cpu"))
    read_eos_token_ids(folder, 1)
    Tokenizer.load(folder)


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


@pytest.mark.parametrize("name", [*DESCRIPTIONS, INDEX, "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (text(LFS), "a Git LFS pointer.*git lfs pull"),
        (os.mkfifo, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (lambda path: path.write_bytes(b'{"a": "\xff"}'), "JSON|tokenizer|safetensors"),
        (text(DEEP), "JSON|tokenizer|safetensors"),
        (text(f'{{"a": {DEEP}'), "JSON|tokenizer|safetensors"),
        (text(""), "JSON|tokenizer|safetensors"),
        (text("7"), "JSON|object|tokenizer|safetensors"),
    ],
    ids=["LFS", "FIFO", "folder", "not UTF-8", "deep", "deeper", "empty", "number"],
)
def test_a_broken_file_is_named_in_one_line(
    saved: Path, tmp_path: Path, name: str, write: Callable[[Path], object], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / name).unlink(missing_ok=True)
    write(folder / name)
    with pytest.raises(ModelError, match=words) as caught:
        read_all(folder)
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *((name, PIECES, "needs.*packages sentencepiece and protobuf") for name in ("tokenizer.model", "spiece.model")),
        *((name, LFS.encode(), "Git LFS pointer") for name in ("tokenizer.model", "spiece.model", "vocab.json")),
        ("vocab.txt", b"a\nb\n", "cannot be read"),
        ("tekken.json", b"{}", "cannot be read"),
    ],
)
def test_what_the_tokenizer_of_a_folder_needs_is_said(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}: .*{words}") as caught:
        Tokenizer.load(folder)
    assert "\n" not in caught.value.message


def test_files_that_convert_to_no_tokens_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "vocab.txt").write_text("a\nb\n")  # which Llama's tokenizer does not read
    with pytest.raises(ModelError, match=r"vocab\.txt: .*finds no tokens in it"):
        Tokenizer.load(tmp_path)


def test_a_git_lfs_pointer_in_the_place_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(LFS)
    with pytest.raises(ModelError, match=r"model\.gguf: .*git lfs pull"):
        locate_model(str(tmp_path / "model.gguf"))


def test_a_file_is_opened_once(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_and_remove(path: Path, mode: str) -> IO[bytes]:
        file = open(path, mode)  # noqa: SIM115
        path.unlink()
        return file

    shutil.copy(saved / "config.json", tmp_path)
    monkeypatch.setattr(Path, "open", open_and_remove)
    assert read_json(tmp_path / "config.json")["architectures"]


@pytest.mark.parametrize("change", ["none", "same", "one row", "rows", "dtype"])
def test_another_head_beside_tied_embeddings_is_told_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    heads = {
        "same": embedding.clone(),
        "one row": embedding + (torch.arange(len(embedding)) == 0)[:, None],
        "rows": torch.cat([embedding, embedding[:1]]),
        "dtype": embedding.double(),
    }
    if change != "none":
        save_file({**tensors, HEAD: heads[change]}, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        weights = load_weights(folder, read_spec(folder), torch.float32, torch.device("cpu"))
    assert weights.head is weights.embedding
    told = [record.getMessage() for record in caplog.records if HEAD in record.getMessage()]
    assert len(told) == (change in ("one row", "rows"))
    assert all(str(folder) in line and "tie_word_embeddings" in line for line in told)
