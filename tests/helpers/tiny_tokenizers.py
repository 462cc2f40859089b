"""Small tokenizers made on the spot: nothing is downloaded."""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The quick brown fox jumps over the lazy dog. Numbers: 1 22 333, and some   spaces.\n",
    "Grüße aus Köln! Ça va? 你好，世界。こんにちは 😀👩‍👩‍👧 🏳️‍🌈 naïve café\n",
    "def f(x):\n\treturn x + 1  # STOP END\n<tag> </tag> ### user: hello assistant: hi\n",
)
SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


@functools.cache
def byte_level_json(add_bos: bool = False) -> str:
    """A byte-level BPE of some 400 tokens, as the text of a tokenizer.json; `<s>` is 0, `</s>` is 1."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend.to_str()


@functools.cache
def byte_fallback_json() -> str:
    """A tokenizer in the manner of Llama 2: spaces as U+2581, unknown characters as byte tokens, `<s>` first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeh.", "▁a", "▁b", "▁he", "he"]
    merges = [("▁", "a"), ("▁", "b"), ("h", "e"), ("▁", "he")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str()


@functools.cache
def metaspace_json(prepend: str) -> str:
    """`byte_fallback_json` with Metaspace, which prepends a space "always", to the "first" word, or "never"."""
    backend = tokenizers.Tokenizer.from_str(byte_fallback_json())
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    return backend.to_str()


def write_tokenizer(
    folder: Path, *, template: str | None = None, add_bos: bool = False, state: str = "", **config: Any
) -> Path:
    """A checkpoint folder with the byte-level tokenizer, or the one of `state`; `config` is tokenizer_config.json's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(state or byte_level_json(add_bos), "utf-8")
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **config}), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder
