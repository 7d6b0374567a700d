"""Results for people and programs: a Markdown table, the harness's JSON layout, and one line a document."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refmamba import __version__
from refmamba.eval_tasks.evaluate import Subject
from refmamba.eval_tasks.load import SAMPLE, Dataset
from refmamba.eval_tasks.metrics import HIGHER_IS_BETTER, PER_DOCUMENT, Metric, metrics
from refmamba.eval_tasks.results import Result
from refmamba.spec import SPEC_VERSION

COLUMNS = ("Scheme", "Task", "Version", "Documents", "Metric", "Value", "Stderr")
WHOLE_SEQUENCE = (
    "takes scales from the whole sequence: each context + continuation was one call, as in the paper's set-up, "
    "and the continuation's own tokens are part of the scales"
)


@dataclass(frozen=True)
class Outcome:
    """A task under a scheme, as far as it is finished. wanted: documents asked for."""

    subject: Subject
    data: Dataset
    wanted: int
    results: dict[int, Result]

    @property
    def finished(self) -> list[Result]:
        """Those that are there, of those asked for, in order."""
        return [self.results[i] for i in range(self.wanted) if i in self.results]

    def metrics(self) -> list[Metric]:
        """None where nothing is finished."""
        finished = self.finished
        return metrics(self.data.task, [self.data.documents[r.doc_id] for r in finished], finished) if finished else []


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table that is aligned on a terminal too."""
    rows = [COLUMNS]
    for one in outcomes:
        count = f"{len(one.finished)}" + (f" of {one.wanted}" if len(one.finished) < one.wanted else "")
        task = one.data.task
        name = f"{task.name} ({SAMPLE})" if one.data.source == SAMPLE else task.name
        if not one.finished:
            rows.append((one.subject.scheme.name, name, str(task.version), count, "", "", ""))
        for metric in one.metrics():
            stderr = f"{metric.stderr:.4f}" if math.isfinite(metric.stderr) else ""
            rows.append((one.subject.scheme.name, name, str(task.version), count, metric.name, f"{metric.value:.4f}", stderr))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def text(outcomes: Sequence[Outcome]) -> str:
    """The table, and under it everything that its numbers depend on."""
    subjects = list({id(one.subject): one.subject for one in outcomes}.values())
    first = subjects[0]
    lines = [table(outcomes), ""]
    lines.append(f"model {first.choice.model}, SHA-256 {first.model_sha256[:16]}; specification {SPEC_VERSION}")
    exact = "exact" if first.backend.exact else "not exact"
    lines.append(f"backend {first.backend.name} ({exact}) on {first.backend.device}; max_length {first.max_length}")
    for data in {one.data.task.name: one.data for one in outcomes}.values():
        note = f": {data.note}" if data.note else ""
        lines.append(f"data of {data.task.name}: {data.source}, SHA-256 {data.sha256[:16]}{note}")
    for one in subjects:
        lines.append(one.scheme.table() + (f"\n  calibration SHA-256 {one.calibration[:16]}" if one.calibration else ""))
        lines += [f"  {WHOLE_SEQUENCE}"] if one.scheme.whole_sequence else []
    return "\n".join(lines)


def harness(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One scheme's outcomes in the layout of lm-evaluation-harness's results; what is no number is "N/A"."""
    results: dict[str, dict[str, Any]] = {}
    for one in outcomes:
        entry: dict[str, Any] = {"alias": one.data.task.name, "sample_len": len(one.finished)}
        for metric in one.metrics():
            entry[f"{metric.name},none"] = metric.value if math.isfinite(metric.value) else "N/A"
            entry[f"{metric.name}_stderr,none"] = metric.stderr if math.isfinite(metric.stderr) else "N/A"
        results[one.data.task.name] = entry
    tasks = {one.data.task.name: one for one in outcomes}
    return {
        "results": results,
        "versions": {name: one.data.task.version for name, one in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {name: {m: HIGHER_IS_BETTER[m] for m in one.data.task.metrics} for name, one in tasks.items()},
        "n-samples": {
            name: {"original": len(one.data.documents), "effective": len(one.finished)} for name, one in tasks.items()
        },
        "config": {
            **outcomes[0].subject.describe(), "refmamba_version": __version__,
            "documents_asked_for": {name: one.wanted for name, one in tasks.items()},
            "whole_sequence": WHOLE_SEQUENCE if outcomes[0].subject.scheme.whole_sequence else None,
            "data": {name: {"sha256": one.data.sha256, "source": one.data.source, "note": one.data.note}
                     for name, one in tasks.items()},
        },
    }  # fmt: skip


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One scheme: the harness's layout; several: {"schemes": {name: that}}."""
    schemes: dict[str, list[Outcome]] = {}
    for one in outcomes:
        schemes.setdefault(one.subject.scheme.name, []).append(one)
    every = {name: harness(some) for name, some in schemes.items()}
    return next(iter(every.values())) if len(every) == 1 else {"schemes": every}


def samples(outcomes: Sequence[Outcome]) -> str:
    """JSON lines, one a finished document: contexts[i] + continuations[i] is what loglikelihoods[i] belongs to."""
    lines = []
    for one in outcomes:
        for result in one.finished:
            document = one.data.documents[result.doc_id]
            sample = {
                "task": one.data.task.name, "doc_id": result.doc_id, "scheme": one.subject.scheme.name,
                "contexts": document.contexts, "continuations": document.continuations, "gold": document.gold,
                "loglikelihoods": [s.loglikelihood for s in result.scores], "greedy": [s.greedy for s in result.scores],
            } | {m: PER_DOCUMENT[m](document, result) for m in one.data.task.metrics if m in PER_DOCUMENT}  # fmt: skip
            names = one.subject.describe() | {"data_sha256": one.data.sha256, "data_note": one.data.note}
            lines.append(json.dumps(sample | names, ensure_ascii=False) + "\n")
    return "".join(lines)
