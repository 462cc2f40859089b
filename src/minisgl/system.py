"""What a process has of its system: standard streams, helpers, a private folder, the tool that installs packages."""

import contextlib
import fcntl
import importlib.util
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

PREFIX = "minisgl-"  # of a folder's name
MAX_PATH = 88  # characters before the random ones of a folder's name; the path of a Unix socket has at most 107


class PrivateFolder(tempfile.TemporaryDirectory[str]):
    """A folder for sockets that only this user can enter. Making one removes those of processes that were killed: a
    process holds the lock in its folder for as long as it lives.
    """

    def __init__(self) -> None:
        base = tempfile.gettempdir() if len(tempfile.gettempdir() + PREFIX) <= MAX_PATH else "/tmp"
        for lock in Path(base).glob(f"{PREFIX}*/lock"):
            with contextlib.suppress(OSError):
                if lock.parent.lstat().st_uid == os.getuid():
                    with lock.open() as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(lock.parent, ignore_errors=True)
        super().__init__(prefix=PREFIX, dir=base, ignore_cleanup_errors=True)
        self._lock = open(os.path.join(self.name, "locking"), "w")  # noqa: SIM115
        with contextlib.suppress(OSError):  # where there are no locks nothing is removed
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.rename(self._lock.name, os.path.join(self.name, "lock"))

    def cleanup(self) -> None:
        self._lock.close()
        super().cleanup()


def open_standard_streams() -> None:
    """Lead standard streams that are closed to /dev/null: else the next socket would get their numbers."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def print_text(text: str, to_stdout: bool = False) -> None:
    """Print where perhaps nobody reads: into a closed pipe, onto a full disk, in a terminal that is gone."""
    stream = sys.stdout if to_stdout else sys.stderr
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            print(text, file=stream, flush=True)


def flush_standard_streams() -> None:
    """Drop what nobody could be told: at its end Python would try again, and fail with status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), stream.fileno())


class Helper:
    """The process `python -m module`. `link` is a socket whose other end is its standard input; `replies` is what comes
    from there. `end` kills it, as the end of this object does.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.link, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", module, *arguments]
            null = subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=null, start_new_session=True)
        self.replies = self.link.makefile("rb")
        self.end = weakref.finalize(self, end_helper, self.process, self.link, self.replies)


def end_helper(process: subprocess.Popen[bytes], link: socket.socket, replies: BinaryIO) -> None:
    replies.close()
    link.close()
    process.kill()
    process.wait()


def limit_memory() -> None:
    """The kernel gives this process at most 1 GB of address space more than it has, and writes no core."""
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def install_command(*packages: str, options: str = "") -> str:
    """The command that installs packages into this environment, which has no pip where uv made it."""
    python = shlex.quote(sys.executable)
    has_pip = importlib.util.find_spec("pip") is not None
    tool = f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"
    return " ".join([tool, *options.split(), shlex.join(packages)])
