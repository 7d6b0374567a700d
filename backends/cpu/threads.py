"""The threads that a kernel runs on."""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backends.cpu.memory import address
from refmamba.errors import BackendError

SUBNORMAL = float(np.int64(1 << 44).view(np.float64))  # 2^-1030, by its bits: no thread that flushes could compute it
Job = Callable[[int, int], None]


def check_subnormals() -> None:
    """Raise BackendError where this thread flushes subnormal numbers to zero: the decaying state needs them.

    A thread's setting is for float32 and float64 alike. What is compared is a normal number: a thread that flushes takes a
    subnormal for a zero when it compares, too.
    """
    if SUBNORMAL * 0.5 * 2.0**100 != 2.0**-931:
        raise BackendError("subnormal numbers are flushed to zero in this process, so bits would differ; switch that off")


class Threads:
    """One kernel at a time on `count` threads, the caller's among them.

    numba's own pools are not used: one of them aborts on two callers, another dies in a forked child, and both take
    longer to start a region than a region takes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock, self._process, self._jobs = threading.Lock(), 0, list[queue.SimpleQueue[Any]]()

    def _work(self, rank: int, jobs: "queue.SimpleQueue[Any]") -> None:
        while True:
            job, table, ends, woken = jobs.get()
            try:
                check_subnormals()
                job(rank, address(table))
                ends.append(None)
            except BaseException as error:  # the caller's to see, and the next job's turn
                ends.append(error)
            woken.put(None)

    def _start(self) -> None:
        self._process, self._jobs = os.getpid(), [queue.SimpleQueue() for _ in range(self.count - 1)]
        for rank, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(rank, jobs), daemon=True).start()

    def run(self, job: Job, table: NDArray[np.int64]) -> None:
        """job(rank, address of table) on every thread.

        Raises, when all have ended, what a job raises or an interrupt; BackendError where a thread flushes subnormal numbers
        to zero.
        """
        check_subnormals()
        if self._process != os.getpid():  # the first call, or a forked child, which has none of its parent's threads
            self._lock = threading.Lock()
            self._start()
        with self._lock:
            ends, woken = list[BaseException | None](), queue.SimpleQueue[None]()
            for jobs in self._jobs:
                jobs.put((job, table, ends, woken))
            try:
                job(0, address(table))
            finally:
                self._wait(ends, woken)
            if errors := [error for error in ends if error]:
                raise errors[0]

    def _wait(self, ends: list[BaseException | None], woken: "queue.SimpleQueue[None]") -> None:
        """Until the other threads have ended, through every interrupt: they write into memory that the caller would free."""
        interrupt = None
        while len(ends) < len(self._jobs):
            try:
                woken.get()
            except BaseException as error:
                interrupt = error
        if interrupt:
            raise interrupt
