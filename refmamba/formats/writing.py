"""The one place that writes files and folders: whole or not at all, whatever happens to the process or the disk.

The content goes to .NAME.PID.tmp beside the target, reaches the disk, and is then renamed. What a killed process left there is
removed by the next one that writes the same target.
"""

import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from refmamba.errors import CheckpointError, DataError
from refmamba.formats.reading import reason


def write_file(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `file`, then rename that to `file`. Raises DataError where it cannot be written.

    A symlink stays, and the file that it names is replaced; the mode of a file that is there stays. What is not a regular file,
    a device or a pipe, is written into.
    """
    check_file(file)
    try:
        if is_special(file):
            content = BytesIO()  # some formats seek, and a pipe cannot
            write(content)
            if file.is_fifo():
                print(f"refmamba: {file}: a pipe; waiting until it is read", file=sys.stderr)
            with file.open("wb") as special:
                special.write(content.getvalue())
            return
        target = _target(file)
        aside = _aside(target)
        try:
            with aside.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if target.exists():
                shutil.copymode(target, aside)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {reason(error)}") from error


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. Raises DataError."""
    write_file(file, lambda stream: stream.write(text.encode("utf-8")))


def json_text(values: Any, indent: int | None = None) -> str:
    """Values as JSON, where null stands for NaN and the infinities. What is no character, in a file's name, is escaped."""
    text = json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder`, new or empty before, when the block ends without an exception.

    Raises CheckpointError where it cannot be written; an OSError of the block is taken for that.
    """
    check_folder(folder)
    target = _target(folder)
    aside = _aside(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        aside.mkdir(parents=True)
        yield aside
        for part in aside.iterdir():
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not target.exists():
            for parent in missing:
                if parent.exists():
                    parent.rmdir()


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and remove it again where the block raises. Raises DataError."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be written: {reason(error)}") from error
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()
        raise


def save_tensors(tensors: dict[str, NDArray[Any]], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as one of a new folder's. Raises OSError."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    shutil.copymode(file.parent / "config.json", file)  # the library makes it readable by its owner only


def check_file(file: Path) -> None:
    """Raise DataError where `file` could not be written now. It is asked before the work whose result is written there.

    What a killed process left beside the file is removed.
    """
    try:
        if file.is_dir():
            raise DataError(f"{file}: is a folder; name a file to write to")
        if file.exists() and not os.access(file, os.W_OK):
            raise DataError(f"{file}: cannot be written: it is read-only")
        if is_special(file):
            return
        target = _target(file)
        if not target.parent.is_dir():
            folder = target.parent if file.is_symlink() else file.parent
            raise DataError(f"{file}: cannot be written: there is no folder {folder}")
        _remove_left(target)
        aside = _aside(target)
        aside.touch()
        aside.unlink()
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise DataError(f"{file}: cannot be written: {reason(error)}") from error


def check_folder(folder: Path) -> None:
    """Raise CheckpointError where `folder` is there and not empty, or could not be made now.

    It is asked before the work; what a killed process left beside the folder is removed.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: is there already and not an empty folder; name another")
        target = _target(folder)
        if target.exists() and (os.path.ismount(target) or target == Path.cwd()):
            raise CheckpointError(f"{folder}: cannot be replaced by a new folder; name one inside it")
        if target.parent.is_dir():
            _remove_left(target)
        place = next(parent for parent in target.parents if parent.exists())
        aside = _aside(place / target.name)
        aside.mkdir()
        aside.rmdir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {reason(error)}") from error


def is_special(file: Path) -> bool:
    """Whether there is something of this name that is no regular file, like a device, a pipe or a socket."""
    try:
        return not stat.S_ISREG(file.stat().st_mode)
    except FileNotFoundError:
        return False


def _target(path: Path) -> Path:
    """The path itself, of a symlink what it names."""
    return Path(os.path.realpath(path))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _remove_left(target: Path) -> None:
    """Remove what processes that are gone left beside the target."""
    name = re.compile(re.escape(f".{target.name}.") + r"(\d+)\.tmp")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
