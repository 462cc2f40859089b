"""Grammars for one model: checked at the door, followed in the engine."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from minisgl.grammar.guard import Guard
from minisgl.grammar.matcher import MatcherConstraint, compile_grammar
from minisgl.grammar.source import check_size
from minisgl.grammar.vocabulary import Vocabulary, VocabularySource
from minisgl.types import Grammar, ModelInfo

MAX_CHECKED = 4096
"""Grammars that are remembered as good, by their digest."""
MAX_COMPILED = 32
"""Grammars that are kept compiled; a hostile one holds up to some 100 MB."""


class GrammarCompiler:
    """What a model can be held to. Nothing is loaded before the first use. Safe to use from several threads.

    `folder` holds the tokenizer; `vocab_size` is the width of the logits.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._source = VocabularySource(folder=str(folder), vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._guard = Guard(self._source)
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._checked: OrderedDict[bytes, None] = OrderedDict()
        self._compiled: OrderedDict[Grammar, MatcherConstraint] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raise InvalidRequestError for a grammar that is invalid, unsupported or too expensive.

        It is compiled and tried out in a process of its own, with `helper.WALL_SECONDS` to live. HelperError (503) says
        that there is no such process. For the API process.
        """
        check_size(grammar)
        digest = hashlib.sha256(msgspec.json.encode(grammar)).digest()
        with self._lock:
            if digest in self._checked:
                self._checked.move_to_end(digest)
                return
        self._guard.judge(grammar)
        with self._lock:
            self._checked[digest] = None
            if len(self._checked) > MAX_CHECKED:
                self._checked.popitem(last=False)

    def constraint(self, grammar: Grammar) -> MatcherConstraint:
        """A constraint at the start of its text. Raises InvalidRequestError. For the engine process.

        It compiles in this process, with the library's limits alone: a grammar that nobody checked may take seconds.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._source)
            if (found := self._compiled.get(grammar)) is None:
                found = self._compiled[grammar] = compile_grammar(grammar, self._vocabulary)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.copy()

    def close(self) -> None:
        """End the process that checks, if it was started."""
        self._guard.close()


def build_constraints(folder: Path, model: ModelInfo) -> Callable[[Grammar], MatcherConstraint]:
    """What makes an engine's constraints for a model; the tokenizer is loaded with the first one."""
    return GrammarCompiler(folder, model.vocab_size, model.eos_token_ids).constraint
