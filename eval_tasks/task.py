"""What a task is: a rule that turns a raw row into contexts and continuations, and the metrics taken from their scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refmamba.errors import DataError


@dataclass(frozen=True)
class Row:
    """One raw row of a data file, and where it stands (`file:line`), which every error names."""

    values: Mapping[str, Any]
    where: str

    def text(self, *names: str) -> str:
        """The first of these fields that is there, a text that is not empty. Raises DataError."""
        name = next((name for name in names if name in self.values), names[0])
        value = self.maybe_empty(name)
        if not value:
            raise DataError(f"{self.where}: field '{name}' is empty")
        return value

    def maybe_empty(self, name: str) -> str:
        """A text that may be empty. Raises DataError."""
        value = self._field(name)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: field '{name}' is {_short(value)}; it must be a text")
        return value

    def texts(self, name: str, count: int) -> tuple[str, ...]:
        """A list of `count` texts. Raises DataError."""
        value = self._field(name)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, str) for v in value):
            raise DataError(f"{self.where}: field '{name}' is {_short(value)}; it must be a list of {count} texts")
        return tuple(value)

    def label(self, name: str, labels: Mapping[str, int]) -> int:
        """The index of the right choice; a number may stand as a number or as a text. Raises DataError."""
        value = self._field(name)
        if isinstance(value, bool) or not isinstance(value, int | str) or str(value) not in labels:
            raise DataError(f"{self.where}: label '{name}' is {_short(value)}; it must be one of {', '.join(labels)}")
        return labels[str(value)]

    def _field(self, name: str) -> Any:
        if name not in self.values:
            there = ", ".join(map(str, self.values)) or "nothing"
            raise DataError(f"{self.where}: no field '{name}' (it has {there}); is this another task's file?")
        return self.values[name]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Document:
    """One question: contexts[i] + continuations[i] is what choice i is scored as; `gold` is the right one.

    Continuations hold their delimiter: what is scored is exactly context + continuation. LAMBADA has one choice.
    """

    where: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def choices(row: Row, context: str, texts: tuple[str, ...], gold: int) -> Document:
    """A multiple-choice document: one context; the delimiter, a space, before every choice."""
    return Document(row.where, (context,) * len(texts), tuple(" " + text for text in texts), gold)


@dataclass(frozen=True)
class HubFile:
    """The file of a data set on the hub that lm-evaluation-harness scores, as it was when this was written.

    sha256: of the file, where a public record of it was found; None where what the hub says for the revision must do.
    """

    repo: str
    revision: str
    file: str
    rows: int
    sha256: str | None


@dataclass(frozen=True)
class Task:
    """One task. `split`: the words of which one stands in its file's name; `version`: the harness's, of its task text.

    `also`: what a folder of the task may be called besides `name`.
    `labels`: the field whose values may stand in a file of their own, `{stem}-labels.lst`, beside the rows.
    """

    name: str
    document: Callable[[Row], Document]
    metrics: tuple[str, ...]
    hub: HubFile
    split: tuple[str, ...] = ("val", "dev")
    labels: str | None = None
    also: str = ""
    version: float = 1.0
