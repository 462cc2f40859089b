"""JSON schemas that others published, fetched from npm: what is followed validates, what is not is refused by name."""

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.grammars import json_schema, sample_text, tiny_vocabulary, token_bytes, validate
from minisgl.errors import InvalidRequestError
from minisgl.text.grammar import compile_grammar

pytestmark = pytest.mark.clients

PACKAGES = (
    "@angular-devkit/build-angular@21.2.24", "@angular/cli@21.2.28", "@nestjs/schematics@11.1.0", "@nx/angular@23.2.1",
    "@nx/js@23.3.1", "@nx/node@23.2.1", "@nx/react@23.3.1", "@nx/web@23.2.1", "@schematics/angular@21.2.28",
    "css-loader@7.1.5", "sass-loader@16.0.8", "vega-lite@6.4.3", "webpack@5.112.2",
)  # fmt: skip
LARGEST = 200_000  # bytes of a schema that is read
WANDERS = (0, 5, 20, 40, 80)
KEYS = frozenset({"properties", "definitions", "$defs", "type", "oneOf", "anyOf", "$ref", "items"})


def schemas_of(package: str, folder: Path) -> Iterator[tuple[str, Any]]:
    command = ["npm", "pack", "--silent", package]
    packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    with tarfile.open(folder / packed.stdout.split()[-1]) as files:
        for file in files:
            named = any(word in file.name for word in ("schema", "options.json"))
            if not (named and file.name.endswith(".json") and file.size < LARGEST):
                continue
            content = files.extractfile(file)
            assert content is not None
            schema = json.load(content)
            if isinstance(schema, dict) and KEYS & set(schema):
                yield f"{package} {file.name}", schema


def test_every_walk_through_a_published_schema_validates(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(tmp_path / "model")
    pieces = token_bytes(vocabulary)
    followed, refused = 0, {}
    for package in PACKAGES:
        for name, schema in schemas_of(package, tmp_path):
            try:
                start = compile_grammar(json_schema(schema), vocabulary)
            except InvalidRequestError as error:
                refused[name] = error.message
                continue
            for seed, free_tokens in enumerate(WANDERS):
                validate(sample_text(start.copy(), pieces, seed, free_tokens), schema)
            followed += 1
    print(f"{followed} followed, {len(refused)} refused")
    assert followed >= 100
    for message in refused.values():
        assert message.startswith(("unsupported json schema: ", "invalid json schema: Resource")), message
