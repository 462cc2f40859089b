"""Reading safetensors: one file or several with an index, tensor by tensor, never a pickle."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisgl.errors import ModelError
from minisgl.models.fields import Fields, read_json

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """The tensors of a model folder by name. A context manager: the files are mapped while it is open.

    Raises ModelError naming file and tensor for whatever a file lacks or claims wrongly.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._where: dict[str, str] = {}
        try:
            if (folder / INDEX).exists():
                self._open_index()
            else:
                self._open_all()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ModelError unless there is a floating point tensor of this name and shape."""
        path, file = self._find(name)
        piece = file.get_slice(name)
        if (found := tuple(piece.get_shape())) != shape:
            raise ModelError(f"{path}: tensor {name} has shape {found}, the config asks for {shape}")
        if (dtype := piece.get_dtype()) not in DTYPES:
            raise ModelError(f"{path}: tensor {name} is stored as {dtype}; {', '.join(DTYPES)} can be read")

    def check_complete(self, used: set[str]) -> None:
        """Raise ModelError for a weight or bias of a known module that is not in `used`: it would change the answer."""
        modules = {name.rpartition(".")[0] for name in used}
        for name, file in self._where.items():
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "bias") and module in modules and name not in used:
                raise ModelError(f"{self.folder / file}: tensor {name} has no place in the model the config describes")

    def read_into(self, name: str, destination: Tensor, take: tuple[slice, ...]) -> None:
        """Copy a part of a tensor into `destination`, converting dtype and device; nothing else of it is read."""
        path, file = self._find(name)
        try:
            destination.copy_(file.get_slice(name)[take])
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name}: {error}") from error

    def _find(self, name: str) -> tuple[Path, Any]:
        if name not in self._where:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        file = self._where[name]
        return self.folder / file, self._files[file]

    def _open_index(self) -> None:
        path = self.folder / INDEX
        index = Fields(read_json(path), str(path)).section("weight_map")
        for name, file in index.values.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{path}: tensor {name}: {file!r} is not the name of a safetensors file beside it")
            if name not in self._open(file):
                raise ModelError(f"{self.folder / file}: tensor {name} is missing, the index promises it")
            self._where[name] = file

    def _open_all(self) -> None:
        single = self.folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(self._why_nothing())
        for path in paths:
            for name in self._open(path.name):
                if name in self._where:
                    raise ModelError(f"{path}: tensor {name} is also in {self._where[name]}")
                self._where[name] = path.name

    def _open(self, file: str) -> frozenset[str]:
        path = self.folder / file
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise ModelError(f"{path}: not a complete safetensors file: {error}") from error
            except OSError as error:
                raise ModelError(f"{path}: {error.strerror or error}") from error
            self._names[file] = frozenset(self._files[file].keys())
        return self._names[file]

    def _why_nothing(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder}: no such folder"
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            return f"{self.folder}: {pickles[0]} is a pickle, which can run any code and is never read; use safetensors"
        return f"{self.folder}: no *.safetensors file"
