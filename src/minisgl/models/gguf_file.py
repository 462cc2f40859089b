"""Reading a GGUF file: its metadata, its table of tensors, and tensors as floats.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The table is
read here rather than with `gguf.GGUFReader`, which trusts the counts it finds in a file and takes seconds for a
vocabulary; the block formats are undone by that package.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from minisgl.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
BLOCK_FORMATS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file: `shape` outermost dimension first, `offset` and `size` in bytes."""

    shape: tuple[int, ...]
    format: str
    offset: int
    size: int


class GgufFile:
    """A GGUF file's `metadata` (Python values by key) and `tensors` (by name).

    Raises ModelError naming the file, and the key or tensor where there is one, for what is truncated or hostile:
    no count is believed before the bytes it speaks of are known to exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
        self._view = self._data.data
        self._at = 0
        self._what = "the header"
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._read()

    def floats(self, name: str) -> NDArray[np.float32]:
        """A copy of the tensor as float32 in its own shape."""
        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType[tensor.format]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = self._data[tensor.offset : tensor.offset + tensor.size]
        rows = rows.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size)
        if tensor.format in ("F32", "F16"):
            return np.array(rows.view("<f4" if tensor.format == "F32" else "<f2"), dtype=np.float32)
        return np.array(gguf.dequantize(np.asarray(rows), kind), dtype=np.float32, copy=None)

    def error(self, message: str) -> ModelError:
        """A ModelError naming this file."""
        return ModelError(f"{self.path}: {message}")

    def _read(self) -> None:
        if bytes(self._take(4)) != MAGIC:
            raise self.error("not a GGUF file")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self.error(f"GGUF version {version} (or byte order) is not supported; {VERSIONS} little-endian are")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        for _ in range(num_keys):
            key = self._string()
            self._what = f"metadata {key}"
            if key in self.metadata:
                raise self.error(f"{self._what} appears twice")
            self.metadata[key] = self._value(self._number("<I"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self.error(f"general.alignment {alignment!r} is not a power of two of at least 8")
        self._what = "the table of tensors"
        table = [self._tensor_info() for _ in range(num_tensors)]
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in table:
            if name in self.tensors:
                raise self.error(f"tensor {name} appears twice")
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        self._what = f"tensor {name}"
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        known = {member.value: member for member in gguf.GGMLQuantizationType}
        format = known[kind].name if kind in known else f"type {kind}"
        if format not in BLOCK_FORMATS:
            raise self.error(f"tensor {name} is stored as {format}; {', '.join(BLOCK_FORMATS)} can be read")
        block, block_size = gguf.GGML_QUANT_SIZES[known[kind]]
        if shape[-1] % block:
            raise self.error(f"tensor {name} of shape {shape} is not made of whole {format} blocks of {block}")
        size = math.prod(shape) // block * block_size
        if size == 0 or offset + size > len(self._data):
            raise self.error(f"truncated: tensor {name} of shape {shape} ({format}) lies outside of the file")
        return GgufTensor(shape, format, offset, size)

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self._at:
            raise self.error(f"truncated in {self._what}")
        self._at += size
        return self._view[self._at - size : self._at]

    def _number(self, format: str) -> int:
        number: int = struct.unpack(format, self._take(struct.calcsize(format)))[0]
        return number

    def _string(self) -> str:
        raw = bytes(self._take(self._number("<Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{self._what}: text that is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array()
        return self._scalars(kind, 1)[0]

    def _array(self) -> list[Any]:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise self.error(f"{self._what}: values of type {kind} are not supported")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        # A float32 is given as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06.
        return [float(str(value)) for value in values] if kind == 6 else values.tolist()
