"""Twenty prompts for the bundled model."""

from pathlib import Path

from tokenizers import Tokenizer

QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Write a haiku about the sea.", "What is 17 + 25?",
    "Explain gravity to a child.", "Who wrote Hamlet?", "List the planets in order.", "Translate 'good day' to French.",
    "What does a compiler do?", "Give me a recipe for pancakes.",
)  # fmt: skip
BEGINNINGS = (
    "Once upon a time", "The year 1999 had", "def area(radius):\n    ", "In the beginning", "Dear Sir or Madam,\n",
    "The three laws of motion are", "Invoice #20431: 12 x $1,234.50 =", "She opened the door and", "import numpy as",
    "Water boils at",
)  # fmt: skip


def bundled_prompts(folder: Path) -> list[list[int]]:
    """The prompts as token ids of the bundled model in `folder`: questions as chats, beginnings as they are."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    return [tokenizer.encode(text).ids for text in (*chats, *BEGINNINGS)]
