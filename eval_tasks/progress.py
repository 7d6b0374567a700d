"""Progress on stderr: a bar for each task and one for all, with documents/s and the time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from refmamba.run.progress import LOG_SECONDS


class Progress:
    """Two bars: one for all tasks, one for the task that is being scored."""

    def __init__(self, total: int) -> None:
        self._all, self._task = _bar(total, "all", 0), _bar(0, "", 1)

    def start(self, name: str, total: int) -> None:
        """Begin the bar of the next task, of `total` documents."""
        self._task.close()
        self._task = _bar(total, name, 1)

    def skip(self, documents: int) -> None:
        """Count documents that an earlier run had finished: they are done, but no part of the speed."""
        for bar in (self._all, self._task):
            if not bar.disable:
                bar.initial += documents
            bar.update(documents)

    def saved(self, documents: int) -> None:
        """Count documents that this run has finished."""
        for bar in (self._all, self._task):
            bar.update(documents)

    def close(self) -> None:
        """End both bars; the bar of all tasks stays on the screen."""
        self._task.close()
        self._all.close()


def _bar(total: int, name: str, position: int) -> "tqdm[Any]":
    """A bar on stderr. Position 0 is the bar of all tasks: in a file it is the only one, and it is written rarely.

    A bar without a name is hidden.
    """
    terminal = sys.stderr.isatty() and name != ""
    return tqdm(total=total, desc=name, unit="doc", position=position, leave=position == 0, maxinterval=0,
                mininterval=0.1 if terminal else LOG_SECONDS, disable=position > 0 and not terminal)  # fmt: skip


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """The bars, shown while documents are scored and closed after them."""
    bars = Progress(total)
    try:
        yield bars
    finally:
        bars.close()
