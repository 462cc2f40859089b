"""The bundled model held to structured output."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema
import pytest

from minisgl import LLM, SamplingParams
from minisgl.core.types import Grammar

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "population", "capital"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Tell me about Paris as JSON: city, population, capital."}]
FREE = "Once upon a time"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(progress=False, max_running_requests=8, num_pages=256) as model:
        yield model


def params(kind: str, source: str, temperature: float = 0.0) -> SamplingParams:
    grammar = Grammar(kind=kind, source=source)  # type: ignore[arg-type]
    return SamplingParams(temperature=temperature, seed=1, max_tokens=160, grammar=grammar)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_its_schema(llm: LLM, temperature: float) -> None:
    held = params("json_schema", json.dumps(CITY), temperature)
    (answer,) = llm.chat(QUESTION, held, progress=False)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), CITY)


def test_every_kind_beside_a_free_request_that_does_not_change(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=24)
    (alone,) = llm.generate([FREE], free, progress=False)
    mate, date, choice, additions, record = llm.generate(
        [FREE, "The date is ", "Is water wet? ", "Two sums: ", "A record: "],
        [
            free,
            params("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}"),
            params("choice", '["yes", "no", "perhaps"]'),
            params("lark", 'start: sum "; " sum\nsum: /[0-9]{1,3}/ " + " /[0-9]{1,3}/'),
            params("json_schema", '{"type":"array","items":{"type":"null"},"minItems":2,"maxItems":2}'),
        ],
        progress=False,
    )
    assert mate.token_ids == alone.token_ids
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date.text)
    assert choice.text in ("yes", "no", "perhaps")
    assert re.fullmatch(r"\d{1,3} \+ \d{1,3}; \d{1,3} \+ \d{1,3}", additions.text)
    assert json.loads(record.text) == [None, None]
    assert {found.finish_reason for found in (date, choice, additions, record)} == {"stop"}
