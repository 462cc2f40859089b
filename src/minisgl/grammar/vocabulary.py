"""The model's tokens as llguidance sees them: a trie of their bytes."""

from __future__ import annotations

from pathlib import Path

import msgspec
from llguidance import LLTokenizer

from minisgl.errors import UnsupportedParameterError
from minisgl.tokenizer.tokenizer import load_backend


class VocabularySource(msgspec.Struct, frozen=True, kw_only=True):
    """What a vocabulary is made of. `vocab_size` is the width of the logits, which may exceed the tokenizer's."""

    folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Vocabulary:
    """The tokens, shared by all grammars. Takes a second for 150,000 of them.

    `num_words` is the length of a mask, ceil(vocab_size / 32); `eos` are the ids that end a text. The library is given
    all of the tokenizer's tokens, `size` with those that only the model has, and at least one id that ends a text:
    where there is none, a special token is the `stand_in`. Raises UnsupportedParameterError for a tokenizer whose
    tokens' bytes the library cannot tell, ModelError for a broken one.
    """

    def __init__(self, source: VocabularySource) -> None:
        backend = load_backend(Path(source.folder))
        backend.no_truncation()
        backend.no_padding()
        known = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.vocab_size = source.vocab_size
        self.num_words = -(-source.vocab_size // 32)
        self.size = max(source.vocab_size, known)
        self.eos = [token for token in source.eos_token_ids if token < min(source.vocab_size, known)]
        special = (token for token, added in backend.get_added_tokens_decoder().items() if added.special)
        self.stand_in = None if self.eos else next(special, known - 1)
        eos = self.eos if self.stand_in is None else self.stand_in
        try:
            self.tokens = LLTokenizer(backend.to_str(), n_vocab=self.size, eos_token=eos)
        except ValueError as error:
            raise UnsupportedParameterError(
                f"structured output is not supported with this model's tokenizer: {error}"
            ) from error

    def special_token(self, text: str) -> int | None:
        """The one token that a text is, if the library takes it for a special one: any that was added as <...> is."""
        ids = self.tokens.tokenize_str(text)
        return ids[0] if len(ids) == 1 and self.tokens.is_special_token(ids[0]) else None
