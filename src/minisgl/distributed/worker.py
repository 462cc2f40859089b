"""A worker: the process of a rank other than 0, which executes the plans that rank 0 sends.

Rank 0 starts it by `python -m minisgl.distributed.worker RANK SIZE DEVICE RENDEZVOUS LINK`, or torchrun does. It
ends at once when rank 0 is gone, which the end of its link says: it may be in a collective that will never finish.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch

from minisgl.config import Launcher
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import read_spec
from minisgl.distributed import messages
from minisgl.distributed.collectives import TPGroup, broadcast_text, join_group
from minisgl.distributed.executor import build_rank_executor, use_device
from minisgl.distributed.messages import FinishStep, LaunchStep, LoadModel, ShutdownWorker, WorkerFailed
from minisgl.errors import ConfigError, MinisglError, ModelError
from minisgl.formats.hub import locate_model

LINGER_SECONDS = 1.0  # after a report, so that rank 0 first notices a worker whose end is the cause of it


class Worker:
    """Starts steps in one thread and waits for their ends in another, so that no step starts late."""

    def __init__(self, rank: int, link: socket.socket) -> None:
        self.rank = rank
        self._link = link
        self._messages = link.makefile("rb")
        self._ending = False
        threading.Thread(target=self._watch, daemon=True).start()
        self._send(messages.STARTED)

    def run(self, join: Callable[[], TPGroup]) -> None:
        """Join the group, load the model, and execute plans until ShutdownWorker. Ends the process when that fails."""
        try:
            load = self._receive()
            assert isinstance(load, LoadModel)
            group = join()
            executor = self._load(load, group)
            group.barrier()  # every rank is ready
            self._execute(executor)
            group.collectives.close()
        except Exception as error:
            self._fail(error)

    def _load(self, load: LoadModel, group: TPGroup) -> LocalExecutor:
        config, folder = load.config, Path(load.folder)
        logging.basicConfig(level=config.log_level, format=f"%(asctime)s %(levelname)s rank {self.rank} %(message)s")
        if not folder.is_dir():  # rank 0 is on another host
            weights = not config.dummy_weight
            folder = locate_model(config.model, config.model_source, dtype=config.dtype, weights=weights)
        return build_rank_executor(config, folder, read_spec(folder), load.max_seq_len, group)[0]

    def _execute(self, executor: LocalExecutor) -> None:
        collector = ThreadPoolExecutor(1)
        while not isinstance(message := self._receive(), ShutdownWorker):
            match message:
                case LaunchStep(plan):
                    executor.launch(plan)
                    if len(plan.constrained_slots):
                        continue  # nothing can be collected before its masks have come
                case FinishStep(masks):
                    executor.finish(masks)
            collector.submit(self._collect, executor)
        self._ending = True
        collector.shutdown()
        executor.close()

    def _collect(self, executor: LocalExecutor) -> None:
        try:
            executor.collect()
        except Exception as error:
            self._fail(error)

    def _receive(self) -> messages.ToWorker:
        message = messages.receive(self._messages, messages.TO_WORKER)
        if message is None:
            os._exit(1)
        return message

    def _watch(self) -> None:
        """Wait for the end of rank 0, and unless it is done, end this process."""
        ended = select.poll()
        ended.register(self._link, select.POLLRDHUP)
        ended.poll()
        if not self._ending:
            os._exit(1)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # rank 0 is gone
            self._link.sendall(data)

    def _fail(self, error: Exception) -> NoReturn:
        """Report the error and end the process: other ranks may wait for this one in a collective."""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MinisglError):
            text = error.message
        else:
            traceback.print_exception(error)
        self._send(messages.frame(WorkerFailed(text, isinstance(error, (ConfigError, ModelError)))))
        time.sleep(LINGER_SECONDS)
        os._exit(1)


def serve_rank(launched: Launcher) -> int:
    """Be a worker that torchrun started, until rank 0 is done; the exit status.

    Signals that end a job are left to rank 0, which shuts the workers down.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    device = torch.device(f"cuda:{launched.local_rank}" if torch.cuda.is_available() else "cpu")
    use_device(device, launched.local_size)
    group = join_group(launched.rank, launched.size, "env://", device, launched.one_host)
    port = int(broadcast_text(group, "").split()[launched.rank - 1])
    link = socket.create_connection(("127.0.0.1" if launched.one_host else launched.address, port))
    messages.notice_silence(link)
    Worker(launched.rank, link).run(lambda: group)
    return 0


def main() -> NoReturn:
    rank, size, device, rendezvous = int(sys.argv[1]), int(sys.argv[2]), torch.device(sys.argv[3]), sys.argv[4]
    link = socket.socket(fileno=int(sys.argv[5]))
    link.set_inheritable(False)
    worker = Worker(rank, link)
    use_device(device, size)
    worker.run(lambda: join_group(rank, size, rendezvous, device))
    os._exit(0)  # the interpreter's own end takes a second, in which nothing would notice rank 0's


if __name__ == "__main__":
    main()
