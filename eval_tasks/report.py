"""Results for people and programs: a Markdown table, the harness's JSON layout, and a line of JSON for each document."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refmamba import __version__
from refmamba.backend import numerics
from refmamba.eval_tasks.evaluate import Subject
from refmamba.eval_tasks.load import SAMPLE, Dataset
from refmamba.eval_tasks.metrics import HIGHER_IS_BETTER, PER_DOCUMENT, Metric, metrics
from refmamba.eval_tasks.results import Result
from refmamba.formats.writing import json_text
from refmamba.run.perplexity import decimal
from refmamba.spec import SPEC_VERSION

COLUMNS = ("Scheme", "Task", "Version", "Documents", "Metric", "Value", "Stderr")
WHOLE_SEQUENCE = (
    "takes scales from the whole sequence: each context + continuation was one call, as in the paper's set-up, "
    "and the continuation's own tokens are part of the scales"
)


@dataclass(frozen=True)
class Outcome:
    """A task under a scheme, as far as it is finished. requested: how many documents, from the first on, were asked for."""

    subject: Subject
    data: Dataset
    requested: int
    results: dict[int, Result]

    @property
    def finished(self) -> list[Result]:
        """The results of the requested documents that are finished, in order."""
        return [self.results[i] for i in range(self.requested) if i in self.results]

    def metrics(self) -> list[Metric]:
        """The task's metrics over what is finished; an empty list where nothing is."""
        finished = self.finished
        return metrics(self.data.task, [self.data.documents[r.doc_id] for r in finished], finished) if finished else []


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table that is aligned on a terminal too."""
    rows = [COLUMNS]
    for outcome in outcomes:
        count = f"{len(outcome.finished)}" + (f" of {outcome.requested}" if len(outcome.finished) < outcome.requested else "")
        task = outcome.data.task
        name = f"{task.name} ({SAMPLE})" if outcome.data.source == SAMPLE else task.name
        if not outcome.finished:
            rows.append((outcome.subject.scheme.name, name, str(task.version), count, "", "", ""))
        for metric in outcome.metrics():
            stderr = decimal(metric.stderr) if math.isfinite(metric.stderr) else ""
            rows.append(
                (outcome.subject.scheme.name, name, str(task.version), count, metric.name, decimal(metric.value), stderr)
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def text(outcomes: Sequence[Outcome]) -> str:
    """The table, and under it everything that its numbers depend on."""
    subjects = list({id(outcome.subject): outcome.subject for outcome in outcomes}.values())
    first = subjects[0]
    lines = [table(outcomes), ""]
    lines.append(f"model {first.choice.model}, SHA-256 {first.model_sha256[:16]}; specification {SPEC_VERSION}")
    exact = "exact" if first.backend.exact else ", ".join(["not exact", *numerics(first.backend).values()])
    lines += [f"every text has the tokens {first.added_tokens} that the tokenizer adds"] if first.added_tokens else []
    lines.append(f"backend {first.backend.name} ({exact}) on {first.backend.device}; max_length {first.max_length}")
    for data in {outcome.data.task.name: outcome.data for outcome in outcomes}.values():
        note = f": {data.note}" if data.note else ""
        lines.append(f"data of {data.task.name}: {data.source}, SHA-256 {data.sha256[:16]}{note}")
    for subject in subjects:
        lines.append(
            subject.scheme.table() + (f"\n  calibration SHA-256 {subject.calibration[:16]}" if subject.calibration else "")
        )
        lines += [f"  {WHOLE_SEQUENCE}"] if subject.scheme.whole_sequence else []
    return "\n".join(lines)


def harness(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One scheme's outcomes in the layout of lm-evaluation-harness's results, where "N/A" stands for NaN and infinity."""
    results: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        entry: dict[str, Any] = {"alias": outcome.data.task.name, "sample_len": len(outcome.finished)}
        for metric in outcome.metrics():
            entry[f"{metric.name},none"] = metric.value if math.isfinite(metric.value) else "N/A"
            entry[f"{metric.name}_stderr,none"] = metric.stderr if math.isfinite(metric.stderr) else "N/A"
        results[outcome.data.task.name] = entry
    tasks = {outcome.data.task.name: outcome for outcome in outcomes}
    return {
        "results": results,
        "versions": {name: outcome.data.task.version for name, outcome in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {name: {m: HIGHER_IS_BETTER[m] for m in outcome.data.task.metrics}
                             for name, outcome in tasks.items()},
        "n-samples": {name: {"original": len(outcome.data.documents), "effective": len(outcome.finished)}
                      for name, outcome in tasks.items()},
        "config": {
            **outcomes[0].subject.describe(), "refmamba_version": __version__,
            "documents_asked_for": {name: outcome.requested for name, outcome in tasks.items()},
            "whole_sequence": WHOLE_SEQUENCE if outcomes[0].subject.scheme.whole_sequence else None,
            "data": {name: {"sha256": outcome.data.sha256, "source": outcome.data.source, "note": outcome.data.note}
                     for name, outcome in tasks.items()},
        },
    }  # fmt: skip


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One scheme: the harness's layout; several: {"schemes": {name: that}}."""
    schemes: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        schemes.setdefault(outcome.subject.scheme.name, []).append(outcome)
    layouts = {name: harness(under) for name, under in schemes.items()}
    return next(iter(layouts.values())) if len(layouts) == 1 else {"schemes": layouts}


def samples(outcomes: Sequence[Outcome]) -> str:
    """JSON lines, one for each finished document: contexts[i] + continuations[i] is what loglikelihoods[i] belongs to."""
    lines = []
    for outcome in outcomes:
        for result in outcome.finished:
            document = outcome.data.documents[result.doc_id]
            sample = {
                "task": outcome.data.task.name, "doc_id": result.doc_id, "scheme": outcome.subject.scheme.name,
                "contexts": document.contexts, "continuations": document.continuations, "gold": document.gold,
                "loglikelihoods": [s.loglikelihood for s in result.scores], "greedy": [s.greedy for s in result.scores],
            } | {m: PER_DOCUMENT[m](document, result) for m in outcome.data.task.metrics if m in PER_DOCUMENT}  # fmt: skip
            names = outcome.subject.describe() | {"data_sha256": outcome.data.sha256, "data_note": outcome.data.note}
            lines.append(json_text(sample | names) + "\n")
    return "".join(lines)
