"""A rank other than 0: a process that executes the plans it is sent. Started by rank 0, or by torchrun.

Started by rank 0 it reads one line of JSON on its stdin, whose end means that rank 0 is gone; started by torchrun it
notices by its connection. Either way it goes too, at once: there may be a collective that nobody will finish.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
import zmq

from minisgl.config import Launcher
from minisgl.core.executor import LocalExecutor, build_local_executor
from minisgl.core.model_config import read_spec
from minisgl.distributed.collectives import TPGroup, join_group, share_text
from minisgl.distributed.executor import use_device
from minisgl.distributed.messages import (
    Assign,
    Close,
    Finish,
    FromRank,
    Hello,
    Launch,
    RankFailed,
    ToRank,
    encoder,
    to_rank_decoder,
)
from minisgl.distributed.worker_pool import HEARTBEAT_MS, SILENCE_MS, RankStart
from minisgl.errors import ConfigError, MinisglError, ModelError
from minisgl.formats.hub import locate_model

LINGER_MS = 1000
POLL_MS = 100
CLOSE_SECONDS = 0.5
"""How long after rank 0's end its last word, to close, may still be on its way."""
MEETING_SECONDS = 2.0
"""How long a rank that is left alone before all have met leaves the others the folder that they meet by."""


class Rank:
    """Receives plans and starts them in one thread, and waits for their ends in another, so that none is late."""

    def __init__(self, rank: int, plans: str, word: str) -> None:
        self.rank = rank
        self._context = zmq.Context()
        self._inbox = self._connect(zmq.PULL, plans)
        self._outbox = self._connect(zmq.PUSH, word)
        self._lock = threading.Lock()  # around the outbox
        self._encoder = encoder()
        self._decoder = to_rank_decoder()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def _connect(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        if address.startswith("tcp"):
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        socket.connect(address)
        return socket

    def watch_connection(self) -> None:
        """From here on the process ends with its connection to rank 0, unless that has told it to close."""
        monitor = self._inbox.get_monitor_socket(zmq.EVENT_DISCONNECTED)

        def watch() -> None:
            while not self._closed.is_set():
                if monitor.poll(POLL_MS) and not self._closed.wait(CLOSE_SECONDS):
                    os._exit(1)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()

    def run(self, join: Callable[[], TPGroup]) -> int:
        """Join the group, build what rank 0 says, and execute its plans until it closes; the exit status."""
        self._say(Hello(self.rank))
        try:
            group = join()
            executor = self._build(group)
            group.least(0)  # every rank is ready
            self._serve(executor)
            assert executor.equipment is not None
            executor.equipment.group.collectives.close()
        except MinisglError as error:
            self._fail(error.message, isinstance(error, (ConfigError, ModelError)))
        except Exception as error:
            traceback.print_exc()
            self._fail(f"{type(error).__name__}: {error}", asked=False)
        if self._watcher is not None:  # a socket that another thread waits on must not be closed
            self._watcher.join()
            self._inbox.disable_monitor()
        self._context.destroy(linger=LINGER_MS)
        return 0

    def _build(self, group: TPGroup) -> LocalExecutor:
        order = self._receive()
        assert isinstance(order, Assign)
        config, folder = order.config, Path(order.folder)
        logging.basicConfig(level=config.log_level, format=f"%(asctime)s %(levelname)s rank {self.rank} %(message)s")
        if not folder.is_dir():  # another host's
            weights = not config.dummy_weight
            folder = locate_model(config.model, config.model_source, dtype=config.dtype, weights=weights)
        return build_local_executor(config, folder, read_spec(folder), order.max_seq_len, group=group)

    def _serve(self, executor: LocalExecutor) -> None:
        launched: queue.SimpleQueue[bool] = queue.SimpleQueue()
        collector = threading.Thread(target=self._collect, args=(executor, launched), daemon=True)
        collector.start()
        while not isinstance(message := self._receive(), Close):
            match message:
                case Launch(plan):
                    executor.launch(plan)
                    if len(plan.constrained_slots):
                        continue  # there is nothing to collect before its masks have come
                case Finish(masks):
                    executor.finish(masks)
            launched.put(True)
        self._closed.set()
        launched.put(False)
        collector.join()
        executor.close()

    def _collect(self, executor: LocalExecutor, launched: queue.SimpleQueue[bool]) -> None:
        while launched.get():
            try:
                executor.collect()
            except Exception as error:
                traceback.print_exc()
                self._fail(f"{type(error).__name__}: {error}", asked=False)

    def _receive(self) -> ToRank:
        return self._decoder.decode(self._inbox.recv())

    def _say(self, message: FromRank) -> None:
        with self._lock:
            self._outbox.send(self._encoder.encode(message))

    def _fail(self, error: str, asked: bool) -> None:
        """Say why and end the process: other ranks may never finish what this one is in."""
        self._say(RankFailed(self.rank, error, asked))
        with self._lock:
            self._outbox.close()
        threading.Event().wait(LINGER_MS / 1000)
        os._exit(1)


def serve_rank(launched: Launcher) -> int:
    """Be a rank other than 0 of a group that torchrun started; the exit status.

    Signals that end a job are rank 0's to answer, which closes the others.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    device = torch.device(f"cuda:{launched.local_rank}" if torch.cuda.is_available() else "cpu")
    use_device(device, launched.local_size)
    group = join_group(launched.rank, launched.size, "env://", device, launched.one_host)
    addresses = share_text(group, "").replace("0.0.0.0", launched.address).split()
    rank = Rank(launched.rank, addresses[launched.rank - 1], addresses[-1])
    rank.watch_connection()
    return rank.run(lambda: group)


def main() -> NoReturn:
    """Entry point of `python -m minisgl.distributed.worker`."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankStart)
    met = threading.Event()

    def follow_parent() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not through the buffer, whose lock would be held at the normal end
            pass
        # Where its folder is gone, torch looks for the rendezvous for minutes without giving up the interpreter's lock.
        met.wait(MEETING_SECONDS)
        shutil.rmtree(start.folder, ignore_errors=True)
        os._exit(1)

    follower = threading.Thread(target=follow_parent, daemon=True)
    follower.start()
    device = torch.device(start.device)
    use_device(device, start.size)
    rank = Rank(start.rank, start.plans, start.word)
    if select.select([sys.stdin], [], [], 0)[0]:
        follower.join()

    def join() -> TPGroup:
        group = join_group(start.rank, start.size, start.rendezvous, device)
        met.set()
        return group

    status = rank.run(join)
    os._exit(status)  # the interpreter's own end takes a second, in which nobody follows the parent


if __name__ == "__main__":
    main()
