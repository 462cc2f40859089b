"""What the sessions of Python's clients ask for, and how they report."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the capital of France?"


class GetWeather(BaseModel):
    """The weather in a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    unit: Literal["C", "F"]


class Answer(BaseModel):
    """An answer about a capital."""

    model_config = ConfigDict(extra="forbid")
    capital: str = Field(max_length=20)
    large: bool


def report(step: str, seen: Any) -> None:
    print(json.dumps({"step": step, "seen": seen}), flush=True)
