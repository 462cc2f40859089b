"""The offline API on the bundled model, the answers held against transformers in float32."""

import itertools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.constraints import Cycle, cycle
from helpers.tiny_models import save_model
from helpers.tiny_tokenizers import byte_fallback_json
from minisgl import LLM, SamplingParams
from minisgl.config import Config, make_config
from minisgl.core.plan import StepPlan
from minisgl.core.types import Grammar
from minisgl.errors import ConfigError, ContextLengthError, EngineDeadError, InvalidRequestError, UnknownKeywordError
from minisgl.formats.hub import locate_model
from minisgl.llm import defer_sigint
from minisgl_bench.fidelity import BEGINNINGS, QUESTIONS

FRANCE, STORY = "The capital of France is", "Once upon a time, in a village by the sea,"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(progress=False, max_running_requests=32, num_pages=512) as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> Any:
    """The bundled model in transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(locate_model(None), dtype=torch.float32)


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers_in_float32(llm: LLM, reference: Any) -> None:
    for completion in llm.generate([FRANCE, STORY, *QUESTIONS, *BEGINNINGS], GREEDY, progress=False):
        prompt, answer = completion.prompt_token_ids, completion.token_ids
        logits = reference(torch.tensor([[*prompt, *answer]])).logits[0]
        assert answer == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def test_chat_knows_the_capital_of_france(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=30), progress=False)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    again, other = llm.chat([question, [{"role": "user", "content": "Hi!"}]], GREEDY, progress=False)
    assert again.text == answer.text
    assert again.cached_tokens > 0
    assert other.text != again.text


def test_prompts_are_text_or_token_ids_of_any_integer_type_and_there_may_be_none(llm: LLM) -> None:
    few = SamplingParams(temperature=0.0, max_tokens=3)
    (as_text,) = llm.generate(FRANCE, few, progress=False)
    assert as_text.text.startswith(" Paris")
    ids = as_text.prompt_token_ids
    arrays: list[Any] = [ids, [ids], np.array(ids), np.array([ids]), [np.array(ids)]]
    for prompts in arrays:
        (same,) = llm.generate(prompts, few, progress=False)
        assert same.token_ids == as_text.token_ids
        assert {type(token) for token in same.prompt_token_ids} == {int}
    assert llm.generate([], GREEDY, progress=False) == []


def test_every_prompt_may_have_its_own_parameters(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    first, until = (SamplingParams(temperature=0.0, max_tokens=n, stop=stop) for n, stop in ((3, ()), (20, (".",))))
    random = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    short, stopped, sampled, same = llm.generate([FRANCE, FRANCE, STORY, STORY], [first, until, random, random])
    assert (len(short.token_ids), short.finish_reason) == (3, "length")
    assert stopped.finish_reason == "stop"
    assert "." not in stopped.text
    assert sampled.token_ids == same.token_ids
    assert len(sampled.token_ids) == 8
    assert "4/4" in capsys.readouterr().err


def assert_idle(llm: LLM) -> None:
    assert not llm.engine.has_work
    assert llm.engine.cache.num_owned == 0


def test_streamed_pieces_join_to_the_text_and_a_stop_string_or_closing_frees_all(llm: LLM) -> None:
    (whole,) = llm.generate(STORY, GREEDY, progress=False)
    pieces = list(llm.stream(STORY, GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    stop = whole.text[20:26]
    until = msgspec.structs.replace(GREEDY, stop=(stop,))
    (cut,) = llm.generate(STORY, until, progress=False)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert_idle(llm)
    stream = llm.stream(STORY, until)
    assert next(delta for delta in stream if delta.finish_reason is not None).finish_reason == "stop"
    assert_idle(llm)
    stream = llm.stream(STORY, SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    with pytest.raises(InvalidRequestError, match="still being streamed"):
        llm.generate("hello", GREEDY, progress=False)
    stream.close()
    assert_idle(llm)


def test_the_first_word_of_a_completion_keeps_its_space(tmp_path: Path) -> None:
    (save_model(tmp_path) / "tokenizer.json").write_text(byte_fallback_json(), "utf-8")
    with LLM(str(tmp_path), progress=False, num_pages=64) as model:
        prompt, (word,) = model.text.encode("a b"), model.text.encode("he", False)
        params = SamplingParams(max_tokens=2, logit_bias={word: 100.0}, stop=("never",))
        for given in ("a b", prompt):
            for each in (params, msgspec.structs.replace(params, stop=())):
                assert [found.text for found in model.generate(given, each, progress=False)] == [" he he"]
            assert "".join(delta.text for delta in model.stream(given, params)) == " he he"
        stopped = msgspec.structs.replace(params, stop=(" he he",))
        assert model.generate(prompt, stopped, progress=False)[0].text == ""


def test_a_bad_prompt_is_refused_before_anything_is_generated(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bad: list[tuple[Any, Any, str]] = [
        ([[1, 2], []], GREEDY, "at least one token"),
        ([[1] * 9000], GREEDY, "maximum context length"),
        *[(["a", "b"], [GREEDY] * n, f"2 prompts, but {n} sampling_params") for n in (0, 1)],
        ("a", SamplingParams(stop=("END", "")), "stop must be"),
        *[(prompts, GREEDY, "text or token ids") for prompts in ([[1.5, 2.0]], [1, "a"], [None], [["a"]])],
        *[(prompts, GREEDY, "text or token ids") for prompts in (b"a", [b"a"], {"prompt": "a"}, [{"prompt": "a"}])],
    ]
    for prompts, params, message in bad:
        with pytest.raises(InvalidRequestError, match=message) as error:
            llm.generate(prompts, params, progress=False)
        assert isinstance(error.value, ContextLengthError) == ("context" in message)
    assert not llm.engine.has_work
    params = SamplingParams(stop="END", max_tokens=4)  # type: ignore[arg-type]  # one text is no sequence of characters
    assert params.stop == ("END",)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert llm.generate("a", params, progress=False)[0].token_ids
    monkeypatch.setattr(llm, "tokenizer", None)
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        next(llm.stream([5], params))


@pytest.mark.parametrize(
    "given",
    [{"seed": 1.5}, {"max_tokens": True}, {"min_tokens": 0.5}, {"temperature": "0"}, {"top_k": None}, {"stop": None},
     {"stop": (5,)}, {"stop_token_ids": 5}, {"logit_bias": {"5": 1}}, {"logprobs": 1.5}, {"grammar": "x"}],
)  # fmt: skip
def test_a_parameter_of_the_wrong_type_is_refused_and_the_model_goes_on(llm: LLM, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=rf"sampling parameters: .*\.{next(iter(given))}"):
        llm.generate("a", SamplingParams(**{"max_tokens": 2, **given}), progress=False)
    for wrong in ({"max_tokens": 2}, None):
        with pytest.raises(InvalidRequestError, match="sampling parameters"):
            llm.generate("a", [wrong], progress=False)  # type: ignore[list-item]
    assert llm.generate("a", SamplingParams(max_tokens=2), progress=False)[0].token_ids


def test_parameters_may_be_numpys_and_any_sequences(llm: LLM) -> None:
    given: Any = {"max_tokens": np.int64(2), "seed": np.uint8(3), "top_p": np.float32(0.5), "stop_token_ids": {7}}
    params = SamplingParams(allowed_token_ids=np.arange(5, 9), bad_word_ids=[range(3)], **given)  # type: ignore[arg-type]
    plain = SamplingParams(max_tokens=2, seed=3, top_p=0.5, stop_token_ids=(7,), allowed_token_ids=(5, 6, 7, 8))
    found = [llm.generate("a", each, progress=False)[0].token_ids for each in (params, plain)]
    assert found[0] == found[1]


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal: a process that a script put into the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("streamed", [False, True])
def test_ctrl_c_ends_the_answers_and_not_the_model(llm: LLM, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    executor, launched = llm.engine.executor, 0
    launch = executor.launch

    def interrupted(plan: StepPlan) -> None:
        nonlocal launched
        launched += 1
        if launched == 3:
            signal.raise_signal(signal.SIGINT)
        launch(plan)

    endless = SamplingParams(max_tokens=500, ignore_eos=True)
    monkeypatch.setattr(executor, "launch", interrupted)
    answers = llm.stream(STORY, endless) if streamed else (llm.generate(p, endless) for p in BEGINNINGS)
    with pytest.raises(KeyboardInterrupt):
        next(itertools.islice(answers, 10, None))
    assert launched < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_idle(llm)
    (answer,) = llm.generate(FRANCE, GREEDY, progress=False)
    assert answer.text.startswith(" Paris")


@pytest.mark.usefixtures("_ctrl_c")
def test_a_second_ctrl_c_does_not_wait_for_the_step() -> None:
    reached = []

    def step() -> None:
        with defer_sigint():
            for number in (1, 2):
                signal.raise_signal(signal.SIGINT)
                reached.append(number)

    with pytest.raises(KeyboardInterrupt):
        step()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_model_says_so() -> None:
    llm = LLM(progress=False, max_running_requests=1, num_pages=8)
    stream = llm.stream("a", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        next(stream)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="closed"):
            llm.generate("a", GREEDY, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_setting_that_a_cpu_cannot_honour_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="fa cannot be used, it needs a CUDA GPU; what works here: torch"):
        LLM(attn="fa,fi")


@torch.inference_mode()
def test_logprobs_come_with_completions_and_are_those_of_transformers(llm: LLM, reference: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, prompt_logprobs=2)
    plain, scored = llm.generate([FRANCE, FRANCE], [GREEDY, params], progress=False)
    assert plain.logprobs is plain.prompt_logprobs is None
    assert scored.logprobs is not None
    assert scored.prompt_logprobs is not None
    assert scored.token_ids == plain.token_ids[:8]
    whole = torch.tensor([scored.prompt_token_ids + scored.token_ids])
    right = reference(whole).logits[0].log_softmax(dim=-1)
    assert scored.prompt_logprobs[0] is None
    given = [score for score in scored.prompt_logprobs[1:] + scored.logprobs if score is not None]
    assert len(given) == whole.shape[1] - 1
    for position, score in enumerate(given):
        assert score.logprob == pytest.approx(float(right[position, whole[0, position + 1]]), abs=1e-3)
        best = right[position].topk(len(score.top_ids))
        assert score.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-3)


def test_penalties_and_biases_change_what_is_said(llm: LLM) -> None:
    loop = "again and again and again and again and"
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    strong = msgspec.structs.replace(params, frequency_penalty=2.0, presence_penalty=2.0)
    plain, varied = llm.generate([loop, loop], [params, strong], progress=False)
    assert len(set(varied.token_ids)) > len(set(plain.token_ids))
    (again,) = llm.text.encode(" Paris")[:1]
    never = msgspec.structs.replace(params, logit_bias={again: -100.0})
    (answer,) = llm.generate(FRANCE, never, progress=False)
    assert again not in answer.token_ids


def test_words_and_tokens_are_kept_out_and_the_stop_is_shown(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=16)
    (plain,) = llm.generate(FRANCE, params, progress=False)
    words = ["Paris", "city"]
    kept_out = msgspec.structs.replace(params, bad_words=words)
    capital = llm.text.encode(" Berlin Rome Paris", add_special_tokens=False)
    few = msgspec.structs.replace(params, allowed_token_ids=tuple(capital))
    shown = msgspec.structs.replace(params, stop=("Paris",), include_stop_str_in_output=True)
    ended = msgspec.structs.replace(params, stop_token_ids=(plain.token_ids[2],), include_stop_str_in_output=True)
    cut = msgspec.structs.replace(params, truncate_prompt_tokens=3)
    others = llm.generate([FRANCE] * 6, [params, kept_out, few, shown, ended, cut], progress=False)
    assert others[0].token_ids == plain.token_ids
    assert "Paris" in plain.text
    assert not any(word in others[1].text for word in words)
    assert others[1].token_ids != plain.token_ids
    assert set(others[2].token_ids) <= set(capital)
    assert others[3].text == plain.text[: plain.text.index("Paris") + 5]
    assert (others[3].finish_reason, others[3].stop_reason) == ("stop", "Paris")
    assert (others[4].text, others[4].stop_reason) == (llm.text.decode(plain.token_ids[:3]), plain.token_ids[2])
    assert others[5].prompt_token_ids == plain.prompt_token_ids[-3:]
    assert "".join(piece.text for piece in llm.stream(FRANCE, shown)) == others[3].text
    room = msgspec.structs.replace(params, truncate_prompt_tokens=-1)
    assert len(llm.model.truncate([5] * 9000, room)) == llm.model.max_seq_len - 16
    for bad, name in (({"bad_words": ("",)}, "bad_words"), ({"allowed_token_ids": ()}, "allowed_token_ids")):
        with pytest.raises(InvalidRequestError, match=name):
            llm.generate(FRANCE, SamplingParams(**bad), progress=False)


def test_a_grammar_is_obeyed_where_grammars_are(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    eos = llm.model.eos_token_ids[0]
    monkeypatch.setattr(llm.engine, "constraints", lambda grammar: Cycle(grammar, llm.model.vocab_size, eos))
    params = SamplingParams(temperature=1.0, seed=3, grammar=cycle(50, 6), ignore_eos=True)
    breaks = msgspec.structs.replace(params, grammar=Grammar(kind="lark", source="breaks"))
    answer, other, bad = llm.generate([FRANCE] * 3, [params, GREEDY, breaks], progress=False)
    assert answer.finish_reason == "stop"
    assert [7 * i <= t < 7 * i + 50 for i, t in enumerate(answer.token_ids[:6])] == [True] * 6
    assert answer.token_ids[6:] == [eos]
    assert other.text.startswith(" Paris")
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 3)
    assert "no fourth mask" in (bad.error or "")
    monkeypatch.setattr(llm.engine, "constraints", None)
    with pytest.raises(InvalidRequestError, match="without structured output"):
        llm.generate("a", params, progress=False)
    assert_idle(llm)


POPULATION = {"type": "integer", "minimum": 0, "maximum": 99_999_999}
CITY = {"city": {"type": "string", "maxLength": 20}, "population": POPULATION, "capital": {"type": "boolean"}}
SCHEMA = {"type": "object", "properties": CITY, "required": list(CITY), "additionalProperties": False}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_kind_of_grammar_beside_a_free_request_that_does_not_change(llm: LLM, temperature: float) -> None:
    grammars = (
        Grammar(kind="regex", source="[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        Grammar(kind="choice", source='["yes", "no", "perhaps"]'),
        Grammar(kind="lark", source='start: sum "; " sum\nsum: /[0-9]{1,3}/ " + " /[0-9]{1,3}/'),
        Grammar(kind="json_schema", source='{"type":"array","items":{"type":"null"},"minItems":2,"maxItems":2}'),
        Grammar(kind="json_schema", source=json.dumps(SCHEMA)),
    )
    (alone,) = llm.generate([STORY], GREEDY, progress=False)
    mate, date, choice, additions, record, city = llm.generate(
        [STORY, "The date is ", "Is water wet? ", "Two sums: ", "A record: ", "Paris as JSON: "],
        [GREEDY, *(SamplingParams(temperature=temperature, seed=1, max_tokens=160, grammar=g) for g in grammars)],
        progress=False,
    )
    assert mate.token_ids == alone.token_ids
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date.text)
    assert choice.text in ("yes", "no", "perhaps")
    assert re.fullmatch(r"\d{1,3} \+ \d{1,3}; \d{1,3} \+ \d{1,3}", additions.text)
    assert json.loads(record.text) == [None, None]
    jsonschema.validate(json.loads(city.text), SCHEMA)
    assert {found.finish_reason for found in (date, choice, additions, record, city)} == {"stop"}


@pytest.mark.parametrize(
    ("made", "keyword", "message"),
    [
        (LLM, "pagesize", "there is no setting pagesize; did you mean page_size?"),
        (LLM, "modle", "did you mean model?"),
        (LLM, "tensor_parallel_size", "did you mean tp?"),
        (LLM, "attention_backend", "did you mean attn?"),
        (LLM, "memory_ration", "did you mean memory_ratio?"),
        (LLM, "quantum", "there is no setting quantum"),
        (SamplingParams, "temprature", "SamplingParams has no parameter temprature; did you mean temperature?"),
        (SamplingParams, "max_new_tokens", "did you mean max_tokens?"),
        (SamplingParams, "stop_tokens_ids", "did you mean stop_token_ids?"),
        (SamplingParams, "beam_width", "SamplingParams has no parameter beam_width"),
    ],
)
def test_a_keyword_that_there_is_not_is_answered_with_the_most_similar(made: Any, keyword: str, message: str) -> None:
    with pytest.raises(UnknownKeywordError) as caught:
        made(**{keyword: 3})
    assert caught.value.message.endswith(message)
    assert isinstance(caught.value, TypeError), "what Python raises"
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("fields", [{"model": "a folder"}, {"tp": 2}, {"pagesize": 3}])
def test_a_config_beside_fields_of_one_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not both"):
        LLM(config=Config(), **fields)


def test_settings_have_their_types_but_may_be_numpys_paths_and_any_sequences() -> None:
    for name, value in (("page_size", "16"), ("tp", 1.5), ("num_pages", True), ("cache", None), ("memory_ratio", "1")):
        with pytest.raises(ConfigError, match=rf"settings: Expected .*\.{name}"):
            make_config(**{name: value})
    given = {"page_size": np.int64(8), "request_timeout": 3, "model": Path("a"), "api_key": ["one"]}
    assert make_config(**given) == Config(page_size=8, request_timeout=3.0, model="a", api_key=("one",))


def test_the_notes_have_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_API_KEY", "a secret")
    with LLM(str(save_model(tmp_path)), progress=False, num_pages=64) as model:
        assert model.config.api_key == ("a secret",)
        assert "a secret" not in "".join(model.notes)
