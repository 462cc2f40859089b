"""What is sent and when: sessions of turns, whose prompts are made of named segments so that what recurs is known.

Traces are of Qwen-Bailian (Wang et al., "KVCache Cache in the Wild", ATC 2025), Mooncake (Qin et al., FAST 2025) or
Azure (Patel et al., "Splitwise", ISCA 2024), told apart by their first line.
"""

import argparse
import csv
import dataclasses
import datetime
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np

from minisgl.core.types import SamplingParams
from minisgl.errors import ConfigError, InvalidRequestError
from minisgl_bench.workload import CPU_SPEC, HIGHEST_TOKEN, WorkloadSpec, make_workload

Count = Annotated[int, msgspec.Meta(ge=1)]
AZURE_FIELDS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")  # CSV; the others are JSON lines
SECONDS: Final = {"bailian": 1.0, "mooncake": 1e-3}  # the unit of a format's `timestamp`, in s
BLOCK: Final = {"bailian": 16, "mooncake": 512, "azure": 0}  # tokens that a hash id stands for
# Of a recorded request, whose answer has the recorded length whatever ended it, and any tokens.
UNTIL_LENGTH: Final[dict[str, Any]] = {
    "max_tokens": None, "min_tokens": 0, "ignore_eos": True, "stop": (), "stop_token_ids": (), "grammar": None,
    "prompt_logprobs": None, "truncate_prompt_tokens": None, "allowed_token_ids": None, "bad_words": (),
    "bad_word_ids": (),
}  # fmt: skip
GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
TRACE_REQUESTS: Final = 1000
FEWEST_WORDS, PROBE_WORDS = 16, 8
# Common words, most of which are one token, with a space before them, in most vocabularies.
WORDS: Final[Sequence[str]] = """\
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my now
over such our man me even most made after also did many off before must well back through years much where
your way down should because long each just state people those too little good world make very year still
see work life men day get here between own under right house water small place high number school great city
group part name line large side end
""".split()  # noqa: SIM905


class TraceRequest(msgspec.Struct, frozen=True):
    """A line of JSON, where `arrival` is in the unit of the format, and then in s."""

    arrival: Annotated[float, msgspec.Meta(ge=0)] = msgspec.field(name="timestamp")
    input_length: Count
    output_length: Count
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    sampling: SamplingParams | None = None  # this and priority: of `minisgl serve --record`
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] = 0


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival, the first at 0; `block` is the size of their blocks in tokens, 0 without any."""

    format: str
    block: int
    requests: tuple[TraceRequest, ...]


def read_trace(path: Path, limit: int) -> Trace:
    """The first `limit` requests of a trace. Raises ConfigError naming the file, and the line where one is wrong."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            lines = list(itertools.islice(filled, limit + 1))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this is no text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not lines:
        raise ConfigError(f"{path}: the trace is empty")
    requests, names = [], [name.strip() for name in lines[0][1].split(",")]
    kind = "bailian" if '"chat_id"' in lines[0][1] else "mooncake"
    if not lines[0][1].lstrip().startswith("{"):
        kind = "azure"
        if any(name not in names for name in AZURE_FIELDS):
            raise ConfigError(f"{path}: line 1 is neither a JSON object nor a header with {', '.join(AZURE_FIELDS)}")
    for number, line in lines[1:] if kind == "azure" else lines[:limit]:
        try:
            requests.append(read_azure(line, names) if kind == "azure" else read_json(line, kind))
        except (ValueError, InvalidRequestError) as error:  # msgspec's errors are ValueErrors
            raise ConfigError(f"{path}:{number}: {error}") from error
    if not requests:
        raise ConfigError(f"{path}: the trace has no requests")
    requests.sort(key=lambda request: request.arrival)
    start, replace = requests[0].arrival, msgspec.structs.replace
    return Trace(kind, BLOCK[kind], tuple(replace(request, arrival=request.arrival - start) for request in requests))


def read_json(line: str, kind: str) -> TraceRequest:
    row = msgspec.json.decode(line, type=TraceRequest)
    ids, length, block = len(row.hash_ids), row.input_length, BLOCK[kind]
    if ids and not length // block <= ids <= -(-length // block):
        raise ValueError(f"{ids} hash_ids for {length} tokens in blocks of {block} ({kind})")
    sampling = None if row.sampling is None else msgspec.structs.replace(row.sampling.validate(), **UNTIL_LENGTH)
    return msgspec.structs.replace(row, arrival=row.arrival * SECONDS[kind], sampling=sampling)


def read_azure(line: str, names: Sequence[str]) -> TraceRequest:
    """A request of a trace as CSV, whose dates are in UTC unless they say otherwise. Raises ValueError."""
    row = dict(zip(names, next(csv.reader([line])), strict=False))
    if missing := [name for name in AZURE_FIELDS if name not in row]:
        raise ValueError(f"the line has no {missing[0]}")
    when = datetime.datetime.fromisoformat(row["TIMESTAMP"])
    tokens_in, tokens_out = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    if tokens_in < 1 or tokens_out < 1:
        raise ValueError("ContextTokens and GeneratedTokens must be at least 1")
    return TraceRequest(when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp(), tokens_in, tokens_out)


class Segment(NamedTuple):
    """`length` tokens of the endless sequence named `key`: equal keys have equal tokens as far as both go."""

    key: tuple[str, int]
    length: int


class ChatMessage(NamedTuple):
    role: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Turn:
    messages: tuple[ChatMessage, ...]
    output_length: int
    sampling: SamplingParams | None = None  # where a recording says it
    priority: int = 0

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(segment for message in self.messages for segment in message.segments)

    @property
    def input_length(self) -> int:
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True)
class Session:
    """Requests of one client: the first `due` s after the start, each other `think` s after the answer before."""

    turns: tuple[Turn, ...]
    due: float = 0.0
    think: float = 0.0


def single(segments: Sequence[Segment], output_length: int) -> Turn:
    return Turn((ChatMessage("user", tuple(segments)),), output_length)


def cut(segments: Sequence[Segment], length: int) -> list[Segment]:
    kept: list[Segment] = []
    for segment in segments:
        if length > 0:
            kept.append(Segment(segment.key, min(segment.length, length)))
        length -= segment.length
    return kept


def from_trace(trace: Trace, scale: float, max_input: int | None, max_output: int | None) -> list[Session]:
    """A session for each request, cut to the limits. Behind a prompt's blocks come tokens of its own."""
    sessions = []
    for index, request in enumerate(trace.requests):
        blocks = [Segment(("block", name), trace.block) for name in request.hash_ids]
        kept = min(request.input_length, max_input or request.input_length)
        prompt = ChatMessage("user", tuple(cut([*blocks, Segment(("own", index), kept)], kept)))
        length = min(request.output_length, max_output or request.output_length)
        turn = Turn((prompt,), length, request.sampling, request.priority)
        sessions.append(Session((turn,), request.arrival * scale))
    return sessions


def from_workload(spec: WorkloadSpec) -> list[Session]:
    workload = make_workload(spec, vocab_size=HIGHEST_TOKEN + 1)
    pairs = enumerate(zip(workload.prompts, workload.output_lens, strict=True))
    return [Session((single([Segment(("own", i), len(prompt))], length),)) for i, (prompt, length) in pairs]


def from_chats(
    seed: int, chats: int, turns: int, system_prompts: int, system_len: int,
    message_len: tuple[int, int], answer_len: tuple[int, int], think: float,
) -> list[Session]:  # fmt: skip
    """Conversations of `turns` messages, each after all said before: answers of made-up tokens, a shared system prompt.

    Conversation i has system prompt i modulo `system_prompts`. Ranges are inclusive, in tokens.
    """
    rng = random.Random(seed)
    sessions = []
    for chat in range(chats):
        history = [ChatMessage("system", (Segment(("system", chat % system_prompts), system_len),))]
        turned = []
        for name in range(chat * turns, (chat + 1) * turns):
            history.append(ChatMessage("user", (Segment(("message", name), rng.randint(*message_len)),)))
            turned.append(Turn(tuple(history), rng.randint(*answer_len)))
            history.append(ChatMessage("assistant", (Segment(("answer", name), turned[-1].output_length),)))
        sessions.append(Session(tuple(turned), think=think))
    return sessions


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Times in s, float64[count], the first one 0. Gaps have mean 1 / `rate` and a gamma distribution.

    `burstiness` is the distribution's shape: 1 is a Poisson process, below that requests come in bursts, infinity
    spaces them evenly. The gaps' coefficient of variation is 1 / sqrt(burstiness).
    """
    if math.isinf(burstiness):
        return np.arange(count) / rate
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count - 1)
    return np.concatenate(([0.0], np.cumsum(gaps)))


def with_arrivals(sessions: Sequence[Session], rate: float, burstiness: float, seed: int) -> list[Session]:
    times = arrival_times(len(sessions), rate, burstiness, seed)
    return [dataclasses.replace(session, due=float(due)) for session, due in zip(sessions, times, strict=True)]


def make_sessions(options: argparse.Namespace, kind: str, value: float, seed: int) -> list[Session]:
    default = CPU_SPEC if options.small else WorkloadSpec()
    inputs, outputs = options.input_len or default.input_len, options.output_len or default.output_len
    if options.trace is not None:
        trace = read_trace(options.trace, options.requests or TRACE_REQUESTS)
        scale = value if kind == "scale" else 1.0
        sessions = from_trace(trace, scale, options.max_input_len, options.max_output_len)
    elif options.chats is not None:
        shape = (options.chats, options.turns, options.system_prompts, options.system_len)
        sessions = from_chats(seed, *shape, inputs, outputs, options.think)
    else:
        count = options.requests or default.num_requests
        sessions = from_workload(WorkloadSpec(num_requests=count, input_len=inputs, output_len=outputs, seed=seed))
    return with_arrivals(sessions, value, options.burstiness, seed) if kind == "rate" else sessions


@dataclass(frozen=True)
class Repeated:
    """Sessions `times` over, one pass behind the other: each by new users, with nothing in common with the ones before.

    Made while they are taken: a million of them would fill the memory.
    """

    sessions: Sequence[Session]
    times: int

    def __iter__(self) -> Iterator[Session]:
        count, last = len(self.sessions), self.sessions[-1].due
        period = last * count / max(1, count - 1)
        for number in range(self.times):
            for session in self.sessions:
                turns = tuple(renamed(turn, f"{number}/") if number else turn for turn in session.turns)
                yield Session(turns, session.due + number * period, session.think)


def renamed(turn: Turn, mark: str) -> Turn:
    messages = [
        ChatMessage(role, tuple(Segment((mark + name, number), length) for (name, number), length in segments))
        for role, segments in turn.messages
    ]
    return dataclasses.replace(turn, messages=tuple(messages))


def all_turns(sessions: Iterable[Session]) -> list[Turn]:
    return [turn for session in sessions for turn in session.turns]


def require_fit(sessions: Sequence[Session], limit: int | None) -> None:
    needs = [turn.input_length + turn.output_length for turn in all_turns(sessions)]
    if limit is not None and (long := [need for need in needs if need > limit]):
        raise ConfigError(
            f"{len(long)} of {len(needs)} requests are longer than the {limit} tokens that the server takes, the "
            f"longest has {max(long)}: give --max-input-len and --max-output-len, or shorter ranges"
        )


def segment_numbers(seed: int, segments: Sequence[Segment], span: int) -> np.ndarray:
    """Numbers below `span`, int64[total], of seed, key, place; mixed as in SplitMix64 (Steele et al., OOPSLA 2014)."""
    keys = [f"{seed}/{name}/{number}".encode() for (name, number), _ in segments]
    bases = [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) for key in keys]
    lengths = np.array([segment.length for segment in segments], np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = (np.arange(lengths.sum()) - starts + 1).astype(np.uint64)
    bits = np.repeat(np.array(bases, np.uint64), lengths) + place * GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    numbers: np.ndarray = (bits ^ (bits >> np.uint64(31))) % np.uint64(span)
    return numbers.astype(np.int64)


def expected_hits(prompts: Iterable[Sequence[Segment]], page: int) -> list[int]:
    """For each prompt the tokens that a cache without limits holds: whole pages, and never the last token."""
    seen: set[bytes] = set()
    hits = []
    for segments in prompts:
        tokens = segment_numbers(0, segments, 2**62)
        prefix, matched = b"", 0
        for start in range(0, len(tokens) - page + 1, page):
            prefix = hashlib.blake2b(prefix + tokens[start : start + page].tobytes(), digest_size=16).digest()
            matched += page if prefix in seen else 0  # where a page is new, all behind it are
            seen.add(prefix)
        hits.append(min(matched, (len(tokens) - 1) // page * page))
    return hits


@dataclass(frozen=True)
class IdPrompts:
    """Token ids for /v1/completions, from `low` up to below `high`."""

    low: int
    high: int

    def fields(self, turn: Turn, seed: int, answers: Sequence[str]) -> dict[str, Any]:
        """What a request's body says of the prompt; `answers` were given to the turns before."""
        return {"prompt": (segment_numbers(seed, turn.segments, self.high - self.low) + self.low).tolist()}

    def expected_tokens(self, turn: Turn) -> int | None:
        """The prompt's tokens as the server should count them; None where they depend on its chat template."""
        return turn.input_length


@dataclass(frozen=True)
class TextPrompts:
    """Words for /v1/completions or, if `chat`, messages. The server counts `overhead` tokens beside them, as BOS."""

    words: tuple[str, ...]
    overhead: int
    chat: bool = False

    def text(self, segments: Sequence[Segment], seed: int, less: int = 0) -> str:
        numbers = segment_numbers(seed, segments, len(self.words)).tolist()
        return " ".join(self.words[number] for number in numbers[: max(1, len(numbers) - less)])

    def fields(self, turn: Turn, seed: int, answers: Sequence[str]) -> dict[str, Any]:
        less = self.overhead if len(turn.messages) == 1 or not self.chat else 0
        if not self.chat:
            return {"prompt": self.text(turn.segments, seed, less)}
        given, messages = list(answers), []
        for role, segments in turn.messages:
            content = given.pop(0) if role == "assistant" else self.text(segments, seed, less)
            messages.append({"role": role, "content": content})
        return {"messages": messages}

    def expected_tokens(self, turn: Turn) -> int | None:
        return turn.input_length if len(turn.messages) == 1 or not self.chat else None


def calibrate(count: Callable[[str], int]) -> tuple[tuple[str, ...], int]:
    first, half, advice = WORDS[0], PROBE_WORDS // 2, "use --endpoint ids, which sends token ids"
    known = count(" ".join([first] * PROBE_WORDS))
    overhead = known - PROBE_WORDS
    good = [w for w in WORDS if overhead >= 0 and count(" ".join([first] * half + [w] * half)) == known]
    if len(good) < FEWEST_WORDS:
        raise ConfigError(f"the server's tokenizer has a token each for {len(good)} common words only; {advice}")
    trial = TextPrompts(tuple(good), 0).text([Segment(("trial", 0), 4 * len(good))], 0)
    if (seen := count(trial)) != 4 * len(good) + overhead:
        raise ConfigError(f"{4 * len(good)} words that are one token each are {seen} tokens together; {advice}")
    return tuple(good), overhead
