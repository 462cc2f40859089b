"""Structured output: which tokens may come next, through llguidance.

Its grammars: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md and docs/json_schema.md.
"""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from minisgl.core.types import REASONING_END, REASONING_START, Grammar
from minisgl.errors import NO_PANICS, InvalidRequestError, NativePanicError, UnsupportedParameterError
from minisgl.text.json_schema import rewritten
from minisgl.text.tokenizer import load_backend

MAX_SOURCE_BYTES = 1 << 20
MAX_CHOICES = 10_000
MAX_MESSAGE = 300
# Between the parts of a JSON text. Bounded: a model that falls into repeating newlines must go on with its text.
SPACED: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}", "lenient": False}
COMPACT: Any = {"whitespace_flexible": False, "lenient": False}
# Of kinds of grammars, in errors.
NAMES = {"json_object": "json object", "json_schema": "json schema", "regex": "regular expression", "lark": "grammar"}
# Strings, comments and regular expressions of a Lark source.
LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
STOP_OPTION = re.compile(r"\[[^\]\n]*\bstop\b")
UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")
NOT_DONE = re.compile(r"(?i)unimplemented|not supported|unsupported|unknown format|not disjoint|look-?around")
ANY_TEXT = "/(?s:.*)/"
ANY_REASONING = ANY_TEXT + " & ~/(?s:.*" + REASONING_END.replace("/", r"\/") + ".*)/"
NOTHING_MATCHES = "no text matches it"
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)


class Vocabulary:
    """The tokens of a folder's tokenizer, shared by all grammars. Takes a second for 150,000 of them. Raises
    UnsupportedParameterError where llguidance cannot tell the tokens' bytes, ModelError for a broken tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        backend = load_backend(folder)
        known = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.vocab_size = vocab_size  # the width of the logits, which may exceed the tokenizer's
        self.num_words = -(-vocab_size // 32)  # of a mask
        self.size = max(vocab_size, known)  # as llguidance is told
        self.eos = [token for token in eos_token_ids if token < min(vocab_size, known)]
        added = backend.get_added_tokens_decoder()
        special = (token for token, entry in added.items() if entry.special)
        self.placeholder_eos = None if self.eos else next(special, known - 1)  # llguidance wants one
        eos = self.eos if self.placeholder_eos is None else self.placeholder_eos
        try:
            with NO_PANICS:
                self.tokens = LLTokenizer(backend.to_str(), n_vocab=self.size, eos_token=eos)
        except (ValueError, NativePanicError) as error:
            reason = f"structured output is not supported with this model's tokenizer: {error}"
            raise UnsupportedParameterError(reason) from error
        texts = (re.escape(entry.content) for token, entry in added.items() if self.tokens.is_special_token(token))
        self.special_text = re.compile("|".join(texts) or "(?!)")

    def special_token(self, text: str) -> int | None:
        """The one token that a text is, if llguidance takes it for a special one: any that was added as <...> is."""
        ids = self.tokens.tokenize_str(text)
        return ids[0] if len(ids) == 1 and self.tokens.is_special_token(ids[0]) else None

    def literal(self, text: str) -> str:
        """A text in a Lark rule: as the special token that it is, or letter by letter; empty for none."""
        token = self.special_token(text) if text else None
        return (text and json.dumps(text)) if token is None else f"<[{token}]>"


class GrammarError(Exception):
    """A grammar that compiled, but became too complex on the way."""


class MatcherConstraint:
    """Follows one completion and says which tokens may come next. Not thread-safe.

    The EOS ids are allowed exactly where the text may end, and nothing else once it cannot go on. Special tokens, and
    ids beyond the tokenizer's, never are, but where they begin or end reasoning or a call. Where the grammar leaves no
    choice of the text, one token is allowed: the one that the tokenizer would have used.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self.vocabulary = vocabulary
        padded = vocabulary.size != vocabulary.vocab_size
        self._scratch = np.zeros(-(-vocabulary.size // 32), np.int32) if padded else None
        self.seconds = 0.0

    @NO_PANICS
    def fill(self, mask: NDArray[np.int32]) -> None:
        """Overwrite mask (ceil(V / 32),): bit t % 32 of word t // 32 says whether token t may come next. Raises
        GrammarError when llguidance's limits of one step are exceeded.
        """
        begun = time.thread_time()
        assert mask.shape == (self.vocabulary.num_words,)
        assert mask.dtype == np.int32
        assert mask.flags.c_contiguous
        target = mask if self._scratch is None else self._scratch
        self._matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if self._matcher.is_error():
            raise GrammarError(self.error)
        self.seconds += time.thread_time() - begun
        if self._scratch is not None:
            mask[:] = self._scratch[: len(mask)]
            if rest := self.vocabulary.vocab_size % 32:
                mask[-1] &= np.int32((1 << rest) - 1)
        if (token := self.vocabulary.placeholder_eos) is not None and token < self.vocabulary.vocab_size:
            mask.view(np.uint32)[token // 32] &= ~np.uint32(1 << token % 32)

    @NO_PANICS
    def accept(self, token: int) -> bool:
        """Take in the token that follows; False when it may not, and from then on."""
        begun = time.thread_time()
        accepted = self._matcher.consume_token(token)
        self.seconds = time.thread_time() - begun
        return accepted

    @NO_PANICS
    def copy(self) -> "MatcherConstraint":
        """Another one at the same place, which shares what was computed of the grammar so far."""
        return MatcherConstraint(self._matcher.deep_copy(), self.vocabulary)

    @property
    def error(self) -> str:
        return one_line(self._matcher.get_error())


@NO_PANICS
def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> MatcherConstraint:
    """A constraint at the start of its text, after seconds for a hostile grammar. Raises InvalidRequestError."""
    check_size(grammar)
    try:
        source = composed_grammar(grammar, text_grammar(grammar), vocabulary)
    except ValueError as error:
        raise refusal(grammar, str(error)) from error
    matcher = LLMatcher(vocabulary.tokens, source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        return MatcherConstraint(matcher, vocabulary)
    if grammar.calls is not None:  # is it the schema of the calls that cannot be followed?
        try:
            compile_grammar(Grammar(kind="json_schema", source=grammar.calls.schema), vocabulary)
        except InvalidRequestError as error:
            error.param = "tools"
            raise
    raise refusal(grammar, matcher.get_error())


def probe(grammar: Grammar, constraint: MatcherConstraint, steps: int) -> None:
    """Sample tokens at random. Raises InvalidRequestError when nothing matches or a step is too expensive."""
    mask = np.zeros(constraint.vocabulary.num_words, np.int32)
    random = np.random.default_rng(0)
    for step in range(steps):
        try:
            constraint.fill(mask)
        except GrammarError as error:
            nothing = step == 0 and "NoExtension" in str(error)
            raise invalid(grammar, NOTHING_MATCHES if nothing else f"too expensive: {error}") from error
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        bits[constraint.vocabulary.eos] = 0
        if not len(allowed := np.flatnonzero(bits)):
            return
        if not constraint.accept(int(random.choice(allowed))):
            raise invalid(grammar, f"too expensive: {constraint.error}")


def check_size(grammar: Grammar) -> None:
    """Raise InvalidRequestError for a source that is too large or no valid Unicode."""
    try:
        size = len(grammar.source.encode()) + (0 if grammar.calls is None else len(grammar.calls.schema.encode()))
    except UnicodeEncodeError as error:
        raise invalid(grammar, f"a lone surrogate at character {error.start}") from error
    if size > MAX_SOURCE_BYTES:
        raise invalid(grammar, f"{size} bytes, at most {MAX_SOURCE_BYTES} are allowed")


def text_grammar(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return schema_grammar('{"type":"object"}', grammar)
        case "json_schema":
            return schema_grammar(grammar.source, grammar)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
    lark = choice_lark(grammar) if grammar.kind == "choice" else checked_lark(grammar)
    return LLMatcher.grammar_from_lark(lark)


def composed_grammar(grammar: Grammar, text: str, vocabulary: Vocabulary) -> str:
    """Reasoning, then the text whose grammar is given, or calls: grammars that refer to each other by name."""
    literal = vocabulary.literal
    before = {"none": "", "possible": "(reasoning BLANK?)?", "begun": "reasoning BLANK?"}[grammar.reasoning]
    answer = "@text" if grammar.calls is None else "(@text | calls)"
    rules = [f"start: {before} {answer}", r"BLANK: /[\x20\n]{1,8}/"]
    parts = [named_grammar("text", text)]
    if grammar.reasoning != "none":
        opening = literal(REASONING_START) if grammar.reasoning == "possible" else ""
        if vocabulary.special_token(REASONING_END) is None:
            rules += [f"reasoning: {opening} inner", f'inner[suffix="{REASONING_END}"]: {ANY_TEXT}']
        else:
            rules += [f"reasoning: {opening} INNER {literal(REASONING_END)}", f"INNER: {ANY_REASONING}"]
    if (calls := grammar.calls) is not None:
        opening, closing, separator = literal(calls.opening), literal(calls.closing), literal(calls.separator)
        between = f"BLANK? {separator} BLANK?" if separator else "BLANK?"
        rules.append(f"calls: call ({between} call)*" if calls.several else "calls: call")
        rules.append(f"call: {opening and f'{opening} BLANK?'} @call {closing and f'BLANK? {closing}'}")
        parts.append(named_grammar("call", schema_grammar(calls.schema, grammar)))
    if vocabulary.special_text.search(json.dumps(parts, ensure_ascii=False).replace("\\", "")):
        rules.insert(0, '%llguidance {"no_forcing": true}')  # forced text is tokenised, special tokens included
    elif calls is None and grammar.reasoning == "none":
        return text
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": "\n".join(rules)}, *parts]}, allow_nan=False)


def named_grammar(name: str, source: str) -> dict[str, Any]:
    fields = json.loads(source)["grammars"][0] if source.startswith("{") else {"lark_grammar": source}
    return {**fields, "name": name}


def schema_grammar(source: str, grammar: Grammar) -> str:
    """llguidance's grammar of a JSON schema, with all of it enforced. Raises ValueError for one nested too deeply."""
    try:
        schema = msgspec.json.decode(source)
    except msgspec.DecodeError as error:
        raise invalid(grammar, f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise invalid(grammar, "nested too deeply") from error
    if not isinstance(schema, dict | bool):
        raise invalid(grammar, "a JSON schema is an object, true or false")
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise unsupported("x-guidance")
    if (new := rewritten(schema)) is False:
        raise invalid(grammar, NOTHING_MATCHES)
    if new is True or new is not schema:
        source = "{}" if new is True else json.dumps(new, ensure_ascii=False)
    return LLMatcher.grammar_from_json_schema(source, overrides=COMPACT if grammar.compact else SPACED)


def choice_lark(grammar: Grammar) -> str:
    """One terminal of all the texts, so that their common beginnings are shared."""
    try:
        choices = msgspec.json.decode(grammar.source, type=list[str])
    except msgspec.DecodeError as error:
        raise invalid(grammar, f"not a JSON list of texts: {error}") from error
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise invalid(grammar, f"between 1 and {MAX_CHOICES} non-empty texts are allowed")
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(choices))
    return f"start: CHOICE\nCHOICE: {texts}"


def checked_lark(grammar: Grammar) -> str:
    """A Lark source, or one of GBNF turned into Lark, that names no special token and no stop of its own."""
    source = grammar.source
    if "::=" in LARK_TEXT.sub('""', source):
        try:
            source = any_to_lark(source)
        except Exception as error:  # the converter raises nothing more exact
            raise invalid(grammar, f"not GBNF: {error}") from error
    rules = LARK_TEXT.sub('""', source)
    if "<" in rules:
        raise unsupported("a special token in a grammar")
    if STOP_OPTION.search(rules):
        raise unsupported("the option stop of a rule (suffix and lazy are)")
    if "x-guidance" in source:
        raise unsupported("x-guidance")
    return source


def invalid(grammar: Grammar, reason: str) -> InvalidRequestError:
    name = NAMES.get(grammar.kind, grammar.kind)
    return InvalidRequestError(f"invalid {name}: {reason[:MAX_MESSAGE]}", param="grammar")


def unsupported(what: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(f"{what} is not supported", param="grammar")


def one_line(message: str) -> str:
    return " ".join(message.partition("<state>")[0].replace("<non-verbose/>", "").split())


def refusal(grammar: Grammar, message: str) -> InvalidRequestError:
    """llguidance's message as an error of ours, without what repeats the source."""
    if "oneOf" in message:
        message = "oneOf whose cases may overlap is not supported; use anyOf"
    if named := UNIMPLEMENTED.search(message):
        message = f"{named[1].replace(chr(34), '')}: not supported; with strict false it is left out"
    if grammar.kind == "regex":
        message = message.partition("<state>")[0].rpartition("error:")[2].partition("\n   1 |")[0]
    text = one_line(message)[:MAX_MESSAGE]
    if NOT_DONE.search(text):
        name = NAMES.get(grammar.kind, grammar.kind)
        return UnsupportedParameterError(f"unsupported {name}: {text}", param="grammar")
    return invalid(grammar, text)
