"""What the outlier channels carry (Mamba-PTQ, table 2): zero them, and as many random channels, and score both.

An input channel of a linear layer is zeroed by zeroing its column of the weight, which gives the same product. The scale
of the activation, where the scheme takes one, still sees the channel: so the baseline is fp32, as in the paper.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from refmamba.errors import DataError
from refmamba.eval_tasks.evaluate import Job, Scorer, Subject, evaluate, finished_results, session_of
from refmamba.eval_tasks.load import Dataset
from refmamba.eval_tasks.metrics import acc, mean_stderr
from refmamba.eval_tasks.progress import Progress, progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Key, Results
from refmamba.paper.outliers import Report
from refmamba.run.perplexity import decimal, text_perplexity
from refmamba.run.session import Session
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import MambaConfig, ParameterSource

Channels = Mapping[str, IntArray]  # site (`layers.{i}.in_proj`) -> its channels
Zeroed = tuple[tuple[str, tuple[int, ...]], ...]  # the same, hashable


@dataclass(frozen=True)
class Ablated:
    """A checkpoint without some input channels: their columns of the linear layers' weights are zero."""

    source: ParameterSource
    channels: Channels

    @property
    def config(self) -> MambaConfig:
        """The model's sizes."""
        return self.source.config

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""
        x = self.source.read(name)
        site, _, last = name.rpartition(".")
        if last == "weight" and site in self.channels:
            x = x.copy()
            x[:, self.channels[site]] = 0
        return x


def random_channels(report: Report, outliers: Channels, seed: Sequence[int]) -> dict[str, IntArray]:
    """As many channels a site as there are outliers, none of them one. Raises DataError where there are not so many."""
    rng, drawn = np.random.default_rng(seed), {}
    for site, channels in outliers.items():
        candidates = np.setdiff1d(np.arange(len(report.sites[site].maxima)), channels)
        if len(candidates) < len(channels):
            raise DataError(f"{site}: more than half of the channels are outliers; give a larger --sigma")
        drawn[site] = np.sort(rng.choice(candidates, len(channels), replace=False))
    return drawn


@dataclass(frozen=True)
class AblatedJob(Job):
    """A job whose model lacks some channels. zeroed: (site, its channels) for each site."""

    zeroed: Zeroed = ()

    def open(self) -> Session:
        """The model, its columns zeroed. Raises RefmambaError, so DataError where it was saved quantized."""
        session = super().open()
        zeroed = Ablated(session.opened.float_checkpoint(), {site: np.array(channels) for site, channels in self.zeroed})
        return replace(session, opened=replace(session.opened, checkpoint=zeroed))


@dataclass(frozen=True)
class AblatedSubject(Subject):
    """What is evaluated without some channels; its results have names of their own."""

    zeroed: Zeroed = ()

    @property
    def job(self) -> Job:
        """What scores it."""
        job = super().job
        return AblatedJob(job.choice, job.max_length, job.model_sha256, job.numerics, zeroed=self.zeroed)

    def key(self, data: Dataset) -> Key:
        """The name of a task's results."""
        named = json.dumps(dict(self.zeroed), sort_keys=True)
        name = hashlib.sha256(f"{self.model_sha256} without {named}".encode()).hexdigest()
        return replace(super().key(data), model=name)


def without(subject: Subject, channels: Channels) -> Subject:
    """The subject less these channels; itself where there are none."""
    zeroed = tuple((site, tuple(indices.tolist())) for site, indices in sorted(channels.items()) if len(indices))
    values = {field.name: getattr(subject, field.name) for field in fields(subject)}
    return AblatedSubject(**values, zeroed=zeroed) if zeroed else subject


@dataclass(frozen=True)
class Row:
    """One ablation. channels: how many were zeroed in all layers; tasks: {task: {metric: [value, standard error]}}.

    loss: of average accuracy (acc) against the baseline, and its standard error over documents, both having answered the
    same ones; None without tasks. An error is None where a task has one document.
    """

    site: str
    which: str
    channels: int
    bits_per_byte: float
    tasks: Mapping[str, Mapping[str, tuple[float, float | None]]]
    loss: tuple[float, float | None] | None

    @property
    def average(self) -> float:
        """Mean accuracy (acc) of the tasks."""
        return float(np.mean([metrics["acc"][0] for metrics in self.tasks.values()]))


@dataclass(frozen=True)
class Ablation:
    """Scores a model without some channels on a text and on tasks."""

    subject: Subject
    text: str
    datasets: Sequence[Dataset]
    limit: int | None
    store: Results | None
    scorer: Scorer

    def row(self, site: str, which: str, channels: Channels) -> Row:
        """Zero the channels and score."""
        ablated, zeroed = without(self.subject, channels), sum(map(len, channels.values()))
        bits = text_perplexity(session_of(ablated.job), self.text).bits_per_byte
        if not self.datasets:
            return Row(site, which, zeroed, bits, {}, None)
        with progress(sum(self.count(data) for data in self.datasets)) as bars:
            outcomes = [self.task(ablated, data, bars) for data in self.datasets]
        tasks = {
            outcome.data.task.name: {metric.name: (metric.value, finite(metric.stderr)) for metric in outcome.metrics()}
            for outcome in outcomes
        }
        lost = [mean_stderr(self.lost(outcome)) for outcome in outcomes]
        stderr = math.sqrt(sum(error**2 for _, error in lost)) / len(lost)
        return Row(site, which, zeroed, bits, tasks, (float(np.mean([mean for mean, _ in lost])), finite(stderr)))

    def count(self, data: Dataset) -> int:
        """Documents of a task to score."""
        return len(data.documents[: self.limit])

    def task(self, ablated: Subject, data: Dataset, bars: Progress) -> Outcome:
        """One task; documents that the results file has are not scored again."""
        assert self.store is not None
        evaluate(ablated, data, self.limit, self.store, self.scorer, bars)
        return Outcome(ablated, data, self.count(data), finished_results(self.store, ablated.key(data), data))

    def lost(self, ablated: Outcome) -> list[float]:
        """For each document 1 where only the baseline is right, -1 where only the ablated model is, else 0."""
        assert self.store is not None
        data = ablated.data
        baseline, documents = finished_results(self.store, self.subject.key(data), data), data.documents
        return [acc(documents[r.doc_id], baseline[r.doc_id]) - acc(documents[r.doc_id], r) for r in ablated.finished]


def finite(stderr: float) -> float | None:
    """A standard error for JSON: None for NaN."""
    return None if math.isnan(stderr) else stderr


def ablate(ablation: Ablation, report: Report, sites: Sequence[str], draws: int, seed: int) -> Iterator[Row]:
    """The baseline, then for each site (a linear layer, or `all`) the outliers and `draws` random controls."""
    yield ablation.row("none", "baseline", {})
    for site in sites:
        outliers = report.channels if site == "all" else report.of(site)
        if not any(map(len, outliers.values())):
            continue
        yield ablation.row(site, "outliers", outliers)
        for draw in range(draws):
            yield ablation.row(site, f"random {draw + 1}", random_channels(report, outliers, (seed, draw)))


def table(rows: Sequence[Row]) -> str:
    """Markdown: differences from the baseline, that of the average with its standard error."""
    tasks = list(rows[0].tasks)
    head = ["zeroed at", "which", "channels", "bits per byte", "difference", *tasks]
    head += ["average", "difference"] if tasks else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.site, row.which, str(row.channels), decimal(row.bits_per_byte)]
        cells += [f"{row.bits_per_byte - rows[0].bits_per_byte:+.4f}" if row.channels else ""]
        cells += [f"{100 * row.tasks[task]['acc'][0]:.2f}" for task in tasks]
        if row.loss is not None:
            loss, stderr = row.loss
            error = "" if stderr is None else f" ± {100 * stderr:.2f}"
            cells += [f"{100 * row.average:.2f}", f"{0 - 100 * loss:+.2f}{error}" if row.channels else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
