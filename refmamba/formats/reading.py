"""The one place that opens files of the user and of others: regular files only, none larger than it could rightly be, and
JSON no deeper and with no longer numbers than what reads it can bear.
"""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from refmamba.errors import (
    EncodingError,
    FileTooLargeError,
    JSONError,
    MissingFileError,
    SpecialFileError,
    UnreadableFileError,
    printable,
)  # fmt: skip

MEGABYTE = 2**20
CONFIG_BYTES = 8 * MEGABYTE  # a config, an index, a scheme; the largest index that is published has less than 1
TABLE_BYTES = 64 * MEGABYTE  # a tokenizer or a calibration; the largest tokenizer that is published has about 35
TEXT_BYTES = 512 * MEGABYTE  # a text, or the rows of a task
DEEPEST = 64  # brackets inside each other, in JSON
DIGITS = 19  # of a whole number, in JSON: 64 bits
MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
SPECIAL = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def exists(file: Path) -> bool:
    """Whether there is something of this name. Raises UnreadableFileError where the system does not say."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"{file}: cannot be read: {reason(error)}") from None
    return True


def regular(file: Path) -> Path:
    """The file, which is there and regular: opening a pipe may wait for ever, and reading a device may never end.

    Raises MissingFileError, UnreadableFileError, SpecialFileError.
    """
    if not exists(file):
        raise MissingFileError(f"{file}: no such file")
    mode = stat.S_IFMT(file.stat().st_mode)
    if mode != stat.S_IFREG:
        raise SpecialFileError(f"{file}: is {SPECIAL.get(mode, 'something else')}, and a file is needed")
    return file


def folder_exists(folder: Path) -> bool:
    """Whether there is a folder of this name. Raises UnreadableFileError where the system does not say."""
    return exists(folder) and stat.S_ISDIR(folder.stat().st_mode)


def listed(folder: Path) -> list[Path]:
    """What is in a folder. Raises UnreadableFileError."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UnreadableFileError(f"{folder}: cannot be read: {reason(error)}") from None


def read_start(file: Path, count: int) -> bytes:
    """The first bytes of a file, fewer where it has fewer. Raises FileError."""
    try:
        with regular(file).open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise UnreadableFileError(f"{file}: cannot be read: {reason(error)}") from None


def read_bytes(file: Path, largest: int) -> bytes:
    """The content of a file. Raises FileError where it has more than `largest` bytes, or cannot be read."""
    try:
        with regular(file).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > largest:
                raise FileTooLargeError(f"{file}: has more than {largest // MEGABYTE} MB, too many for what it should hold")
            return stream.read(size)
    except OSError as error:
        raise UnreadableFileError(f"{file}: cannot be read: {reason(error)}") from None


def read_utf8(file: Path, largest: int) -> str:
    """The text of a file as it is, but for a byte order mark at its start, which is left out. Raises FileError."""
    return _utf8(read_bytes(file, largest), str(file))


def read_standard_input(largest: int) -> str:
    """The text that comes on standard input until it ends, as `read_utf8` gives that of a file. Raises FileError."""
    where, content = "standard input", b""
    if sys.stdin is None:
        raise UnreadableFileError(f"{where}: is closed")
    try:
        content = sys.stdin.buffer.read(largest + 1)
    except OSError as error:
        raise UnreadableFileError(f"{where}: cannot be read: {reason(error)}") from None
    if len(content) > largest:
        raise FileTooLargeError(f"{where}: has more than {largest // MEGABYTE} MB, too many for what it should hold")
    return _utf8(content, where)


def unread_standard_input() -> str | None:
    """What standard input is where a command that does not read it was given something: `a pipe`, or `a file`.

    Nothing is read, so that nothing is waited for.
    """
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # it is closed
        return None
    return "a pipe" if stat.S_ISFIFO(mode) else "a file" if stat.S_ISREG(mode) else None


def _utf8(content: bytes, where: str) -> str:
    content = content.removeprefix(MARK)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x} in line {line}"
        raise EncodingError(f"{where}: {byte} is not UTF-8; save the file as UTF-8") from None


def read_json(file: Path, largest: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises FileError."""
    return parse_object(read_bytes(file, largest), str(file))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises JSONError, which begins with `where`."""
    values = parse_json(content, where)
    if not isinstance(values, dict):
        raise JSONError(f"{where}: not a JSON object")
    return values


def parse_json(content: bytes, where: str) -> Any:
    """A JSON value, at most DEEPEST deep, its whole numbers of at most DIGITS digits, its texts Unicode.

    Raises JSONError, which begins with `where`.
    """
    try:
        values = json.loads(content.removeprefix(MARK).decode("utf-8"), parse_int=_whole_number)
        if b"\\ud" in content.lower():  # perhaps half of a surrogate pair, which is no character
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if b"\n" in content.strip() else ""
        raise JSONError(f"{where}: not JSON at {place}column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise JSONError(f"{where}: not JSON: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except UnicodeEncodeError:
        raise JSONError(f"{where}: half of a surrogate pair, \\ud800 to \\udfff, which is no character") from None
    except ValueError as error:
        raise JSONError(f"{where}: {error}") from None
    except RecursionError:
        raise JSONError(f"{where}: brackets stand more than {DEEPEST} deep") from None
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(DEEPEST):
        parts = (part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole))
        level = [part for part in parts if isinstance(part, dict | list)]
    if level:
        raise JSONError(f"{where}: brackets stand more than {DEEPEST} deep")
    return values


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS + digits.startswith("-"):
        raise ValueError(f"the number {printable(digits, 40)} has more than {DIGITS} digits")
    return int(digits)


def reason(error: Exception) -> str:
    """What the system says, in its words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
