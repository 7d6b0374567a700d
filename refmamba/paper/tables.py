"""The paper's tables, ours beside the published figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refmamba.eval_tasks.load import Dataset
from refmamba.eval_tasks.metrics import acc, mean_stderr
from refmamba.eval_tasks.report import Outcome
from refmamba.paper import ablation as ablate
from refmamba.paper.outliers import Report
from refmamba.paper.planted import CHANNEL
from refmamba.paper.published import NORMED, PAPER_TASKS, TABLE_1, TABLE_2, paper_size, successors


@dataclass(frozen=True)
class Cell:
    """One figure, per cent: ours with its standard error (NaN for one document), the paper's where it is known.

    The paper gives no errors, so that of the difference is ours too. answers: of a task's accuracy, 1.0 for each document
    answered rightly and 0.0 for each other, in the order of the documents.
    """

    value: float
    stderr: float
    paper: float | None
    answers: tuple[float, ...] = ()

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None else self.value - self.paper

    def to_json(self) -> dict[str, float | None]:
        """The four figures, null for each that is not known."""
        stderr = None if math.isnan(self.stderr) else self.stderr
        return {"value": self.value, "stderr": stderr, "paper": self.paper, "difference": self.difference}


@dataclass(frozen=True)
class TextRow:
    """What the text shows of a scheme. divergence: mean KL(fp32 || scheme), nats a token. weight_bytes: that a token reads."""

    bits_per_byte: float
    divergence: float
    weight_bytes: int


def averaged(names: Sequence[str]) -> list[str]:
    """The tasks whose accuracies make the average: the paper's; all where none of the paper's was scored."""
    return [name for name in names if name in PAPER_TASKS] or list(names)


def cells(model: str, scheme: str, outcomes: Sequence[Outcome]) -> dict[str, Cell]:
    """A row of table 1: a task's acc, beside it acc_norm where that is what others report; then the average of acc."""
    published = TABLE_1.get(scheme) if paper_size(model) == "1.4b" else None
    row: dict[str, Cell] = {}
    counted = averaged([outcome.data.task.name for outcome in outcomes])
    for outcome in outcomes:
        name = outcome.data.task.name
        known = published[PAPER_TASKS.index(name)] if published and name in PAPER_TASKS else None
        for metric in outcome.metrics():
            if metric.name == "acc":
                paper = None if (name, scheme) == ("hellaswag", "fp32") else known
                answers = tuple(acc(outcome.data.documents[result.doc_id], result) for result in outcome.finished)
                row[name] = Cell(100 * metric.value, 100 * metric.stderr, paper, answers if name in counted else ())
            elif metric.name == "acc_norm" and name in NORMED:
                row[f"{name} acc_norm"] = Cell(100 * metric.value, 100 * metric.stderr, known if scheme == "fp32" else None)
    tasks = [row[name] for name in counted]
    stderr = math.sqrt(sum(cell.stderr**2 for cell in tasks)) / len(tasks)
    return row | {"average": Cell(float(np.mean([cell.value for cell in tasks])), stderr, None)}


def paired_difference(row: Mapping[str, Cell], baseline: Mapping[str, Cell]) -> tuple[float, float]:
    """How much the average accuracy of a row of table 1 lies above another's, in points, and its standard error.

    Both rows answered the same documents, so the differences are taken document by document: that error is smaller than
    the error of either average. NaN where a task has one document.
    """
    tasks = [(cell.answers, baseline[name].answers) for name, cell in row.items() if cell.answers]
    pairs = [mean_stderr([a - b for a, b in zip(*answers, strict=True)]) for answers in tasks]
    stderr = math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs)
    return 100 * float(np.mean([mean for mean, _ in pairs])), 100 * stderr


def table_1(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    """Table 1's layout for any model, in Markdown; lines of the paper only where its figures are known."""
    names = list(next(iter(rows.values())))
    lines = ["| scheme | | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for scheme, row in rows.items():
        ours = " | ".join(f"{row[name].value:.2f} ± {row[name].stderr:.2f}" for name in names)
        lines.append(f"| {scheme} | ours | {ours} |")
        if any(cell.paper is not None for cell in row.values()):
            paper = " | ".join("" if row[name].paper is None else f"{row[name].paper:.2f}" for name in names)
            difference = " | ".join(
                "" if row[name].paper is None else f"{row[name].difference:+.2f} ± {row[name].stderr:.2f}" for name in names
            )
            lines += [f"| | paper | {paper} |", f"| | difference | {difference} |"]
    return "\n".join(lines)


def text_table(rows: Mapping[str, TextRow]) -> str:
    """Bits per byte, divergence and bytes of each scheme, in Markdown."""
    first = next(iter(rows))
    lines = [f"| scheme | bits per byte | over {first} | KL to fp32 | weights, MB |", "|---|---:|---:|---:|---:|"]
    for scheme, row in rows.items():
        over = row.bits_per_byte - rows[first].bits_per_byte
        lines.append(
            f"| {scheme} | {row.bits_per_byte:.4f} | {over:+.4f} | {row.divergence:.5f} | {row.weight_bytes / 1e6:.2f} |"
        )
    return "\n".join(lines)


def planted_table(planted: Mapping[str, Mapping[str, TextRow]]) -> str:
    """A row a scheme, a column for each planted channel: bits per byte over the first row's, and the divergence."""
    first, *schemes = next(iter(planted.values()))
    lines = ["| scheme | " + " | ".join(planted) + " |", "|---|" + "---:|" * len(planted)]
    lines.append(f"| {first} | " + " | ".join(f"{rows[first].bits_per_byte:.4f}" for rows in planted.values()) + " |")
    for scheme in schemes:
        over = (
            f"{rows[scheme].bits_per_byte - rows[first].bits_per_byte:+.4f}, {rows[scheme].divergence:.4f}"
            for rows in planted.values()
        )
        lines.append(f"| {scheme} | " + " | ".join(over) + " |")
    return "\n".join(lines)


def beside_successors(model: str, rows: Mapping[str, Mapping[str, Cell]]) -> str:
    """Ours beside the published figures of later papers, in Markdown; empty where there are none of the model."""

    def line(title: str, source: str, values: Sequence[float | None]) -> str:
        return "| " + " | ".join([title, source, *("" if value is None else f"{value:.2f}" for value in values)]) + " |"

    published = successors(paper_size(model))
    if not published:
        return ""
    names = ["lambada", "hellaswag acc_norm", "piqa", "arc_easy", "arc_challenge acc_norm", "winogrande"]
    head = ["scheme", "from", *names, "average of six", "without lambada"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [line(*row) for row in published]
    for scheme, row in rows.items():
        known = [row[name].value if name in row else None for name in names]
        averages = [None if None in part else math.fsum(filter(None, part)) / len(part) for part in (known, known[1:])]
        lines.append(line(scheme, "ours", [*known, *averages]))
    return "\n".join(lines)


def guessing(datasets: Sequence[Dataset]) -> float:
    """The average accuracy that guessing gives, per cent; a task without choices, LAMBADA, counts as 0."""
    shares = [0 if len(data.documents[0].continuations) == 1 else 1 / len(data.documents[0].continuations) for data in datasets]
    return 100 * float(np.mean(shares))


def figure_1_name(model: str) -> str:
    """The name of a model's figure 1, without its suffix."""
    return "figure1-" + model.strip("/").replace("/", "--")


@dataclass(frozen=True)
class ModelTables:
    """What one model's evaluation gave. table_1, text: by scheme, the baseline first. planted: text of each planted channel."""

    model: str
    parameters: int
    table_1: Mapping[str, Mapping[str, Cell]]
    text: Mapping[str, TextRow]
    table_2: Sequence[ablate.Row]
    outliers: Report
    planted: Mapping[str, Mapping[str, TextRow]]

    @property
    def file_name(self) -> str:
        """The name of figure 1's file, without its suffix."""
        return figure_1_name(self.model)

    @property
    def loss(self) -> Cell | None:
        """What the average accuracy loses without the outliers of all sites; None where no channel is an outlier."""
        lost = [row.loss for row in self.table_2 if (row.site, row.which) == ("all", "outliers")]
        if not lost or lost[0] is None:
            return None
        value, stderr = lost[0]
        return Cell(100 * value, math.nan if stderr is None else 100 * stderr, TABLE_2.get(paper_size(self.model) or ""))

    def markdown(self) -> str:
        """The tables, figure 1 and the list of outliers as one chapter in Markdown."""
        loss = "No channel is an outlier."
        if cell := self.loss:
            loss = f"Average lost without the outliers of all sites: ours {cell.value:.2f} ± {cell.stderr:.2f} points"
            if cell.paper is not None:
                loss += f", the paper's {cell.paper:.2f}, difference {cell.difference:+.2f} ± {cell.stderr:.2f}"
        later = beside_successors(self.model, self.table_1)
        planted = [
            "### Planted outliers", f"Channel {CHANNEL} of every layer's in_proj or out_proj made that much larger: bits per "
            "byte over fp32's on the same model, and the KL divergence.", planted_table(self.planted),
        ] if self.planted else []  # fmt: skip
        return "\n\n".join([
            f"## {self.model}", "### Tables 1 and 3", "Per cent, ± our standard error; the paper's lines where they are known.",
            table_1(self.table_1),
            *(["### Beside later papers", "Per cent.", later] if later else []),
            "### The text", "KL: the mean over tokens of the divergence from fp32, in nats. Weights: what a token reads.",
            text_table(self.text),
            *planted,
            "### Table 2", "Without the outlier channels, and without as many random ones; the average's difference with its "
            "standard error, the same documents being scored.", ablate.table(self.table_2), loss,
            "### Figure 1", f"![Figure 1]({self.file_name}.png)", f"```\n{self.outliers.table()}\n```",
        ])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The tables and the outliers for programs; the paper's figures are null where they are unknown."""
        rows = {scheme: {name: cell.to_json() for name, cell in row.items()} for scheme, row in self.table_1.items()}
        return {"parameters": self.parameters, "table_1": rows, "text": _text(self.text),
                "planted": {where: _text(under) for where, under in self.planted.items()},
                "table_2": [asdict(row) for row in self.table_2], "table_2_loss": self.loss and self.loss.to_json(),
                "outliers": self.outliers.to_json()}  # fmt: skip


def _text(rows: Mapping[str, TextRow]) -> dict[str, dict[str, float]]:
    return {scheme: asdict(row) for scheme, row in rows.items()}
