"""The vocabulary that masks are tested with."""

from __future__ import annotations

import pytest

from helpers.grammars import tiny_vocabulary, token_bytes
from minisgl.text.grammar import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A small one."""
    return tiny_vocabulary(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pieces(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes of each token."""
    return token_bytes(vocabulary)
