"""Twenty prompts for the bundled model."""

from pathlib import Path

from tokenizers import Tokenizer

from minisgl_bench.fidelity import BEGINNINGS, QUESTIONS


def bundled_prompts(folder: Path) -> list[list[int]]:
    """The prompts as token ids of the bundled model in `folder`: questions as chats, beginnings as they are."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    return [tokenizer.encode(text).ids for text in (*chats, *BEGINNINGS)]
