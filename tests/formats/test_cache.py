"""The cache of converted models: what is found in it, who can read it, what goes, and what can be wrong with it."""

import hashlib
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.gguf_files import write_model
from minisgl.errors import ModelError
from minisgl.formats.cache import SOURCES, UNFINISHED, convert_gguf, in_use, keep_in_use
from minisgl.formats.hub import locate_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))
    # No warning after a fork, which would fill the file where pytest collects it, and that is limited, too.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(path := tmp_path / "model.gguf", "qwen3")
    return path


def convert(path: Path, dtype: str = "float32", weights: bool = True) -> Path:
    return convert_gguf(path, dtype, weights=weights)


def test_the_content_of_a_file_is_what_counts(model: Path, tmp_path: Path, cache: Path) -> None:
    first = convert(model)
    again = tmp_path / "venv" / "renamed.gguf"
    again.parent.mkdir()
    shutil.copy(model, again)  # as a package that is installed anew
    os.utime(again, ns=(5, 5))
    assert convert(again) == first
    model.unlink()
    assert convert(again) == first
    os.utime(again, ns=(6, 6))
    assert convert(again) == first
    assert list(cache.iterdir()) == [first]
    kinds = {convert(again, dtype, weights) for dtype in ("float32", "bfloat16") for weights in (True, False)}
    assert len(kinds) == 4
    assert first in kinds


def test_a_file_that_is_known_is_not_read_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = convert(model)
    copied = tmp_path / "copy.gguf"
    shutil.copy(model, copied)
    convert(copied)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file is read"))
    assert convert(model) == convert(copied) == first


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_every_file_has_the_permissions_that_the_umask_says(model: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = convert(model)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert {"model-00001.safetensors", "tokenizer.json", "config.json"} <= modes.keys()
    assert modes.pop(SOURCES) == stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert set(modes.values()) == {0o666 & ~umask}


def test_what_nothing_leads_to_goes_when_something_new_comes(model: Path, tmp_path: Path, cache: Path) -> None:
    write_model(replaced := tmp_path / "replaced.gguf", "qwen2")
    write_model(removed := tmp_path / "removed.gguf", "llama")
    kept, stale = convert(model), [convert(replaced), convert(removed)]
    stale += [cache / f"{UNFINISHED}x7", cache / f"old-{'0' * 16}", cache / f"model-float32-0-{'1' * 16}"]
    for folder in (*stale[2:], cache / "notes"):  # of a conversion that was killed, older versions; the last not ours
        folder.mkdir()
    shutil.copytree(kept / SOURCES, stale[-1] / SOURCES, symlinks=True)
    removed.unlink()
    write_model(replaced, "mistral")
    assert all(folder.exists() for folder in stale)
    new = convert(replaced)
    assert {entry.name for entry in cache.iterdir()} == {kept.name, new.name, "notes"}
    assert convert(model) == kept


def test_several_conversions_at_once_do_not_take_each_others_work(tmp_path: Path, cache: Path) -> None:
    paths = []
    for kind in ("llama", "qwen2", "qwen3"):
        write_model(path := tmp_path / f"{kind}.gguf", kind)
        paths.append(path)
    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(convert, paths * 2))
    assert folders[:3] == folders[3:]
    assert sorted(cache.iterdir()) == sorted(folders[:3])


def test_what_another_process_uses_stays(model: Path, tmp_path: Path) -> None:
    used = locate_model(str(model))
    write_model(model, "qwen2")
    new = convert(model)
    assert used != new
    assert used.is_dir()
    child = "import sys; from minisgl.formats.hub import locate_model as l; print(l(sys.argv[1]), flush=True); input()"
    write_model(other := tmp_path / "other.gguf", "llama")
    command = [sys.executable, "-c", child, str(other)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        other.unlink()
        write_model(model, "mistral")
        convert(model)
        assert held.is_dir()
        process.kill()
    write_model(model, "qwen3moe")
    convert(model)
    assert not held.exists()


def locate(model: Path, limit: int = 0) -> str:
    """What a process of its own says that the model's folder is, or why there is none: one line.

    Where there is a limit, a file that exceeds it (bytes) fails as on a full disk. Without one root goes on as a user
    to whom permissions apply.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which idle
        child = os.fork()
    if child == 0:
        try:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            elif os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = str(locate_model(str(model)))
        except BaseException as error:
            said = f"error: {error.message}" if isinstance(error, ModelError) else repr(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as lines:
        said = lines.read()
    os.waitpid(child, 0)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("limit", [100, 5_000, 100_000], ids=["config", "tokenizer", "weights"])
def test_a_full_disk_is_one_line_and_leaves_nothing(model: Path, cache: Path, limit: int) -> None:
    assert locate(model, limit).startswith(f"error: {model}: cannot be converted into {cache}: ")
    assert list(cache.iterdir()) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can enter, which those of pytest are not, as what is written meanwhile."""
    before = os.umask(0o022)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)
    os.umask(before)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o555])
@pytest.mark.parametrize("place", ["cache", "cache/gguf", "models"])
def test_a_folder_that_may_not_be_used_is_one_line(
    public: Path, model: Path, monkeypatch: pytest.MonkeyPatch, place: str, mode: int
) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(public / "cache"))
    (public / "cache" / "gguf").mkdir(parents=True)
    (public / "models").mkdir()
    shutil.copy(model, source := public / "models" / "model.gguf")
    (public / "cache").chmod(0o777)
    (public / "cache" / "gguf").chmod(0o777)
    (public / place).chmod(mode)
    try:
        said = locate(source)
    finally:
        (public / place).chmod(0o755)
    if place != "cache/gguf" and mode == 0o555:  # nothing is written there
        assert said.startswith(str(public / "cache" / "gguf" / "model-"))
    else:
        assert said.startswith("error: ")
        assert said.endswith(": Permission denied")


def test_another_users_cache_serves_a_file_and_its_copies(
    public: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(public / "cache"))
    paths = [Path(shutil.copy(model, public / name)) for name in ("model.gguf", "copy.gguf")]
    folder = convert(paths[0])
    (public / "cache" / "gguf").chmod(0o555)
    assert [locate(path) for path in paths] == [str(folder)] * 2
    (public / "cache" / "gguf").chmod(0o755)


def test_a_folder_is_in_use_while_it_is_held_and_where_it_cannot_be_locked(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    for folder in (tmp_path, tmp_path / "none"):
        keep_in_use(folder)
        assert in_use(folder)
