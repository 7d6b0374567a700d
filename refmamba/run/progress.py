"""Progress on stderr: of whatever takes longer than two seconds how much is done, and the time left."""

import sys
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

DELAY_SECONDS = 2.0  # of work without a bar
LOG_SECONDS = 10.0  # between two lines where stderr is a file


def bar(total: int, what: str, unit: str) -> "tqdm[Any]":
    """A bar that goes when it is closed. In a file it is a line now and then, which stays."""
    terminal = sys.stderr.isatty()
    interval = 0.1 if terminal else LOG_SECONDS
    return tqdm(total=total, desc=what, unit=unit, leave=not terminal, delay=DELAY_SECONDS if terminal else LOG_SECONDS,
                mininterval=interval, maxinterval=interval)  # fmt: skip


def say(line: str, *, error: bool = False) -> None:
    """A line on stdout, or on stderr, while there is a bar."""
    with tqdm.external_write_mode() if sys.stderr.isatty() else nullcontext():
        print(line, flush=True, file=sys.stderr if error else sys.stdout)
