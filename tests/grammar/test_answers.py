"""The bundled model's own answers, held to a form."""

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


def params(grammar: Grammar | None, **changes: float) -> SamplingParams:
    return SamplingParams(temperature=changes.get("temperature", 0.0), seed=1, max_tokens=160, grammar=grammar)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_its_schema(llm: LLM, temperature: float) -> None:
    held = params(Grammar(kind="json_schema", source=json.dumps(CITY)), temperature=temperature)
    (answer,) = llm.chat(QUESTION, held, progress=False)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), CITY)


def test_forms_of_every_kind_beside_a_free_mate_that_does_not_change(llm: LLM) -> None:
    (alone,) = llm.generate([FREE], SamplingParams(temperature=0.0, max_tokens=24), progress=False)
    several = llm.generate(
        [FREE, "The date is ", "Is water wet? ", "Two sums: ", "A record: "],
        [
            SamplingParams(temperature=0.0, max_tokens=24),
            params(Grammar(kind="regex", source="[0-9]{4}-[0-9]{2}-[0-9]{2}")),
            params(Grammar(kind="choice", source='["yes", "no", "perhaps"]')),
            params(Grammar(kind="lark", source='start: sum "; " sum\nsum: /[0-9]{1,3}/ " + " /[0-9]{1,3}/')),
            params(
                Grammar(kind="json_schema", source='{"type":"array","items":{"type":"null"},"minItems":2,"maxItems":2}')
            ),
        ],
        progress=False,
    )
    free, date, choice, sums, record = several
    assert free.token_ids == alone.token_ids
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date.text)
    assert choice.text in ("yes", "no", "perhaps")
    assert re.fullmatch(r"\d{1,3} \+ \d{1,3}; \d{1,3} \+ \d{1,3}", sums.text)
    assert json.loads(record.text) == [None, None]
    assert {answer.finish_reason for answer in several[1:]} == {"stop"}
