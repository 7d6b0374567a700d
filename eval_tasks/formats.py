"""The file formats in which the six data sets circulate: a file becomes rows that know their place in it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from refmamba.errors import DataError
from refmamba.eval_tasks.task import DataRow

LABELS_SUFFIX = "-labels.lst"


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of each line, in order. Raises DataError for a line that is not UTF-8, or empty.

    Only a line feed ends a line; one byte order mark at the start, a carriage return at a line's end, and empty lines at the
    file's end are dropped.
    """
    for number, raw in enumerate(_read(file).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n"), 1):
        where = f"{file}:{number}"
        try:
            text = raw.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8; save the whole file as UTF-8") from None
        if not text.strip():
            raise DataError(f"{where}: the line is empty")
        yield where, text


def read_jsonl(file: Path) -> Iterator[DataRow]:
    """The rows of a file with one JSON object a line. Raises DataError."""
    for where, text in lines(file):
        try:
            values = json.loads(text)
            json.dumps(values, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
        except UnicodeEncodeError:
            raise DataError(f"{where}: half of a surrogate pair, \\ud800 to \\udfff, which is no character") from None
        except (ValueError, RecursionError) as error:  # thousands of digits, or of nested brackets
            raise DataError(f"{where}: broken JSON: {str(error).partition(':')[0]}") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: not a JSON object")
        yield DataRow(values, where)


def read_tsv(file: Path) -> Iterator[DataRow]:
    """The rows of GLUE's tables: tabs between fields, names in the first line, no quoting. Raises DataError."""
    rows = lines(file)
    names = next(rows)[1].split("\t")
    for where, text in rows:
        values = text.split("\t")
        if len(values) != len(names):
            raise DataError(f"{where}: {len(values)} fields, and the first line names {len(names)}")
        yield DataRow(dict(zip(names, values, strict=True)), where)


def read_xml(file: Path) -> Iterator[DataRow]:
    """The original COPA: <item asks-for= most-plausible-alternative=> with <p>, <a1> and <a2>, as SuperGLUE's fields.

    Raises DataError.
    """
    rows, parser, inside = [], expat.ParserCreate(), list[str]()
    names = {"p": "premise", "a1": "choice1", "a2": "choice2"}

    def start(tag: str, attributes: dict[str, str]) -> None:
        inside.append(tag)
        if tag == "item":
            values: dict[str, Any] = {"question": attributes.get("asks-for", "")}
            plausible = attributes.get("most-plausible-alternative", "")
            values["label"] = {"1": 0, "2": 1}.get(plausible, f"most-plausible-alternative={plausible}")
            rows.append(DataRow(values, f"{file}:{parser.CurrentLineNumber}"))
        elif tag in names and rows:
            rows[-1].values[names[tag]] = ""  # type: ignore[index]

    def text(data: str) -> None:
        if inside and inside[-1] in names and rows:
            rows[-1].values[names[inside[-1]]] += data  # type: ignore[index]

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: inside.pop()
    parser.CharacterDataHandler = text
    try:
        parser.Parse(_read(file), True)
    except expat.ExpatError as error:
        raise DataError(f"{file}:{error.lineno}: broken XML: {expat.ErrorString(error.code)}") from None
    yield from rows


def read_parquet(file: Path) -> Iterator[DataRow]:
    """The rows of the hub's files; a row's place is its number, from 1. Raises DataError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{file}: reading parquet needs pyarrow; install it with: pip install 'refmamba[eval]'") from None
    try:
        rows = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(rows, 1):
        yield DataRow(values, f"{file}:{number}")


READERS: dict[str, Callable[[Path], Iterator[DataRow]]] = {
    ".jsonl": read_jsonl, ".json": read_jsonl, ".tsv": read_tsv, ".xml": read_xml, ".parquet": read_parquet,
}  # fmt: skip


def read_rows(file: Path, labels: str | None = None) -> list[DataRow]:
    """All rows of a file; `labels` names the field that a file of labels beside it may hold. Raises DataError."""
    if file.is_dir():
        raise DataError(f"{file}: is a folder; give the file, or --data {file} for what is in it")
    if file.suffix.lower() not in READERS:
        raise DataError(f"{file}: unknown format '{file.suffix}'; there are {', '.join(READERS)}")
    rows = list(READERS[file.suffix.lower()](file))
    if not rows:
        raise DataError(f"{file}: there are no rows in it")
    if labels is None or labels in rows[0].values:
        return rows
    beside = file.with_name(file.stem + LABELS_SUFFIX)
    if not beside.is_file():
        raise DataError(f"{rows[0].where}: no field '{labels}', and no {beside.name} beside the file")
    values = [text.strip() for _, text in lines(beside)]
    if len(values) != len(rows):
        raise DataError(f"{beside}:{min(len(values), len(rows)) + 1}: {len(values)} labels for the {len(rows)} rows of {file}")
    labelled = zip(rows, values, strict=True)
    return [DataRow({**row.values, labels: text}, f"{row.where} (label in {beside.name})") for row, text in labelled]


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if not content:
        raise DataError(f"{file}: the file is empty")
    return content
