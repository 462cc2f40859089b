"""A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) as a folder in Hugging Face's layout.

The header is read here rather than with `gguf.GGUFReader`, which takes 30 times as long (2 s for 49,152 tokens) and
trusts the counts it finds in a file; the `gguf` package undoes the block formats.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from minisgl.core.model_config import Fields, ModelSpec, read_rope, read_spec, require_file
from minisgl.core.weights import INDEX, Progress, Source, parameters
from minisgl.errors import NO_PANICS, ModelError

CONVERSION = 2  # part of the cache key; raised whenever the conversion gives something else than before
SHARD_ELEMENTS = 2**29
PERMUTED = ("llama", "mistral")  # architectures whose q and k rows are interleaved for llama.cpp's rotary embedding
# The two maps that name every tensor of the supported architectures, for one layer.
NAMES = [gguf.get_tensor_name_map(arch, 1) for arch in (gguf.MODEL_ARCH.QWEN3MOE, gguf.MODEL_ARCH.LLAMA)]


def write_folder(path: Path, folder: Path, dtype: str, weights: bool, progress: Progress | None) -> None:
    """Write a GGUF file in Hugging Face's layout. Raises ModelError, OSError or SafetensorError."""
    file = GgufFile(path)

    def write_json(name: str, value: Any) -> None:
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    tokenizer = GgufTokenizer(file)
    write_json("config.json", {**hf_config(file, dtype), "eos_token_id": tokenizer.eos_token_ids()})
    write_json("tokenizer_config.json", tokenizer.config())
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer.to_str(pretty=True), encoding="utf-8")
    spec = read_spec(folder)
    groups: dict[str, list[Source]] = {}
    for parameter in parameters(spec):
        for source in parameter.sources:
            groups.setdefault(gguf_name(source.name), []).append(source)
    _check_tensors(file, groups)
    if not weights:
        return
    permuted = file.metadata["general.architecture"] in PERMUTED
    total = sum(file.tensors[name].size for name in groups)
    shards: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    number = 1
    *_, last = groups
    for name, sources in groups.items():
        whole = torch.from_numpy(file.floats(name)).to(getattr(torch, dtype))
        for source in sources:
            tensor = whole if source.expert is None else whole[source.expert]
            tensors[source.name] = (unpermute(tensor, source.name, spec) if permuted else tensor).contiguous()
        if progress is not None:
            progress(file.tensors[name].size, total)
        if name == last or sum(tensor.numel() for tensor in tensors.values()) >= SHARD_ELEMENTS:
            shard = f"model-{number:05d}.safetensors"
            shards |= dict.fromkeys(tensors, shard)
            save_file(tensors, folder / shard, {"format": "pt"})
            tensors, number = {}, number + 1
    write_json(INDEX, {"metadata": {}, "weight_map": shards})


def gguf_name(name: str) -> str:
    """GGUF's name of the tensor that holds Hugging Face's `name`, for an expert all experts' together."""
    layer = re.search(r"(?<=layers\.)\d+", name)
    general = re.sub(r"(?<=layers\.)\d+", "0", re.sub(r"(?<=experts)\.\d+", "", name))
    found: list[str | None] = [names.get_name(general, (".weight", ".bias")) for names in NAMES]
    return (found[0] or found[1] or general).replace("blk.0.", f"blk.{layer and layer[0]}.")


def _check_tensors(file: "GgufFile", groups: dict[str, list[Source]]) -> None:
    for name, sources in groups.items():
        if name not in file.tensors:
            raise file.error(f"tensor {name} is missing")
        for source in sources:
            shape = file.tensors[name].shape[0 if source.expert is None else 1 :]
            if shape != source.shape:
                raise file.error(f"tensor {name} has shape {shape}, the metadata asks for {source.shape}")
    for name in file.tensors:
        if name not in groups and name != "rope_freqs.weight" and not name.endswith(".attn_rot_embd.weight"):
            raise file.error(f"tensor {name} has no place in the model the metadata describes")


def unpermute(tensor: Tensor, name: str, spec: ModelSpec) -> Tensor:
    """Undo llama.cpp's order of q and k rows, (head, pair, half) there and (head, half, pair) here; others as is."""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    pairs = tensor.view(heads, spec.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


# The file: metadata and tensors

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
BLOCK_FORMATS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
FORMATS = {int(format): format for format in gguf.GGMLQuantizationType}


class GgufTensor(NamedTuple):
    """`shape` is outermost dimension first; `offset` into the file's data and `size` are in bytes."""

    shape: tuple[int, ...]
    format: gguf.GGMLQuantizationType
    offset: int
    size: int


class GgufFile:
    """Raises ModelError naming the file, and the key or tensor where there is one, for what is truncated or hostile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        try:
            self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
        self._view = self._data.data
        self._at = 0
        self._what = "the header"
        if bytes(self._take(4)) != b"GGUF":
            raise self.error("not a GGUF file")
        if (version := self._integer(4)) not in VERSIONS:
            raise self.error(f"GGUF version {version} (or byte order) is not supported; {VERSIONS} little-endian are")
        num_tensors, num_keys = self._integer(8), self._integer(8)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self._what = f"metadata {key}"
            if key in self.metadata:
                raise self.error(f"{self._what} appears twice")
            self.metadata[key] = self._value()
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self.error(f"general.alignment {alignment!r} is not a power of two of at least 8")
        self._what = "the table of tensors"
        self.tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name = self._string()
            self._what = f"tensor {name}"
            if name in self.tensors:
                raise self.error(f"{self._what} appears twice")
            self.tensors[name] = self._tensor()
        self._start = -(-self._at // alignment) * alignment
        for name, (shape, format, offset, size) in self.tensors.items():
            if size == 0 or self._start + offset + size > len(self._data):
                raise self.error(f"truncated: tensor {name} of shape {shape} ({format.name}) lies outside of the file")

    def floats(self, name: str) -> NDArray[np.float32]:
        shape, format, offset, size = self.tensors[name]
        rows = np.asarray(self._data[self._start + offset :][:size]).reshape(*shape[:-1], -1)
        return np.array(gguf.dequantize(rows, format), np.float32)

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.path}: {message}")

    def _tensor(self) -> GgufTensor:
        if not 1 <= (dimensions := self._integer(4)) <= 4:
            raise self.error(f"{self._what} has {dimensions} dimensions")
        shape = tuple(self._integer(8) for _ in range(dimensions))[::-1]
        kind, offset = self._integer(4), self._integer(8)
        format = FORMATS.get(kind)
        if format is None or format.name not in BLOCK_FORMATS:
            stored = f"type {kind}" if format is None else format.name
            raise self.error(f"{self._what} is stored as {stored}; {', '.join(BLOCK_FORMATS)} can be read")
        block, block_bytes = gguf.GGML_QUANT_SIZES[format]
        if shape[-1] % block:
            raise self.error(f"{self._what} of shape {shape} is not made of whole {format.name} blocks of {block}")
        return GgufTensor(shape, format, offset, math.prod(shape) // block * block_bytes)

    def _take(self, size: int) -> memoryview:  # no count is believed before the bytes it speaks of are there
        if size > len(self._data) - self._at:
            raise self.error(f"truncated in {self._what}")
        self._at += size
        return self._view[self._at - size : self._at]

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _string(self) -> str:
        try:
            return str(self._take(self._integer(8)), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{self._what}: text that is not UTF-8") from error

    def _value(self) -> Any:
        kind = self._integer(4)
        return self._values(self._integer(4), self._integer(8)) if kind == ARRAY else self._values(kind, 1)[0]

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == STRING:
            return [self._string() for _ in range(count)]
        if kind not in SCALARS:
            raise self.error(f"{self._what}: values of type {kind} are not supported")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        # A float32 is given as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06.
        return [float(str(value)) for value in values] if dtype == "<f4" else values.tolist()


# config.json

# GGUF architecture -> the family in the name of Hugging Face's. Mistral's files mostly call themselves llama.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3moe": "Qwen3Moe"}
# The rope scaling of every Llama 3.1 to 3.3, but its factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Parameters of rope scaling that cannot be expressed, and the value with which they change nothing.
NEUTRAL = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_ext_factor": 1, "yarn_log_multiplier": 0}


def hf_config(file: GgufFile, dtype: str) -> dict[str, Any]:
    """config.json without EOS ids and transformers' defaults; raises ModelError for what cannot be expressed there."""
    metadata = Fields(file.metadata, str(file.path))
    kind = metadata.text("general.architecture")
    if kind not in FAMILIES:
        raise file.error(f"architecture {kind} is not supported; those that are: {', '.join(FAMILIES)}")
    if kind != "qwen3moe" and metadata.integer(f"{kind}.expert_count", 0, least=0):
        raise file.error(f"architecture {kind} with experts is not supported")
    if "token_embd.weight" not in file.tensors:
        raise file.error("tensor token_embd.weight is missing")
    heads, hidden = metadata.integer(f"{kind}.attention.head_count"), metadata.integer(f"{kind}.embedding_length")
    layers, context = metadata.integer(f"{kind}.block_count"), metadata.integer(f"{kind}.context_length")
    head_dim = metadata.integer(f"{kind}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(f"{kind}.{key}", head_dim) != head_dim:
            raise metadata.error(f"{kind}.{key}", f"the key length {head_dim}")
    window = metadata.integer(f"{kind}.attention.sliding_window", 0, least=0)
    family = "mistral" if kind == "llama" and 0 < window < context else kind
    config: dict[str, Any] = {
        "architectures": [f"{FAMILIES[family]}ForCausalLM"],
        "model_type": "qwen3_moe" if family == "qwen3moe" else family,
        "dtype": dtype,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.integer(f"{kind}.feed_forward_length"),
        "rms_norm_eps": metadata.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": kind != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "sliding_window": window if family == "mistral" and window else None,
        "rope_parameters": _rope(file, metadata, kind, head_dim, context),
    }
    if kind == "qwen3moe":
        config |= {
            "num_experts": metadata.integer(f"{kind}.expert_count"),
            "num_experts_per_tok": metadata.integer(f"{kind}.expert_used_count"),
            "moe_intermediate_size": metadata.integer(f"{kind}.expert_feed_forward_length"),
            "norm_topk_prob": True,
            "mlp_only_layers": [i for i in range(layers) if f"blk.{i}.ffn_gate.weight" in file.tensors],
        }
    return config


def _rope(file: GgufFile, metadata: Fields, kind: str, head_dim: int, context: int) -> dict[str, Any]:
    theta = metadata.number(f"{kind}.rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    prefix, linear = f"{kind}.rope.scaling.", f"{kind}.rope.scale_linear"
    scaling = metadata.text(f"{prefix}type", "linear" if linear in metadata else "none")
    for key, neutral in NEUTRAL.items():
        if (value := metadata.values.get(prefix + key, neutral)) != neutral:
            raise file.error(f"metadata {prefix}{key} {value} is not supported")
    if "rope_freqs.weight" in file.tensors:
        if scaling != "none":
            raise file.error(f"rope scaling {scaling} together with the tensor rope_freqs.weight is not supported")
        return _llama3_rope(file, theta, head_dim)
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise file.error(f"rope scaling {scaling} is not supported; none, linear and yarn are")
    factor = f"{prefix}factor"
    rope |= {"rope_type": scaling, "factor": metadata.number(factor if factor in metadata else linear)}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = metadata.integer(f"{prefix}original_context_length", context)
        betas = (name for name in ("beta_fast", "beta_slow") if f"{prefix}yarn_{name}" in metadata)
        rope |= {name: metadata.number(f"{prefix}yarn_{name}") for name in betas}
    return rope


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Rope parameters from `rope_freqs.weight`, what llama3 scaling divides each frequency by; its factor is free."""
    divisors = file.floats("rope_freqs.weight")
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), **LLAMA3}
    expected = read_rope(Fields({"rope_parameters": rope}, f"{file.path}: rope_freqs.weight"), head_dim, 0).divisors
    if divisors.shape != (len(expected),) or not np.allclose(divisors, expected, rtol=1e-3):
        shape = f"of shape {divisors.shape} for a head size of {head_dim}"
        raise file.error(f"tensor rope_freqs.weight {shape} is not the rope scaling of Llama 3, the one supported")
    return rope


# tokenizer.json and tokenizer_config.json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPECIAL = (UNKNOWN, CONTROL, USER_DEFINED)
PREFIX = "tokenizer.ggml."
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Regular expressions that split text one after another before BPE, by the name in `tokenizer.ggml.pre`. GGUF does not
# spell them out; these are those of the models' official tokenizer.json files and of llama.cpp's `llama-vocab.cpp`.
SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACES}",),
    "qwen2": (f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{PUNCTUATION}|{SPACES}",),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    ),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
ADDS_BOS = ("llama-bpe", "tekken")  # the rules under which BOS is added where the file does not say


def pre_tokenizer(rule: str) -> Any:
    # `smollm` cuts every digit off, then applies byte level with GPT-2's regex on, as llama.cpp and SmolLM2's own
    # tokenizer.json do: SmolLM2-135M gives the same text 3 to 18 % fewer nats per character than with the regex off.
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS.get(rule, ())]
    if rule == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("gpt-2", "smollm"))
    return pre_tokenizers.Sequence([*steps, byte_level])


class GgufTokenizer:
    """The tokenizer that a GGUF file describes; raises ModelError naming file and field where that cannot be."""

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
        if kind not in ("gpt2", "llama"):
            raise self._fields.error(f"{PREFIX}model", "gpt2 (byte-level BPE) or llama (SentencePiece BPE)")
        rule = self._rule() if kind == "gpt2" else None
        self.tokenizer = self._sentence_piece() if rule is None else self._byte_level(rule)
        self._add_special_tokens(rule is None or rule in ADDS_BOS)

    def token_id(self, name: str) -> int | None:
        """The id of bos, eos, eot, eom, unknown or padding; None where the metadata gives none."""
        key = f"{PREFIX}{name}_token_id"
        if key not in self._fields:
            return None
        token = self._fields.integer(key, least=0)
        if token >= len(self._tokens):
            raise self._fields.error(key, f"below {len(self._tokens)}, the size of the vocabulary")
        return token

    def eos_token_ids(self) -> list[int]:
        ids = dict.fromkeys(self.token_id(name) for name in ("eos", "eot", "eom"))
        return [token for token in ids if token is not None]

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (token := self.token_id(key)) is not None:
                config[f"{name}_token"] = self._tokens[token]
        keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
        named = {name: self._fields.text(key) for name, key in keys.items() if key in self._fields}
        if named:
            several = [{"name": name, "template": text} for name, text in named.items()]
            config["chat_template"] = several if len(named) > 1 else next(iter(named.values()))
        return config

    def _rule(self) -> str:
        qwen = self._fields.text("general.architecture").startswith("qwen")
        rule = self._fields.text(f"{PREFIX}pre", "qwen2" if qwen else "missing")
        known = ("smollm", "gpt-2", *SPLITS)
        if rule not in known:
            raise self._file.error(f"{PREFIX}pre {rule} is not supported; {', '.join(known)} are")
        return rule

    def _byte_level(self, rule: str) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self._fields.items(f"{PREFIX}merges", str)]
        if any(len(pair) != 2 for pair in merges):
            raise self._file.error(f"{PREFIX}merges holds something else than pairs")
        tokenizer = Tokenizer(self._bpe(merges, ignore_merges=rule in ADDS_BOS))
        if rule == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizer(rule)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        """SentencePiece BPE (Llama 2, early Mistral): spaces are `▁`, unknown characters fall back to byte tokens."""
        if self._fields.flag(f"{PREFIX}remove_extra_whitespaces", False):
            raise self._file.error(f"{PREFIX}remove_extra_whitespaces is not supported")
        unknown = self.token_id("unknown")
        extra: dict[str, Any] = {} if unknown is None else {"unk_token": self._tokens[unknown], "fuse_unk": True}
        tokenizer = Tokenizer(self._bpe(self._scored_merges(), byte_fallback=True, **extra))
        encode: list[Any] = [normalizers.Replace(" ", "▁")]
        decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._fields.flag(f"{PREFIX}add_space_prefix", True):
            encode.insert(0, normalizers.Prepend("▁"))
            decode.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(encode), decoders.Sequence(decode)
        return tokenizer

    def _bpe(self, merges: list[Any], **options: Any) -> models.BPE:
        vocabulary = {token: index for index, token in enumerate(self._tokens)}
        try:
            with NO_PANICS:
                return models.BPE(vocab=vocabulary, merges=merges, **options)
        except Exception as error:  # the library raises nothing narrower
            raise self._file.error(f"{PREFIX}merges does not fit the vocabulary: {error}") from error

    def _scored_merges(self) -> list[tuple[str, str]]:
        """Merges in the order of the merged piece's score: the pairs that SentencePiece would join first."""
        scores: list[float] = self._fields.items(f"{PREFIX}scores", float)
        if len(scores) != len(self._tokens):
            raise self._fields.error(f"{PREFIX}scores", f"{len(self._tokens)} numbers, one a token")
        ids = {token: index for index, token in enumerate(self._tokens) if self._types[index] in (NORMAL, USER_DEFINED)}
        order: dict[tuple[str, str], tuple[float, int, int]] = {}
        for token, index in ids.items():
            for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
                if left in ids and right in ids:
                    order[left, right] = (-scores[index], ids[left], ids[right])
        return sorted(order, key=order.__getitem__)

    def _add_special_tokens(self, adds_bos: bool) -> None:
        special = {t: k != USER_DEFINED for t, k in zip(self._tokens, self._types, strict=True) if t and k in SPECIAL}
        self.tokenizer.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in special.items()])
        added: dict[str, int] = {}
        text = ["$A"]
        for name, default in (("bos", adds_bos and self.token_id("bos") is not None), ("eos", False)):
            if not self._fields.flag(f"{PREFIX}add_{name}_token", default):
                continue
            if (id := self.token_id(name)) is None:
                raise self._file.error(f"{PREFIX}add_{name}_token is set, but {PREFIX}{name}_token_id is missing")
            added[self._tokens[id]] = id
            text.insert(0 if name == "bos" else len(text), self._tokens[id])
        if added:
            template = processors.TemplateProcessing(single=text, special_tokens=list(added.items()))
            self.tokenizer.post_processor = template
