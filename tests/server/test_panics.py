"""A panic of a library in native code, which is no Exception, costs the one request that led to it."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
import torch

from helpers.grammars import regex, tiny_vocabulary
from helpers.server_process import read_metrics
from helpers.serving import MODEL, Serving
from helpers.tiny_models import save_model
from helpers.tiny_tokenizers import byte_level_json, write_tokenizer
from minisgl.core import weights
from minisgl.core.model_config import read_spec
from minisgl.core.request_state import make_constraint
from minisgl.errors import NO_PANICS, InvalidRequestError, ModelError, NativePanicError, UnsupportedParameterError
from minisgl.formats.gguf import pre_tokenizer
from minisgl.text import grammar, tokenizer
from minisgl.text.grammar import MatcherConstraint, Vocabulary, compile_grammar
from minisgl.text.grammar_check import judge
from minisgl.text.tokenizer import Tokenizer


class PanicException(BaseException):
    """What PyO3 raises for a panic; every library has its own, and exports it not."""


def panics(*_: Any, **__: Any) -> Any:
    raise PanicException("planted")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (PanicException("x"), NativePanicError),
        *((error, type(error)) for error in (ValueError("x"), MemoryError(), KeyboardInterrupt(), SystemExit(1))),
        (asyncio.CancelledError(), asyncio.CancelledError),
        (GeneratorExit(), GeneratorExit),
    ],
)
def test_panics_become_errors_and_nothing_else_does(error: BaseException, raised: type[BaseException]) -> None:
    with pytest.raises(raised), NO_PANICS:
        raise error


def split_json(rule: str) -> str:
    """The byte-level tokenizer with the regex of a model family before it, which gives up on long white space."""
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    backend.pre_tokenizer = pre_tokenizer(rule)
    return backend.to_str()


TOO_MUCH = " " * 11_000_000 + "x"
SAY = {"max_tokens": 3}
TAKES_TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/completions": ({"prompt": TOO_MUCH, **SAY}, "prompt"),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": TOO_MUCH}], **SAY}, "messages"),
    "/generate": ({"text": TOO_MUCH}, "text"),
    "/tokenize": ({"prompt": TOO_MUCH}, "prompt"),
}


@pytest.mark.serving(state=split_json("qwen2"), max_seq_len=2**24)
async def test_a_text_that_the_tokenizer_panics_on_is_refused(server: Serving) -> None:
    for path, (body, param) in TAKES_TEXT.items():  # one after the other in the only thread for large bodies
        refused = await server.http.post(path, json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert "the tokenizer cannot take this text" in error["message"]
    assert not server.engine.seen
    answer = await server.openai.completions.create(model=MODEL, prompt="a fox", max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    page = read_metrics((await server.http.get("/metrics")).text)
    assert [value for name, value in page.items() if "preparing" in name] == [0.0]


class PanickingDecoder:
    """A DecodeStream that panics at the third token."""

    def __init__(self, **_: Any) -> None:
        self.steps = 0

    def step(self, backend: tokenizers.Tokenizer, token: int) -> str:
        self.steps += 1
        return panics() if self.steps == 3 else backend.decode([token])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_a_panic_while_a_completion_is_decoded_ends_that_one(
    server: Serving, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    ask: dict[str, Any] = {"prompt": "a fox"}
    if path == "/v1/chat/completions":
        ask = {"messages": [{"role": "user", "content": "a fox"}]}
    elif path == "/generate":
        ask = {"text": "a fox", "sampling_params": {"max_new_tokens": 99}}
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "DecodeStream", PanickingDecoder)
        answer = await server.http.post(path, json={**ask, "stream": stream})
    if stream and answer.status_code == 200:
        *_, last, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n")[:-1]]
        assert done == "[DONE]"
        error = json.loads(last)["error"]
    else:
        assert answer.status_code == 500
        error = answer.json()["error"]
    assert error == {"message": "planted", "type": "server_error", "param": None, "code": "internal_error"}
    await server.until(lambda: not server.engine.live)
    assert (await server.openai.completions.create(model=MODEL, prompt="a", max_tokens=3)).choices[0].text == "aaa"


async def test_a_panic_while_tokens_are_decoded_is_a_500(server: Serving) -> None:
    backend = server.tokenizer.backend
    server.tokenizer.backend = Mock(decode=panics)
    answer = await server.http.post("/detokenize", json={"tokens": [5]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    server.tokenizer.backend = backend
    assert (await server.http.post("/detokenize", json={"tokens": server.tokenizer.encode("a")})).json() == {
        "prompt": "a"
    }


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return tiny_vocabulary(tmp_path_factory.mktemp("tiny"))


def test_a_panic_of_a_grammar_ends_its_request(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Mock(unsafe_compute_mask_ptr=panics, consume_token=panics, deep_copy=panics)
    constraint = MatcherConstraint(broken, vocabulary)
    mask = np.zeros(vocabulary.num_words, np.int32)
    for call in (lambda: constraint.accept(5), lambda: constraint.fill(mask), constraint.copy):
        with pytest.raises(NativePanicError, match="planted"):
            call()
    monkeypatch.setattr(grammar, "LLMatcher", Mock(side_effect=panics, grammar_from_regex=lambda source: source))
    with pytest.raises(InvalidRequestError, match="this regex cannot be followed: planted"):
        make_constraint(lambda grammar: compile_grammar(grammar, vocabulary), regex("a+"))
    assert "cannot be compiled: NativePanicError" in str(judge(b'{"kind":"regex","source":"a"}', vocabulary))


def test_a_panic_over_a_models_files_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model")
    spec = read_spec(folder)

    def load() -> object:
        return weights.load_weights(folder, spec, torch.float32, torch.device("cpu"))

    cases: list[tuple[Any, str, Any, Callable[[], object], type[Exception], str]] = [
        (weights, "safe_open", panics, load, ModelError, r"model\.safetensors: .*planted"),
        (tokenizers, "Tokenizer", Mock(from_file=panics), lambda: Tokenizer.load(folder), ModelError,
         r"tokenizer\.json: .*planted"),
        (grammar, "LLTokenizer", panics, lambda: Vocabulary(write_tokenizer(tmp_path), 410, [1]),
         UnsupportedParameterError, "planted"),
    ]  # fmt: skip
    for module, name, planted, call, kind, words in cases:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, planted)
            with pytest.raises(kind, match=words):
                call()
