"""What the outlier channels carry (Mamba-PTQ, table 2): zero them, and as many random channels, and score both.

An input channel of a linear layer is zeroed by zeroing its column of the weight, which gives the same product. The scale
of the activation, where the scheme takes one, still sees the channel: so the baseline is fp32, as in the paper.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import click
import numpy as np

from refmamba.arith import F32Array, IntArray
from refmamba.backend import Runner
from refmamba.calibrate import passage, read_text
from refmamba.checkpoint import open_checkpoint
from refmamba.config import MambaConfig
from refmamba.errors import DataError
from refmamba.eval_tasks import TASKS
from refmamba.eval_tasks.evaluate import Block, Job, Subject, evaluate, score_documents, subject
from refmamba.eval_tasks.load import Dataset, load_tasks
from refmamba.eval_tasks.progress import Progress, progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Result, Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.load import Loaded, calibration_for
from refmamba.model import ParameterSource, QuantizedModel, quantize_model
from refmamba.options import model_options
from refmamba.outliers import SIGMA, Over, Report, observe
from refmamba.perplexity import perplexity
from refmamba.scheme import LINEAR_LAYERS

Channels = Mapping[str, IntArray]  # site (`layers.{i}.in_proj`) -> its channels


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


@dataclass(frozen=True)
class Row:
    """One ablation. channels: how many were zeroed in all layers; tasks: {task: {metric: [value, standard error]}}."""

    site: str
    which: str
    channels: int
    bits_per_byte: float
    tasks: Mapping[str, Mapping[str, tuple[float, float | None]]]

    @property
    def average(self) -> float:
        """Mean accuracy (acc) of the tasks."""
        return float(np.mean([metrics["acc"][0] for metrics in self.tasks.values()]))


@dataclass(frozen=True)
class Scorer:
    """Scores a model without some channels on a text and on tasks."""

    loaded: Loaded
    source: ParameterSource
    subject: Subject
    text: str
    datasets: Sequence[Dataset]
    limit: int | None
    store: Results | None

    def row(self, site: str, which: str, channels: Channels) -> Row:
        """Zero the channels and score."""
        tokenizer, scheme = self.loaded.tokenizer, self.loaded.runner.scheme
        source, file = Ablated(self.source, channels), self.loaded.choice.calibrate
        calibration = calibration_for(source, tokenizer, file) if scheme.needs_calibration else None
        runner = self.loaded.backend.load(quantize_model(source, scheme, calibration))
        tokens = np.concatenate([tokenizer.encode_array(""), tokenizer.encode_array(self.text)])
        bits = perplexity(runner, tokens, len(self.text.encode())).bits_per_byte
        if not self.datasets:
            return Row(site, which, sum(map(len, channels.values())), bits, {})
        with progress(sum(self.count(data) for data in self.datasets)) as bars:
            tasks = {data.task.name: self.task(runner, channels, data, bars) for data in self.datasets}
        return Row(site, which, sum(map(len, channels.values())), bits, tasks)

    def count(self, data: Dataset) -> int:
        """Documents of a task to score."""
        return min(self.limit or len(data.documents), len(data.documents))

    def task(self, runner: Runner, channels: Channels, data: Dataset, bars: Progress) -> dict[str, tuple[float, float | None]]:
        """One task's metrics; documents that the results file has are not scored again."""
        assert self.store is not None
        named = json.dumps({site: found.tolist() for site, found in channels.items()}, sort_keys=True)
        name = hashlib.sha256(f"{self.subject.model_sha256} without {named}".encode()).hexdigest()
        who = replace(self.subject, model_sha256=name) if channels else self.subject

        loaded = replace(self.loaded, runner=runner)

        def score_here(job: Job, blocks: Sequence[Block]) -> Iterator[list[Result]]:
            return (score_documents(loaded, job.max_length, block) for block in blocks)

        evaluate(who, data, self.limit, self.store, score_here, bars)
        metrics = Outcome(who, data, self.count(data), self.store.load(who.key(data))).metrics()
        return {m.name: (m.value, None if math.isnan(m.stderr) else m.stderr) for m in metrics}


def ablate(scorer: Scorer, report: Report, sites: Sequence[str], draws: int, seed: int) -> Iterator[Row]:
    """The baseline, then for each site (a linear layer, or `all`) the outliers and `draws` random controls."""
    yield scorer.row("none", "baseline", {})
    for site in sites:
        outliers = report.channels if site == "all" else report.of(site)
        if not any(map(len, outliers.values())):
            continue
        yield scorer.row(site, "outliers", outliers)
        for draw in range(draws):
            yield scorer.row(site, f"random {draw + 1}", random_channels(report, outliers, (seed, draw)))


def table(rows: Sequence[Row]) -> str:
    """Markdown: differences from the baseline."""
    tasks = list(rows[0].tasks)
    head = ["zeroed at", "which", "channels", "bits per byte", "difference", *tasks]
    head += ["average", "difference"] if tasks else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.site, row.which, str(row.channels), f"{row.bits_per_byte:.4f}",
                 f"{row.bits_per_byte - rows[0].bits_per_byte:+.4f}"]  # fmt: skip
        cells += [f"{100 * row.tasks[task]['acc'][0]:.2f}" for task in tasks]
        cells += [f"{100 * row.average:.2f}", f"{100 * (row.average - rows[0].average):+.2f}"] if tasks else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command("ablate")
@model_options
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
    choose: Callable[[str], Loaded], sites: tuple[str, ...], file: Path | None, scored: Path | None, sigma: float, over: Over,
    draws: int, seed: int, tasks: str | None, data: tuple[str, ...], limit: int | None, results: Path, as_json: bool,
) -> None:  # fmt: skip
    """Zero the outlier channels, and random ones beside them (table 2); fp32 unless a scheme is named."""
    text = passage() if file is None else read_text(file)
    scored_text = text if scored is None else read_text(scored)
    datasets = load_tasks([] if tasks == "all" else tasks.split(","), data) if tasks else []
    loaded = choose("fp32")
    source = open_checkpoint(loaded.files.folder)
    if isinstance(source, QuantizedModel):
        raise DataError(f"{loaded.choice.model}: is saved quantized; ablation needs the float checkpoint")
    report = Report(observe(loaded.runner, loaded.tokenizer.encode_array(text)), sigma, over)
    who = subject(replace(loaded.choice, scheme=loaded.choice.scheme or "fp32"), MAX_LENGTH)
    with Results(results) if datasets else nullcontext() as store:
        scorer = Scorer(loaded, source, who, scored_text, datasets, limit, store)
        rows = list(ablate(scorer, report, sites or (*LINEAR_LAYERS, "all"), draws, seed))
    if as_json:
        click.echo(json.dumps(loaded.describe() | {"sigma": sigma, "over": over, "rows": [asdict(row) for row in rows]}))
    else:
        click.echo(table(rows))
