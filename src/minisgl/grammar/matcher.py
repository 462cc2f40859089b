"""One answer's way through its grammar."""

from __future__ import annotations

import time

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from numpy.typing import NDArray

from minisgl.errors import InvalidRequestError
from minisgl.grammar.source import NOTHING_MATCHES, invalid, library_form, refusal
from minisgl.grammar.vocabulary import Vocabulary
from minisgl.types import Calls, Grammar

STEP_LEXER_FUEL = 100_000
STEP_ITEMS = 20_000
LEXER_STATES = 50_000
BURST_SECONDS = 0.25
TOKEN_SECONDS = 0.005
"""CPU time that one answer may take: this much at once, and this much for each of its tokens. An ordinary schema takes
a hundredth of it; an ambiguous grammar, whose tokens take the longer the more there are, does not hold up its batch.
"""


class GrammarError(Exception):
    """A grammar that compiled, but became too complex or too slow on the way."""


class MatcherConstraint:
    """Follows one answer and says which tokens may come next. Not thread-safe.

    The EOS ids are allowed exactly where the text may end, and nothing else once it cannot go on. Special tokens, and
    ids beyond the tokenizer's, never are, but where they mark a thought or a call. Where the grammar leaves no choice
    of the text, one token is allowed: the one that the tokenizer would have used.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self.vocabulary = vocabulary
        padded = vocabulary.size != vocabulary.vocab_size
        self._scratch = np.zeros(-(-vocabulary.size // 32), np.int32) if padded else None
        self._left = BURST_SECONDS

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Overwrite mask (ceil(V / 32),): bit t % 32 of word t // 32 says whether token t may come next.

        Raises GrammarError when the library's limits of one step are exceeded, or the answer's time is used up.
        """
        if self._left < 0:
            raise GrammarError(f"more than {BURST_SECONDS} s beyond {TOKEN_SECONDS} s a token")
        begun = time.thread_time()
        assert mask.shape == (self.vocabulary.num_words,)
        assert mask.dtype == np.int32
        assert mask.flags.c_contiguous
        target = mask if self._scratch is None else self._scratch
        self._matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if self._matcher.is_error():
            raise GrammarError(self.error)
        self._left += TOKEN_SECONDS + begun - time.thread_time()
        if self._scratch is not None:
            mask[:] = self._scratch[: len(mask)]
            if rest := self.vocabulary.vocab_size % 32:
                mask[-1] &= np.int32((1 << rest) - 1)
        if (token := self.vocabulary.stand_in) is not None and token < self.vocabulary.vocab_size:
            mask[token // 32 : token // 32 + 1].view(np.uint32)[0] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)

    def accept(self, token: int) -> bool:
        """Take in the token that follows; False when it may not, and from then on."""
        begun = time.thread_time()
        accepted = self._matcher.consume_token(token)
        self._left += begun - time.thread_time()
        return accepted

    def copy(self) -> MatcherConstraint:
        """Another one at the same place, which shares what was computed of the grammar so far."""
        return MatcherConstraint(self._matcher.deep_copy(), self.vocabulary)

    @property
    def may_end(self) -> bool:
        """Whether the text is complete as it is."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """What went wrong, in a line; empty when nothing did."""
        return " ".join(self._matcher.get_error().partition("<state>")[0].replace("<non-verbose/>", "").split())


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> MatcherConstraint:
    """A constraint at the start of its text. Raises InvalidRequestError; may take seconds for a hostile grammar."""
    limits = LLParserLimits(
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        verbose_errors=False,
    )
    try:
        form = library_form(grammar, vocabulary.special_token)
    except ValueError as error:
        raise refusal(grammar, str(error)) from error
    matcher = LLMatcher(vocabulary.tokens, form, log_level=0, limits=limits)
    if matcher.is_error():
        if grammar.calls is not None:
            blame_calls(grammar.calls, vocabulary)
        raise refusal(grammar, matcher.get_error().partition("<state>")[0])
    return MatcherConstraint(matcher, vocabulary)


def blame_calls(calls: Calls, vocabulary: Vocabulary) -> None:
    """Raise InvalidRequestError about `tools` when it is their schema that cannot be followed."""
    try:
        compile_grammar(Grammar(kind="json_schema", source=calls.schema), vocabulary)
    except InvalidRequestError as error:
        error.param = "tools"
        raise


def probe(grammar: Grammar, constraint: MatcherConstraint, steps: int) -> None:
    """Walk at random through a grammar. Raises InvalidRequestError when nothing matches or a step is too much."""
    eos = constraint.vocabulary.eos
    mask = np.zeros(constraint.vocabulary.num_words, np.int32)
    random = np.random.default_rng(0)
    for step in range(steps):
        try:
            constraint.fill(mask)
        except GrammarError as error:
            nothing = step == 0 and "NoExtension" in str(error)
            raise invalid(grammar, NOTHING_MATCHES if nothing else f"too expensive: {error}") from error
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        bits[eos] = 0
        if not len(allowed := np.flatnonzero(bits)):
            return
        if not constraint.accept(int(random.choice(allowed))):
            raise invalid(grammar, f"too expensive: {constraint.error}")
