"""Which tokens end an answer: every id that any of the model's files names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minisgl.models.fields import Fields, read_json


def read_eos_token_ids(folder: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """EOS ids of generation_config.json, config.json and the tokenizer's `eos_token`, without repeats, in this order.

    Files other than config.json may be missing. Ids outside of the vocabulary, which the model can never produce,
    are left out. Raises ModelError naming file and field for an ill-typed one.
    """
    ids: list[int] = []
    generation = folder / "generation_config.json"
    if generation.exists():
        ids += _ids(Fields(read_json(generation), str(generation)))
    ids += _ids(config)
    if (token := _eos_token_id(folder)) is not None:
        ids.append(token)
    return tuple(dict.fromkeys(token for token in ids if token < vocab_size))


def _ids(fields: Fields) -> list[int]:
    value: Any = fields.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise fields.error("eos_token_id", "a token id or a list of them")
    return ids


def _eos_token_id(folder: Path) -> int | None:
    """The id of tokenizer_config.json's `eos_token`, looked up there, then in tokenizer.json."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    fields = Fields(read_json(path), str(path))
    token: Any = fields.values.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if not isinstance(text, str):
        raise fields.error("eos_token", "a string or an object with content")
    for key, added in fields.section("added_tokens_decoder", {}).values.items():
        if key.isdecimal() and isinstance(added, dict) and added.get("content") == text:
            return int(key)
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = Fields(read_json(path), str(path))
    for added in tokenizer.items("added_tokens", dict, []):
        if added.get("content") == text and type(added.get("id")) is int:
            return int(added["id"])
    vocab = tokenizer.section("model", {}).values.get("vocab")
    found = vocab.get(text) if isinstance(vocab, dict) else None
    return found if type(found) is int else None
