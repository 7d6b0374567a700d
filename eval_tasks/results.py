"""Results in one SQLite file: what is finished is there, whole, whatever happens to the process.

A document's result is kept under everything that its numbers depend on (`Key`), so nothing is computed twice and
nothing is taken for something else. Blocks of documents are written in one transaction each. Several processes may
write to the file, on one machine (SQLite's log needs shared memory); for a document that two of them computed, the
first result stays.
"""

import json
import math
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from refmamba.errors import DataError, printable
from refmamba.eval_tasks.score import Score
from refmamba.formats.reading import exists, parse_json, regular

QUIET_SECONDS, WAIT_SECONDS = 2.0, 60.0  # for another writer's transaction: without a word, and at all
APPLICATION = 0x72666D62  # marks the file as ours
TABLES = (
    f"PRAGMA application_id = {APPLICATION}",
    "CREATE TABLE run (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE)",
    "CREATE TABLE result (run INTEGER NOT NULL REFERENCES run(id), doc_id INTEGER NOT NULL, loglikelihoods TEXT NOT NULL, "
    "greedy TEXT NOT NULL, PRIMARY KEY (run, doc_id)) WITHOUT ROWID",
)


@dataclass(frozen=True)
class Key:
    """What a document's numbers depend on, besides the document: together with doc_id, a result's name.

    model: SHA-256 of the model's files; scheme: its map as JSON; calibration: SHA-256 of what it was calibrated with, or
    empty; data: Dataset.sha256; add_bos: as ModelChoice has it. backend, device and dtype are empty for exact backends, whose
    bits are all the same; dtype names the kernels too, where the backend does (`refmamba.backend.numerics`).
    """

    model: str
    scheme: str
    calibration: str
    task: str
    data: str
    spec_version: str
    max_length: int
    add_bos: bool | None = None
    backend: str = ""
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Result:
    """One document's scores, in the order of its choices."""

    doc_id: int
    scores: tuple[Score, ...]


class Results:
    """An open results file. Raises DataError where the file is something else, or stays locked."""

    def __init__(self, file: Path) -> None:
        self._file = file
        if exists(file):
            regular(file)
        try:
            self._database = sqlite3.connect(file, timeout=0.5, isolation_level=None)
            self._open()  # a UnicodeDecodeError is of an error's own text, which tells a name from the file
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be used as a results file: {error}; give another --results FILE") from error

    def _open(self) -> None:
        with self._transaction():
            if self._one("SELECT count(*) FROM sqlite_master") == 0:
                for statement in TABLES:
                    self._database.execute(statement)
            elif self._one("PRAGMA application_id") != APPLICATION:
                raise sqlite3.DatabaseError("it is another program's database")
        self._execute("PRAGMA journal_mode = WAL")  # readers and one writer at a time, safe against kill -9

    def _execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        """A statement that may find the file locked by another process: wait for that, and say so."""
        start, said = time.monotonic(), False
        while True:
            try:
                return self._database.execute(statement, parameters)
            except sqlite3.OperationalError as error:
                waited = time.monotonic() - start
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or waited > WAIT_SECONDS:
                    raise
            if waited > QUIET_SECONDS and not said:
                words = f"{self._file} is locked by another process; waiting for it, {WAIT_SECONDS:.0f} seconds at most"
                tqdm.write(words, file=sys.stderr)
                said = True
            time.sleep(0.02)  # a change of journal mode does not wait by itself

    def _one(self, query: str) -> Any:
        return self._database.execute(query).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._database.close()

    def load(self, key: Key) -> dict[int, Result]:
        """The finished results under a key, by doc_id. Raises DataError, JSONError where the file is broken."""
        query = "SELECT doc_id, loglikelihoods, greedy FROM result JOIN run ON run.id = run WHERE key = ?"
        try:
            rows = self._execute(query, _text(key)).fetchall()
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
            raise DataError(f"{self._file}: cannot be read: {error}") from error
        return {row[0]: self._result(*row) for row in rows}

    def _result(self, doc_id: Any, values: Any, greedy: Any) -> Result:
        """What a row holds, if it is what `save` writes."""
        where = f"{self._file}: the result of document {printable(repr(doc_id), 40)}"
        if not (type(doc_id) is int and isinstance(values, str) and isinstance(greedy, str)):
            raise DataError(f"{where} is broken; give another --results FILE")
        numbers, flags = parse_json(values.encode(), where), parse_json(greedy.encode(), where)
        lists = isinstance(numbers, list) and isinstance(flags, list) and len(numbers) == len(flags) > 0
        if not lists or not all(type(x) is float and math.isfinite(x) for x in numbers) or {*map(type, flags)} != {bool}:
            raise DataError(f"{where} is broken; give another --results FILE")
        return Result(doc_id, tuple(map(Score, numbers, flags)))

    def save(self, key: Key, block: Iterable[Result]) -> None:
        """Write a block of results, whole or not at all. Raises DataError where the file cannot be written."""
        rows = [
            (r.doc_id, json.dumps([s.loglikelihood for s in r.scores]), json.dumps([s.greedy for s in r.scores]), _text(key))
            for r in block
        ]
        insert = "INSERT INTO result SELECT id, ?, ?, ? FROM run WHERE key = ? ON CONFLICT (run, doc_id) DO NOTHING"
        try:
            with self._transaction():
                self._database.execute("INSERT INTO run (key) VALUES (?) ON CONFLICT (key) DO NOTHING", [_text(key)])
                self._database.executemany(insert, rows)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self._file}: cannot be written: {error}") from error


def _text(key: Key) -> str:
    return json.dumps(asdict(key), sort_keys=True)
