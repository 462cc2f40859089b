"""The cache of converted GGUF files: a folder for each content and dtype, with a record of the files that hold it.

A file with the path, size and time of a record is found without being read. Any other is hashed: a copy of what was
converted already, such as a package installed anew, gets that folder.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from minisgl.config import cache_folder
from minisgl.core.model_config import read_json, require_file
from minisgl.errors import ModelError
from minisgl.formats.gguf import CONVERSION, Progress, write_folder

RECORD = "source.json"
UNFINISHED = ".converting-"
CONVERTED = re.compile(r".+-[0-9a-f]{16}")


class Conversion(msgspec.Struct, frozen=True):
    """What a folder holds, and the files that were seen to have that content: by path, their size and time."""

    dtype: str
    weights: bool
    version: int
    sources: dict[str, tuple[int, int]]

    def write(self, folder: Path) -> None:
        written = folder / f".{RECORD}-{os.getpid()}"
        written.write_text(json.dumps(msgspec.to_builtins(self)))
        os.replace(written, folder / RECORD)


def convert_gguf(path: Path, dtype: str, *, weights: bool = True, progress: Progress = None) -> Path:
    """The folder that holds this GGUF file in Hugging Face's layout. It appears whole or not at all, also where two
    processes convert at once; who makes one removes those that no file leads to. Raises ModelError naming the file.
    """
    cache, kind = Path(cache_folder()) / "gguf", (dtype, weights, CONVERSION)
    try:
        path = path.resolve(strict=True)
        now = facts(path)  # before it is read: what changes while it is read is read again the next time
        for known, found in conversions(cache).items():
            if (found.dtype, found.weights, found.version) == kind and found.sources.get(str(path)) == now:
                return known
        require_file(path)
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        key = hashlib.sha256(json.dumps([content, *kind]).encode()).hexdigest()[:16]
        if (folder := find(cache, key)) is None:
            return make_folder(cache, key, path, Conversion(*kind, {str(path): now}), progress)
        with contextlib.suppress(OSError):  # the cache may be another user's
            Conversion(*kind, conversions(cache)[folder].sources | {str(path): now}).write(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: cannot be converted into {cache}: {reason}") from error
    return folder


def make_folder(cache: Path, key: str, path: Path, wanted: Conversion, progress: Progress) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with (
        locked(cache, fcntl.LOCK_EX) as alone,
        tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cache, ignore_cleanup_errors=True) as work,
    ):
        if (found := find(cache, key)) is not None:  # another process was quicker
            return found
        written, folder = Path(work) / "model", cache / f"{path.stem}-{key}"
        written.mkdir()
        write_folder(path, written, wanted.dtype, wanted.weights, progress)
        wanted.write(written)
        mode = (written / RECORD).stat().st_mode
        for file in written.iterdir():  # safetensors writes what only the user can read
            file.chmod(mode)
        if alone:
            take_stale(cache, Path(work))
        try:
            os.rename(written, folder)
        except OSError:
            if not folder.is_dir():
                raise
            with contextlib.suppress(OSError):  # it is in use and holds the same, but its record is broken
                wanted.write(folder)
        return folder


def facts(path: Path) -> tuple[int, int]:
    """A file's size and time, (-1, -1) where there is none."""
    try:
        return (status := path.stat()).st_size, status.st_mtime_ns
    except OSError:
        return -1, -1


def conversions(cache: Path) -> dict[Path, Conversion]:
    """The folders of the cache; without those of another version of this program, and damaged ones."""
    found = {}
    for file in cache.glob(f"*/{RECORD}"):
        with contextlib.suppress(ModelError, msgspec.ValidationError):
            conversion = msgspec.convert(read_json(file), Conversion)
            if conversion.version == CONVERSION:
                found[file.parent] = conversion
    return found


def find(cache: Path, key: str) -> Path | None:
    return next((folder for folder in conversions(cache) if folder.name.endswith(f"-{key}")), None)


def take_stale(cache: Path, work: Path) -> None:
    """Move into `work`, which goes soon, what others left unfinished and folders that no file or process uses."""
    known = conversions(cache)
    for entry in set(cache.iterdir()) - {work}:
        alive = entry in known and any(facts(Path(path)) == then for path, then in known[entry].sources.items())
        if entry.name.startswith(UNFINISHED) or (CONVERTED.fullmatch(entry.name) and not alive and not in_use(entry)):
            with contextlib.suppress(OSError):
                os.rename(entry, work / entry.name)


@contextlib.contextmanager
def locked(folder: Path, kind: int) -> Iterator[bool]:
    """Lock a folder; whether it is, which another process may prevent, and a file system without locks."""
    with contextlib.ExitStack() as stack:
        taken = False
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, kind)
            taken = True
        yield taken


def in_use(folder: Path) -> bool:
    with locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
        return not free


@functools.cache
def keep_in_use(folder: Path) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
