"""The cache of converted GGUF files: a folder for each content and dtype, with links to the files that hold it.

A file with the path, size and time of a link is found without being read. Any other is hashed: a copy of what was
converted already, such as a package installed anew, gets that folder.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from minisgl.config import cache_folder
from minisgl.core.model_config import require_file
from minisgl.core.weights import Progress
from minisgl.errors import ModelError
from minisgl.formats.gguf import CONVERSION, write_folder

SOURCES = "sources"  # in a converted folder: links to the files that were seen to have its content
UNFINISHED = ".converting-"
CONVERTED = re.compile(r".+-[0-9a-f]{16}")  # by any version of this program
CURRENT = re.compile(rf".+-{CONVERSION}-[0-9a-f]{{16}}")


def convert_gguf(path: Path, dtype: str, *, weights: bool = True, progress: Progress | None = None) -> Path:
    """The folder that holds this GGUF file in Hugging Face's layout. It appears whole or not at all, also where two
    processes convert at once; who makes one removes those that no file leads to. Raises ModelError naming the file.
    """
    cache, kind = Path(cache_folder()) / "gguf", f"{dtype if weights else f'{dtype}-config'}-{CONVERSION}"
    try:
        path = path.resolve(strict=True)
        name = link_name(path)  # before it is read: what changes while it is read is read again the next time
        for link in cache.glob(f"*-{kind}-*/{SOURCES}/{name}"):
            return link.parent.parent
        require_file(path)
        with path.open("rb") as file:
            ending = f"-{kind}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, fcntl.LOCK_EX) as alone:
            for folder in cache.glob(f"*{ending}"):
                with contextlib.suppress(OSError):  # the cache may be another user's
                    (folder / SOURCES / name).symlink_to(path)
                return folder
            with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cache, ignore_cleanup_errors=True) as work:
                written, folder = Path(work) / "model", cache / (path.stem + ending)
                written.mkdir()
                write_folder(path, written, dtype, weights, progress)
                (written / SOURCES).mkdir()
                (written / SOURCES / name).symlink_to(path)
                mode = (written / "config.json").stat().st_mode
                for weight_file in written.glob("*.safetensors"):  # which only the user can read
                    weight_file.chmod(mode)
                if alone:
                    take_stale(cache, Path(work))
                try:
                    os.rename(written, folder)
                except OSError:
                    if not folder.is_dir():  # of another process, where folders cannot be locked
                        raise
                return folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: cannot be converted into {cache}: {reason}") from error


def link_name(path: Path) -> str:
    """The name of a link to a file, or to what a link leads to, for as long as that does not change."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"


def is_current(link: Path) -> bool:
    with contextlib.suppress(OSError):
        return link.name == link_name(link)
    return False


def take_stale(cache: Path, work: Path) -> None:
    """Move into `work`, which goes soon, what others left unfinished and folders that no file or process uses."""
    for entry in set(cache.iterdir()) - {work}:
        alive = CURRENT.fullmatch(entry.name) and any(map(is_current, (entry / SOURCES).glob("*")))
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
