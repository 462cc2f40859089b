"""A GGUF file's vocabulary as `tokenizer.json` and `tokenizer_config.json`.

GGUF names the rule that cuts text before BPE in `tokenizer.ggml.pre` without spelling it out; the rules are those of
the models' official tokenizer.json files, and of llama.cpp's `llama-vocab.cpp`, which agree.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minisgl.errors import ModelError
from minisgl.models.fields import Fields
from minisgl.models.gguf_file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
PREFIX = "tokenizer.ggml."
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACES}",),
    "qwen2": (f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{PUNCTUATION}|{SPACES}",),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    ),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""Regular expressions whose matches are cut out of the text one after another, by the name of the rule."""

ADDS_BOS = ("llama-bpe", "tekken")
"""The rules under which BOS is added where the file does not say."""


def pre_tokenizer(rule: str) -> Any:
    """The tokenizers object of the rule `tokenizer.ggml.pre` names. Raises KeyError for an unknown one.

    `smollm` cuts every digit off, then applies byte level with GPT-2's regex on, as llama.cpp and SmolLM2's own
    tokenizer.json do. The model agrees: no token of its vocabulary crosses a boundary of that regex, and SmolLM2-135M
    gives the same text 3 to 18 % fewer nats per character than with the regex off.
    """
    if rule in ("gpt-2", "smollm"):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return (
            level
            if rule == "gpt-2"
            else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
        )
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[rule]]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class GgufTokenizer:
    """The tokenizer that a GGUF file describes, ready to be saved in Hugging Face's layout.

    Raises ModelError naming file and field when it is missing, contradictory or of an unknown kind.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._fields = Fields(file.metadata, str(file.path))
        self._tokens: list[str] = self._fields.items(f"{PREFIX}tokens", str)
        if len(set(self._tokens)) != len(self._tokens):
            raise file.error(f"{PREFIX}tokens holds a token twice")
        self._types: list[int] = self._fields.items(f"{PREFIX}token_type", int, [NORMAL] * len(self._tokens))
        if len(self._types) != len(self._tokens):
            raise self._fields.error(f"{PREFIX}token_type", f"{len(self._tokens)} types, one a token")
        kind = self._fields.text(f"{PREFIX}model")
        if kind == "gpt2":
            self._adds_bos = self._rule() in ADDS_BOS
            self.tokenizer = self._byte_level()
        elif kind == "llama":
            self._adds_bos = True
            self.tokenizer = self._sentence_piece()
        else:
            raise self._fields.error(f"{PREFIX}model", "gpt2 (byte-level BPE) or llama (SentencePiece BPE)")
        self._add_specials()

    def token_id(self, name: str) -> int | None:
        """The id that the metadata gives for bos, eos, eot, eom, unknown or padding; None where it gives none."""
        key = f"{PREFIX}{name}_token_id"
        if key not in self._fields:
            return None
        token = self._fields.integer(key, least=0)
        if token >= len(self._tokens):
            raise self._fields.error(key, f"below {len(self._tokens)}, the size of the vocabulary")
        return token

    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer: end of sequence, of turn and of message."""
        ids = (self.token_id(name) for name in ("eos", "eot", "eom"))
        return list(dict.fromkeys(token for token in ids if token is not None))

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (token := self.token_id(key)) is not None:
                config[f"{name}_token"] = self._tokens[token]
        if "tokenizer.chat_template" in self._fields:
            config["chat_template"] = self._fields.text("tokenizer.chat_template")
        return config

    def _rule(self) -> str:
        architecture = self._fields.text("general.architecture")
        rule = self._fields.text(f"{PREFIX}pre", "qwen2" if architecture.startswith("qwen") else "missing")
        known = ("smollm", "gpt-2", *SPLITS)
        if rule not in known:
            raise self._file.error(f"{PREFIX}pre {rule} is not supported; {', '.join(known)} are")
        return rule

    def _byte_level(self) -> Tokenizer:
        rule = self._rule()
        pairs = [tuple(merge.split(" ")) for merge in self._fields.items(f"{PREFIX}merges", str)]
        if any(len(pair) != 2 for pair in pairs):
            raise self._file.error(f"{PREFIX}merges holds something else than pairs")
        merges = [(pair[0], pair[1]) for pair in pairs]
        tokenizer = Tokenizer(self._bpe(merges, ignore_merges=rule in ADDS_BOS))
        if rule == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizer(rule)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        """SentencePiece BPE (Llama 2, early Mistral): spaces are `▁`, unknown characters fall back to byte tokens."""
        unknown = self.token_id("unknown")
        if self._fields.flag(f"{PREFIX}remove_extra_whitespaces", False):
            raise self._file.error(f"{PREFIX}remove_extra_whitespaces is not supported")
        prefixed = self._fields.flag(f"{PREFIX}add_space_prefix", True)
        extra: dict[str, Any] = {} if unknown is None else {"unk_token": self._tokens[unknown], "fuse_unk": True}
        tokenizer = Tokenizer(self._bpe(self._scored_merges(), byte_fallback=True, **extra))
        spaces = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
        return tokenizer

    def _bpe(self, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
        vocabulary = {token: index for index, token in enumerate(self._tokens)}
        try:
            return models.BPE(vocab=vocabulary, merges=merges, **options)
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{self._file.path}: {PREFIX}merges does not fit the vocabulary: {error}") from error

    def _scored_merges(self) -> list[tuple[str, str]]:
        """Merges in the order of the merged piece's score: the pairs that SentencePiece would join first."""
        scores: list[float] = self._fields.items(f"{PREFIX}scores", float)
        if len(scores) != len(self._tokens):
            raise self._fields.error(f"{PREFIX}scores", f"{len(self._tokens)} numbers, one a token")
        ids = {token: index for index, token in enumerate(self._tokens) if self._types[index] in (NORMAL, USER_DEFINED)}
        found: list[tuple[float, int, int, str, str]] = []
        for token, index in ids.items():
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in ids and right in ids:
                    found.append((-scores[index], ids[left], ids[right], left, right))
        return [(left, right) for _, _, _, left, right in sorted(found)]

    def _add_specials(self) -> None:
        added = [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(self._tokens, self._types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]
        self.tokenizer.add_tokens(added)
        bos, eos = self.token_id("bos"), self.token_id("eos")
        wanted = [
            ("bos", bos, self._fields.flag(f"{PREFIX}add_bos_token", self._adds_bos and bos is not None)),
            ("eos", eos, self._fields.flag(f"{PREFIX}add_eos_token", False)),
        ]
        around: dict[str, tuple[str, int]] = {}
        for name, token, add in wanted:
            if add and token is None:
                raise self._file.error(f"{PREFIX}add_{name}_token is set, but {PREFIX}{name}_token_id is missing")
            if add and token is not None:
                around[name] = (self._tokens[token], token)
        if around:
            template = [around[name][0] if name in around else "" for name in ("bos", "eos")]
            pieces = [piece for piece in (template[0], "$A", template[1]) if piece]
            self.tokenizer.post_processor = processors.TemplateProcessing(
                single=pieces, special_tokens=list(dict.fromkeys(around.values()))
            )
