"""The threads that a kernel runs on."""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backends.cpu.memory import address

Job = Callable[[int, int], None]


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
            job, table, done = jobs.get()
            job(rank, address(table))
            done.put(rank)

    def _start(self) -> None:
        self._process, self._jobs = os.getpid(), [queue.SimpleQueue() for _ in range(self.count - 1)]
        for rank, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(rank, jobs), daemon=True).start()

    def run(self, job: Job, table: NDArray[np.int64]) -> None:
        """job(rank, address of table) on every thread."""
        if self._process != os.getpid():  # the first call, or a forked child, which has none of its parent's threads
            self._lock = threading.Lock()
            self._start()
        with self._lock:
            done: queue.SimpleQueue[int] = queue.SimpleQueue()
            for jobs in self._jobs:
                jobs.put((job, table, done))
            try:
                job(0, address(table))
            finally:  # an interrupt too waits for the others, who still write
                for _ in self._jobs:
                    done.get()
