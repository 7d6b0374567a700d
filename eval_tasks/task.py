"""What a task is: a rule that turns a raw row into contexts and continuations, and the metrics taken from their scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refmamba.errors import DataError, printable


@dataclass(frozen=True)
class DataRow:
    """One raw row of a data file, and where it stands (`file:line`), which every error names.

    Each method reads a field and raises DataError, with that place, where it is missing or not what it should be.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, *names: str) -> str:
        """The text of the first of these fields that the row has; it must not be empty."""
        name = next((name for name in names if name in self.values), names[0])
        value = self.maybe_empty(name)
        if not value:
            raise DataError(f"{self.where}: field '{name}' is empty")
        return value

    def maybe_empty(self, name: str) -> str:
        """A text that may be empty."""
        value = self._field(name)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: field '{name}' is {_short(value)}; it must be a text")
        return value

    def texts(self, name: str, fewest: int, most: int | None = None) -> tuple[str, ...]:
        """A list of texts: as many as `fewest`, or up to `most`."""
        value, most = self._field(name), most or fewest
        if not isinstance(value, list) or not fewest <= len(value) <= most or not all(isinstance(v, str) for v in value):
            count = str(fewest) if fewest == most else f"{fewest} to {most}"
            raise DataError(f"{self.where}: field '{name}' is {_short(value)}; it must be a list of {count} texts")
        return tuple(value)

    def inner(self, name: str) -> "DataRow":
        """The object in a field, as a row."""
        value = self._field(name)
        if not isinstance(value, dict):
            raise DataError(f"{self.where}: field '{name}' is {_short(value)}; it must be an object")
        return DataRow(value, f"{self.where}, {name}")

    def rows(self, name: str) -> list["DataRow"]:
        """The objects of a list, as rows."""
        value = self._field(name)
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise DataError(f"{self.where}: field '{name}' is {_short(value)}; it must be a list of objects")
        return [DataRow(v, f"{self.where}, {name}") for v in value]

    def label(self, name: str, labels: Mapping[str, int]) -> int:
        """The index of the right choice, by its label; a numeric label may be a JSON number or a text."""
        value = self._field(name)
        if isinstance(value, bool) or not isinstance(value, int | str) or str(value) not in labels:
            raise DataError(f"{self.where}: label '{name}' is {_short(value)}; it must be one of {', '.join(labels)}")
        return labels[str(value)]

    def _field(self, name: str) -> Any:
        if name not in self.values:
            names = printable(", ".join(map(str, self.values)), 120) or "nothing"
            raise DataError(f"{self.where}: no field '{name}' (it has {names}); is this another task's file?")
        return self.values[name]


def _short(value: Any) -> str:
    return printable(repr(value), 60)


@dataclass(frozen=True)
class Document:
    """One question: choice i is scored as contexts[i] + continuations[i], and `gold` is the index of the right choice.

    A continuation begins with its delimiter, so that nothing is put between the two. LAMBADA has one choice.
    """

    where: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def choices(row: DataRow, context: str, texts: tuple[str, ...], gold: int) -> Document:
    """A multiple-choice document: one context; the delimiter, a space, before every choice."""
    return Document(row.where, (context,) * len(texts), tuple(" " + text for text in texts), gold)


@dataclass(frozen=True)
class HubFile:
    """The file of a data set on the hub that lm-evaluation-harness scores, pinned to a revision.

    sha256: of the file, where a public record of it is known; None where the hash that the hub gives for the revision is used.
    """

    repo: str
    revision: str
    file: str
    rows: int
    sha256: str | None


@dataclass(frozen=True)
class Task:
    """One task: how a row becomes a document, which metrics are taken, and where its data are.

    split: words that begin a word of the data file's name, for finding it in a folder. also: another name for the task's
    folder. labels: the field whose values may lie in a file of their own, `{stem}-labels.lst`, beside the rows. version: that
    of the harness's task, whose results these are to equal.
    """

    name: str
    document: Callable[[DataRow], Document]
    metrics: tuple[str, ...]
    hub: HubFile
    split: tuple[str, ...] = ("val", "dev")
    labels: str | None = None
    also: str = ""
    version: float = 1.0
