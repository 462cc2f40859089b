"""The vocabulary that masks are tested with, and the bytes of each of its tokens."""

import pytest

from helpers.grammars import tiny_vocabulary, token_bytes
from minisgl.text.grammar import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return tiny_vocabulary(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pieces(vocabulary: Vocabulary) -> list[bytes]:
    return token_bytes(vocabulary)
