"""Progress on stderr: a bar for each task and one for all, with documents/s and the time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0  # between two lines where stderr is a file


class Progress:
    """The bar of all tasks, and that of the task at hand."""

    def __init__(self, total: int) -> None:
        self._all, self._task = _bar(total, "all", 0), _bar(0, "", 1)

    def start(self, name: str, total: int) -> None:
        """The next task."""
        self._task.close()
        self._task = _bar(total, name, 1)

    def found(self, documents: int) -> None:
        """These were finished before: done, but not part of the speed."""
        for bar in (self._all, self._task):
            if not bar.disable:
                bar.initial += documents
            bar.update(documents)

    def saved(self, documents: int) -> None:
        """These are finished now."""
        for bar in (self._all, self._task):
            bar.update(documents)

    def close(self) -> None:
        """Leave the bar of all on the screen."""
        self._task.close()
        self._all.close()


def _bar(total: int, name: str, position: int) -> "tqdm[Any]":
    """Position 0 is the bar of all; where stderr is a file it is the only one, and slow. A bar without a name is hidden."""
    terminal = sys.stderr.isatty() and name != ""
    return tqdm(total=total, desc=name, unit="doc", position=position, leave=position == 0, maxinterval=0,
                mininterval=0.1 if terminal else LOG_SECONDS, disable=position > 0 and not terminal)  # fmt: skip


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """The bars while documents are scored."""
    bars = Progress(total)
    try:
        yield bars
    finally:
        bars.close()
