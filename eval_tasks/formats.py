"""The file formats in which the data sets circulate: a file becomes rows that know their place in it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from refmamba.errors import DataError, EncodingError, FileTooLargeError, printable
from refmamba.eval_tasks.task import DataRow
from refmamba.formats.reading import MARK, TEXT_BYTES, exists, folder_exists, parse_object, read_bytes, read_start

LABELS_SUFFIX = "-labels.lst"
MOST_ROWS = 1_000_000  # of a parquet file, where a few bytes can stand for any number of equal rows


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of each line, in order. Raises EncodingError, and DataError for an empty line.

    Only a line feed ends a line; one byte order mark at the start, a carriage return at a line's end, and empty lines at the
    file's end are dropped.
    """
    for number, raw in enumerate(_read(file).removeprefix(MARK).rstrip(b"\r\n").split(b"\n"), 1):
        where = f"{file}:{number}"
        try:
            text = raw.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise EncodingError(f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8; save the whole file as UTF-8") from None
        if not text.strip():
            raise DataError(f"{where}: the line is empty")
        yield where, text


def read_jsonl(file: Path) -> Iterator[DataRow]:
    """The rows of a file with one JSON object a line. Raises FileError, DataError."""
    for where, text in lines(file):
        yield DataRow(parse_object(text.encode("utf-8"), where), where)


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

    UTF-8, and without a document type: its entities can make gigabytes of a few bytes. Raises FileError, DataError.
    """
    rows, parser, inside, pieces = [], expat.ParserCreate("utf-8"), list[str](), list[str]()
    names = {"p": "premise", "a1": "choice1", "a2": "choice2"}

    def declared(version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "utf8", "us-ascii"):
            raise EncodingError(f"{file}: its encoding is {printable(encoding, 40)}; save the file as UTF-8")

    def doctype(*_: Any) -> None:
        raise DataError(f"{file}:{parser.CurrentLineNumber}: a DOCTYPE is not read; take it out")

    def start(tag: str, attributes: dict[str, str]) -> None:
        inside.append(tag)
        pieces.clear()
        if tag == "item":
            values: dict[str, Any] = {"question": attributes.get("asks-for", "")}
            plausible = attributes.get("most-plausible-alternative", "")
            values["label"] = {"1": 0, "2": 1}.get(plausible, f"most-plausible-alternative={plausible}")
            rows.append((values, f"{file}:{parser.CurrentLineNumber}"))

    def text(data: str) -> None:
        if inside[-1] in names:
            pieces.append(data)

    def end(tag: str) -> None:
        inside.pop()
        if tag in names and rows:
            rows[-1][0][names[tag]] = "".join(pieces)
        pieces.clear()

    parser.XmlDeclHandler, parser.StartDoctypeDeclHandler = declared, doctype
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.buffer_text = True
    try:
        parser.Parse(_read(file), True)
    except expat.ExpatError as error:
        raise DataError(f"{file}:{error.lineno}: broken XML: {expat.ErrorString(error.code)}") from None
    yield from (DataRow(values, where) for values, where in rows)


def read_parquet(file: Path) -> Iterator[DataRow]:
    """The rows of the hub's files; a row's place is its number, from 1. Raises FileError, DataError."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{file}: reading parquet needs pyarrow; install it with: pip install 'refmamba[eval]'") from None
    read_start(file, 1)
    try:
        with parquet.ParquetFile(file) as opened:
            groups = (opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups))
            n_rows, n_bytes = opened.metadata.num_rows, sum(group.total_byte_size for group in groups)
            rows = opened.read().to_pylist() if n_rows <= MOST_ROWS and n_bytes <= TEXT_BYTES else None
    except Exception as error:  # the library raises anything for a broken file, or for a value that Python has no type for
        reason = printable(next(iter(str(error).splitlines()), type(error).__name__), 120)
        raise DataError(f"{file}: cannot be read as parquet: {reason}") from None
    if rows is None:
        raise FileTooLargeError(f"{file}: has {n_rows} rows, of {n_bytes} bytes: more than any of the tasks")
    for number, values in enumerate(rows, 1):
        yield DataRow(values, f"{file}:{number}")


READERS: dict[str, Callable[[Path], Iterator[DataRow]]] = {
    ".jsonl": read_jsonl, ".json": read_jsonl, ".tsv": read_tsv, ".xml": read_xml, ".parquet": read_parquet,
}  # fmt: skip


def read_rows(file: Path, labels: str | None = None) -> list[DataRow]:
    """All rows of a file; `labels` names the field that a file of labels beside it may hold. Raises DataError."""
    if folder_exists(file):
        raise DataError(f"{file}: is a folder; give the file, or --data {file} for what is in it")
    if file.suffix.lower() not in READERS:
        raise DataError(f"{file}: unknown format '{file.suffix}'; there are {', '.join(READERS)}")
    rows = list(READERS[file.suffix.lower()](file))
    if not rows:
        raise DataError(f"{file}: there are no rows in it")
    if labels is None or labels in rows[0].values:
        return rows
    beside = file.with_name(file.stem + LABELS_SUFFIX)
    if not exists(beside):
        raise DataError(f"{rows[0].where}: no field '{labels}', and no {beside.name} beside the file")
    values = [text.strip() for _, text in lines(beside)]
    if len(values) != len(rows):
        raise DataError(f"{beside}:{min(len(values), len(rows)) + 1}: {len(values)} labels for the {len(rows)} rows of {file}")
    labelled = zip(rows, values, strict=True)
    return [DataRow({**row.values, labels: text}, f"{row.where} (label in {beside.name})") for row, text in labelled]


def _read(file: Path) -> bytes:
    content = read_bytes(file, TEXT_BYTES)
    if not content:
        raise DataError(f"{file}: the file is empty")
    return content
