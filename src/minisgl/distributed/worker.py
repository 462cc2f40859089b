"""A worker: the process of a rank other than 0, which executes the plans that rank 0 sends.

Rank 0 starts it by `python -m minisgl.distributed.worker RANK SIZE DEVICE FOLDER`, or torchrun does. It ends at once
when rank 0 is gone, which its stdin or its connection says: it may be in a collective that will never finish.
"""

import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch
import zmq

from minisgl.config import Launcher
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import read_spec
from minisgl.distributed import messages
from minisgl.distributed.collectives import TPGroup, broadcast_text, join_group
from minisgl.distributed.executor import build_rank_executor, use_device
from minisgl.distributed.messages import FinishStep, LaunchStep, LoadModel, ShutdownWorker, WorkerFailed, WorkerStarted
from minisgl.distributed.worker_pool import POLL_MS
from minisgl.errors import ConfigError, MinisglError, ModelError
from minisgl.formats.hub import locate_model

LINGER_MS = 1000
SHUTDOWN_SECONDS = 0.5  # in which ShutdownWorker may still arrive after rank 0's connection has ended
RENDEZVOUS_SECONDS = 2.0  # how long the rendezvous' folder is kept when rank 0 ends before all ranks have joined


class Worker:
    """Starts steps in one thread and waits for their ends in another, so that no step starts late."""

    def __init__(self, rank: int, plans: str, reports: str) -> None:
        self.rank = rank
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._plans = messages.make_socket(self._context, zmq.PULL, plans, LINGER_MS)
        self._reports = messages.make_socket(self._context, zmq.PUSH, reports, LINGER_MS)
        self._plans.connect(plans)
        self._reports.connect(reports)
        self._reporting = threading.Lock()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def end_with_connection(self) -> None:
        """From here on the process ends when its connection to rank 0 does, unless ShutdownWorker has come."""
        monitor = self._plans.get_monitor_socket(zmq.EVENT_DISCONNECTED)

        def watch() -> None:
            while not self._closed.is_set():
                if monitor.poll(POLL_MS) and not self._closed.wait(SHUTDOWN_SECONDS):
                    os._exit(1)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()

    def run(self, join: Callable[[], TPGroup]) -> None:
        """Join the group, load the model, and execute plans until ShutdownWorker. Ends the process when that fails."""
        self._report(WorkerStarted(self.rank))
        try:
            executor, group = self._load(join())
            group.barrier()  # every rank is ready
            self._execute(executor)
            group.collectives.close()
        except Exception as error:
            self._fail(error)
        if self._watcher is not None:  # a socket that another thread waits on must not be closed
            self._watcher.join()
            self._plans.disable_monitor()
        self._context.destroy(linger=LINGER_MS)

    def _load(self, group: TPGroup) -> tuple[LocalExecutor, TPGroup]:
        message = self._receive()
        assert isinstance(message, LoadModel)
        config, folder = message.config, Path(message.folder)
        logging.basicConfig(level=config.log_level, format=f"%(asctime)s %(levelname)s rank {self.rank} %(message)s")
        if not folder.is_dir():  # rank 0 is on another host
            weights = not config.dummy_weight
            folder = locate_model(config.model, config.model_source, dtype=config.dtype, weights=weights)
        executor, group, _ = build_rank_executor(config, folder, read_spec(folder), message.max_seq_len, group)
        return executor, group

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
        self._closed.set()
        collector.shutdown()
        executor.close()

    def _collect(self, executor: LocalExecutor) -> None:
        try:
            executor.collect()
        except Exception as error:
            self._fail(error)

    def _receive(self) -> messages.ToWorker:
        return messages.TO_WORKER.decode(self._plans.recv())

    def _report(self, message: messages.FromWorker) -> None:
        with self._reporting:
            self._reports.send(messages.ENCODER.encode(message))

    def _fail(self, error: Exception) -> NoReturn:
        """Report the error and end the process: other ranks may wait for this one in a collective."""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MinisglError):
            text = error.message
        else:
            traceback.print_exception(error)
        self._report(WorkerFailed(self.rank, text, isinstance(error, (ConfigError, ModelError))))
        with self._reporting:
            self._reports.close()
        time.sleep(LINGER_MS / 1000)
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
    *plans, reports = broadcast_text(group, "").replace("0.0.0.0", launched.address).split()
    worker = Worker(launched.rank, plans[launched.rank - 1], reports)
    worker.end_with_connection()
    worker.run(lambda: group)
    return 0


def main() -> NoReturn:
    rank, size, device, folder = int(sys.argv[1]), int(sys.argv[2]), torch.device(sys.argv[3]), sys.argv[4]
    joined = threading.Event()
    follower = threading.Thread(target=end_with_parent, args=(folder, joined), daemon=True)
    follower.start()
    use_device(device, size)
    worker = Worker(rank, f"ipc://{folder}/plans-{rank}", f"ipc://{folder}/reports")
    if select.select([sys.stdin], [], [], 0)[0]:  # rank 0 is gone already
        follower.join()

    def join() -> TPGroup:
        group = join_group(rank, size, f"file://{folder}/rendezvous", device)
        joined.set()
        return group

    worker.run(join)
    os._exit(0)  # the interpreter's own end takes a second, in which nothing would notice rank 0's


def end_with_parent(folder: str, joined: threading.Event) -> None:
    """Wait for the end of stdin, which is rank 0's, and end this process."""
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: the buffer's lock would be held when the process ends
        pass
    # Without its folder the rendezvous searches for minutes, and holds the interpreter's lock.
    joined.wait(RENDEZVOUS_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
