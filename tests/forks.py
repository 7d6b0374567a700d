"""Commands as processes of their own, forked from one that has imported them all: what a new process does after its imports."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from refmamba.commands.main import COMMANDS

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([f"refmamba.commands.{name.replace('-', '_')}" for name in COMMANDS])


def run(words: Sequence[str], streams: Mapping[int, str | None] = {}) -> subprocess.CompletedProcess[str]:
    """A command in this folder, its standard streams these files, or closed; stdout and stderr are else what is returned."""
    with tempfile.TemporaryDirectory() as folder:
        files = {number: str(Path(folder, str(number))) for number in (1, 2)}
        process = _FORKS.Process(target=_main, args=(words, {0: os.devnull, **files, **streams}, os.getcwd(), dict(os.environ)))
        process.start()
        process.join(300)
        assert process.exitcode is not None, f"{words} has not ended"
        out, err = (Path(file).read_text("utf-8") if Path(file).exists() else "" for file in files.values())
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _main(words: Sequence[str], streams: Mapping[int, str | None], folder: str, environment: Mapping[str, str]) -> None:
    """What `python -m refmamba` does."""
    from refmamba.commands import entry

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in streams:
        os.close(number)
    for number, file in streams.items():
        if file is not None:
            opened = os.open(file, os.O_RDWR | os.O_CREAT)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (_stream(number, "rw"[number > 0]) for number in range(3))
    sys.argv = ["refmamba", *words]
    entry.main()


def _stream(number: int, mode: str) -> object:
    """As Python opens a standard stream when it starts: None where it is closed."""
    with contextlib.suppress(OSError):
        os.fstat(number)
        return open(number, mode, encoding="utf-8", closefd=False)
    return None
