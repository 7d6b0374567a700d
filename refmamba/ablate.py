"""What the outlier channels carry (Mamba-PTQ, table 2): zero them, and as many random channels, and score both.

An input channel of a linear layer is zeroed by zeroing its column of the weight, which gives the same product. The scale
of the activation, where the scheme takes one, still sees the channel: so the baseline is fp32, as in the paper.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from refmamba.arith import F32Array, IntArray
from refmamba.backend import load_backend
from refmamba.calibrate import passage, read_text
from refmamba.checkpoint import open_float
from refmamba.config import MambaConfig
from refmamba.errors import DataError
from refmamba.eval_tasks import TASKS
from refmamba.eval_tasks.evaluate import Job, Scorer, Subject, evaluate, loaded, score_here, subject
from refmamba.eval_tasks.load import Dataset, load_tasks
from refmamba.eval_tasks.metrics import acc, mean_stderr
from refmamba.eval_tasks.progress import Progress, progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Key, Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.hub import ModelFiles, resolve_model
from refmamba.load import DEFAULT_SCHEME, Loaded, ModelChoice, calibration_for, choose_scheme
from refmamba.model import ParameterSource, quantize_model
from refmamba.options import MODEL_OPTIONS
from refmamba.outliers import SIGMA, Over, Report, report_on
from refmamba.perplexity import text_perplexity
from refmamba.scheme import LINEAR_LAYERS, parse_scheme
from refmamba.tokenizer import load_tokenizer

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
    for site, found in outliers.items():
        others = np.setdiff1d(np.arange(len(report.sites[site].maxima)), found)
        if len(others) < len(found):
            raise DataError(f"{site}: more than half of the channels are outliers; give a larger --sigma")
        drawn[site] = np.sort(rng.choice(others, len(found), replace=False))
    return drawn


def float_checkpoint(choice: ModelChoice) -> tuple[ModelFiles, ParameterSource]:
    """A model's files, opened. Raises RefmambaError, so DataError where it was saved quantized."""
    files = resolve_model(choice.model, choice.revision)
    return files, open_float(files.folder, f"{choice.model}: is saved quantized; this needs the float checkpoint")


@dataclass(frozen=True)
class AblatedJob(Job):
    """A job whose model lacks some channels. zeroed: (site, its channels) for each site."""

    zeroed: Zeroed = ()

    def load(self) -> Loaded:
        """Make the model ready to run, its columns zeroed. Raises RefmambaError."""
        choice, (files, opened) = self.choice, float_checkpoint(self.choice)
        source = Ablated(opened, {site: np.array(channels) for site, channels in self.zeroed})
        scheme = parse_scheme(choice.scheme or DEFAULT_SCHEME)
        tokenizer, backend = load_tokenizer(files, opened.config), load_backend(choice.backend, choice.device)
        calibration = calibration_for(source, tokenizer, choice.calibrate) if scheme.needs_calibration else None
        runner = backend.load(quantize_model(source, scheme, calibration))
        return Loaded(choice, files, tokenizer, backend, runner)


@dataclass(frozen=True)
class AblatedSubject(Subject):
    """What is evaluated without some channels; its results have names of their own."""

    zeroed: Zeroed = ()

    @property
    def job(self) -> Job:
        """What scores it."""
        return AblatedJob(self.choice, self.max_length, self.model_sha256, zeroed=self.zeroed)

    def key(self, data: Dataset) -> Key:
        """The name of a task's results."""
        named = json.dumps(dict(self.zeroed), sort_keys=True)
        name = hashlib.sha256(f"{self.model_sha256} without {named}".encode()).hexdigest()
        return replace(super().key(data), model=name)


def without(subject: Subject, channels: Channels) -> Subject:
    """The subject less these channels; itself where there are none."""
    zeroed = tuple((site, tuple(found.tolist())) for site, found in sorted(channels.items()) if len(found))
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
        who, zeroed = without(self.subject, channels), sum(map(len, channels.values()))
        bits = text_perplexity(loaded(who.job), self.text).bits_per_byte
        if not self.datasets:
            return Row(site, which, zeroed, bits, {}, None)
        with progress(sum(self.count(data) for data in self.datasets)) as bars:
            outcomes = [self.task(who, data, bars) for data in self.datasets]
        tasks = {one.data.task.name: {m.name: (m.value, known(m.stderr)) for m in one.metrics()} for one in outcomes}
        lost = [mean_stderr(self.lost(one)) for one in outcomes]
        stderr = math.sqrt(sum(error**2 for _, error in lost)) / len(lost)
        return Row(site, which, zeroed, bits, tasks, (float(np.mean([mean for mean, _ in lost])), known(stderr)))

    def count(self, data: Dataset) -> int:
        """Documents of a task to score."""
        return len(data.documents[: self.limit])

    def task(self, who: Subject, data: Dataset, bars: Progress) -> Outcome:
        """One task; documents that the results file has are not scored again."""
        assert self.store is not None
        evaluate(who, data, self.limit, self.store, self.scorer, bars)
        return Outcome(who, data, self.count(data), self.store.load(who.key(data)))

    def lost(self, one: Outcome) -> list[float]:
        """For each document 1 where only the baseline is right, -1 where only the ablated model is, else 0."""
        assert self.store is not None
        baseline, documents = self.store.load(self.subject.key(one.data)), one.data.documents
        return [acc(documents[r.doc_id], baseline[r.doc_id]) - acc(documents[r.doc_id], r) for r in one.finished]


def known(stderr: float) -> float | None:
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
        cells = [row.site, row.which, str(row.channels), f"{row.bits_per_byte:.4f}"]
        cells += [f"{row.bits_per_byte - rows[0].bits_per_byte:+.4f}" if row.channels else ""]
        cells += [f"{100 * row.tasks[task]['acc'][0]:.2f}" for task in tasks]
        if row.loss is not None:
            loss, stderr = row.loss
            error = "" if stderr is None else f" ± {100 * stderr:.2f}"
            cells += [f"{100 * row.average:.2f}", f"{0 - 100 * loss:+.2f}{error}" if row.channels else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command("ablate")
@click.option("--site", "sites", multiple=True, type=click.Choice([*LINEAR_LAYERS, "all"]),
              help="Where to zero; repeatable.  [default: each, and all]")  # fmt: skip
@click.option("--text", "file", type=click.Path(path_type=Path),
              help="Where the outliers are looked for.  [default: the package's passage]")  # fmt: skip
@click.option("--score", "scored", type=click.Path(path_type=Path), help="The text that is scored.  [default: the same]")
@click.option("--sigma", default=SIGMA, show_default=True, type=click.FloatRange(0), help="As in `refmamba outliers`.")
@click.option("--over", default="channels", show_default=True, type=click.Choice(get_args(Over)), help="As there.")
@click.option("--draws", default=3, show_default=True, type=click.IntRange(0), help="Random controls of each site.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the controls.")
@click.option("--tasks", help=f"Tasks to score: {','.join(TASKS)}, or `all` that have data.")
@click.option("--data", multiple=True, help="As in `refmamba eval`.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each task.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), default="refmamba-results.sqlite",
              show_default=True, help="Keeps the tasks' results; a run goes on where the last one stopped.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(
    sites: tuple[str, ...], file: Path | None, scored: Path | None, sigma: float, over: Over, draws: int, seed: int,
    tasks: str | None, data: tuple[str, ...], limit: int | None, results: Path, as_json: bool, scheme: str | None,
    bits: int | None, act_bits: int | None, **model: Any,
) -> None:  # fmt: skip
    """Zero the outlier channels, and random ones beside them (table 2); fp32 unless a scheme is named."""
    text = passage() if file is None else read_text(file)
    scored_text = text if scored is None else read_text(scored)
    datasets = load_tasks([] if tasks == "all" else tasks.split(","), data) if tasks else []
    choice = ModelChoice(scheme=choose_scheme(scheme, bits, act_bits) or "fp32", **model)
    float_checkpoint(choice)
    who = subject(choice, MAX_LENGTH)
    described = loaded(who.job).describe()
    report = report_on(loaded(who.job), text, sigma, over)
    with Results(results) if datasets else nullcontext() as store:
        ablation = Ablation(who, scored_text, datasets, limit, store, score_here)
        rows = list(ablate(ablation, report, sites or (*LINEAR_LAYERS, "all"), draws, seed))
    if as_json:
        click.echo(json.dumps(described | {"sigma": sigma, "over": over, "rows": [asdict(row) for row in rows]}))
    else:
        click.echo(table(rows))


for _option in reversed(MODEL_OPTIONS):
    command = _option(command)
