"""The tables and figures of Mamba-PTQ (arXiv 2407.12397) from one command, ours beside the published figures."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba import SPEC_VERSION, ablate
from refmamba.backend import DEFAULT_BACKEND
from refmamba.calibrate import passage, read_text
from refmamba.checkpoint import open_checkpoint
from refmamba.config import MambaConfig
from refmamba.errors import DataError
from refmamba.eval_tasks.cluster import cluster
from refmamba.eval_tasks.evaluate import Scorer, evaluate, score_here, subject
from refmamba.eval_tasks.load import Dataset, load_tasks
from refmamba.eval_tasks.progress import progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.files import write_file, write_text
from refmamba.hub import resolve_model
from refmamba.load import ModelChoice, load
from refmamba.model import QuantizedModel
from refmamba.outliers import SIGMA, Report, observe, plot
from refmamba.perplexity import perplexity
from refmamba.scheme import LINEAR_LAYERS, parse_scheme

PAPER_MODELS = ("130m", "370m", "790m", "1.4b", "2.8b")
PAPER_SIZES = dict(zip(PAPER_MODELS, ((768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64)), strict=True))
PAPER_SCHEMES = ("fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w8a8-mlp", "w8a8-all")
SCHEMES = (*PAPER_SCHEMES, "int8", "int8-static", "int8-smooth")
TASKS = ("lambada", "hellaswag", "piqa", "winogrande", "rte", "copa")
# Table 1, 1.4b, per cent, in the order of TASKS. HellaSwag is acc_norm in the first row and acc in the others.
TABLE_1 = {
    "fp32": (64.95, 59.11, 74.16, 61.4, 48.01, 79), "w8-mlp": (64.43, 44.91, 74.32, 60.06, 48.01, 77),
    "w8-all": (63.01, 44.71, 73.07, 60.06, 51.62, 76), "w4-mlp": (0.02, 25.70, 52.29, 51.54, 52.35, 56),
    "w4-all": (0.00, 25.72, 52.39, 50.99, 55.23, 64), "w8a8-mlp": (63.11, 44.42, 73.01, 60.06, 51.62, 76),
    "w8a8-all": (55.35, 43.84, 70.24, 54.3, 52.71, 75),
}  # fmt: skip
TABLE_2 = {"130m": 12.61, "2.8b": 17.49}  # points of average accuracy lost without the outliers at every site
CHARACTERS_A_TOKEN = 4.0  # of English text under GPT-NeoX's tokenizer, for the estimate only


def paper_size(model: str) -> str | None:
    """Which of the paper's models a name means: `state-spaces/mamba-1.4b-hf` is 1.4b."""
    found = re.search(rf"mamba-({'|'.join(map(re.escape, PAPER_MODELS))})(-hf)?/?$", model)
    return found[1] if found else None


def parameters(config: MambaConfig) -> int:
    """How many numbers the checkpoint holds."""
    return sum(math.prod(shape) for shape in config.shapes().values())


def config_of(model: str) -> MambaConfig:
    """A model's sizes: the paper's from its name, without a download; else from its files. Raises RefmambaError."""
    if size := paper_size(model):
        d_model, n_layer = PAPER_SIZES[size]
        return MambaConfig(d_model, n_layer, vocab_size=50280)
    return open_checkpoint(resolve_model(model).folder).config


def characters(datasets: Sequence[Dataset], limit: int | None, scheme: str) -> int:
    """Characters that are run: a context once for all its choices, or once a choice where states cannot be forked."""
    whole, total = parse_scheme(scheme).whole_sequence, 0
    for data in datasets:
        for document in data.documents[:limit]:
            contexts = document.contexts if whole else set(document.contexts)
            total += sum(map(len, contexts)) + sum(map(len, document.continuations))
    return total


def plan(models: Sequence[str], schemes: Sequence[str], datasets: Sequence[Dataset], limit: int | None, backend: str,
         device: str | None) -> str:  # fmt: skip
    """Size, memory and time of each model, as a table; the speed is measured on the small model, here and now."""
    loaded = load(ModelChoice("small", "fp32", backend, device))
    tokens = np.arange(512) % loaded.tokenizer.n_ids
    loaded.runner.prefill([tokens])  # warm
    start = time.perf_counter()
    loaded.runner.prefill([tokens])
    rate = parameters(loaded.runner.config) * len(tokens) / (time.perf_counter() - start)
    documents = sum(len(data.documents[:limit]) for data in datasets)
    lines = ["| model | parameters | download at most | memory | documents x schemes | hours |", "|---|---|---|---|---|---|"]
    for model in models:
        count = parameters(config_of(model))
        download = f"{4 * count / 1e9:.2f} GB" if "/" in model and not Path(model).is_dir() else "none"
        run = sum(characters(datasets, limit, scheme) for scheme in schemes) / CHARACTERS_A_TOKEN
        lines.append(f"| {model} | {count / 1e6:.0f} M | {download} | {4 * count / 1e9 + 0.5:.1f} GB | "
                     f"{documents} x {len(schemes)} | {run * count / rate / 3600:.2f} |")  # fmt: skip
    lines += [
        "",
        f"hours: characters / {CHARACTERS_A_TOKEN:g} tokens x parameters / {rate:.2e} a second, the small model's rate",
        "here, in one process; the ablations, about 10 evaluations more, come on top. memory: float32 weights and 0.5 GB",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Cell:
    """One figure, per cent: ours with its standard error (NaN for one document), the paper's where it is known."""

    value: float
    stderr: float
    paper: float | None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None else self.value - self.paper

    def to_json(self) -> dict[str, float | None]:
        """The four figures, null for one that is not known."""
        stderr = None if math.isnan(self.stderr) else self.stderr
        return {"value": self.value, "stderr": stderr, "paper": self.paper, "difference": self.difference}


def cells(model: str, scheme: str, outcomes: Sequence[Outcome]) -> dict[str, Cell]:
    """A row of table 1: a task's acc, and HellaSwag's acc_norm beside it; then the average of acc."""
    published = TABLE_1.get(scheme) if paper_size(model) == "1.4b" else None
    row: dict[str, Cell] = {}
    for one in outcomes:
        name = one.data.task.name
        known = published[TASKS.index(name)] if published else None
        for metric in one.metrics():
            if metric.name == "acc":
                paper = None if (name, scheme) == ("hellaswag", "fp32") else known
                row[name] = Cell(100 * metric.value, 100 * metric.stderr, paper)
            elif (metric.name, name) == ("acc_norm", "hellaswag"):
                row["hellaswag acc_norm"] = Cell(100 * metric.value, 100 * metric.stderr, known if scheme == "fp32" else None)
    tasks = [row[one.data.task.name] for one in outcomes]
    stderr = math.sqrt(sum(cell.stderr**2 for cell in tasks)) / len(tasks)
    return row | {"average": Cell(float(np.mean([cell.value for cell in tasks])), stderr, None)}


def table_1(rows: Mapping[str, Mapping[str, Cell]], bits: Mapping[str, float]) -> str:
    """Table 1's layout for any model; lines of the paper only where it is known."""
    names = list(next(iter(rows.values())))
    lines = ["| scheme | | " + " | ".join(names) + " | bits per byte |", "|---|---|" + "---|" * (len(names) + 1)]
    for scheme, row in rows.items():
        ours = " | ".join(f"{row[name].value:.2f} ± {row[name].stderr:.2f}" for name in names)
        lines.append(f"| {scheme} | ours | {ours} | {bits[scheme]:.4f} |")
        if any(cell.paper is not None for cell in row.values()):
            paper = " | ".join("" if row[name].paper is None else f"{row[name].paper:.2f}" for name in names)
            difference = " | ".join("" if row[name].paper is None else f"{row[name].difference:+.2f}" for name in names)
            lines += [f"| | paper | {paper} | |", f"| | difference | {difference} | |"]
    return "\n".join(lines)


def figure_2(averages: Mapping[str, Mapping[int, float]], file: Path) -> None:
    """Average accuracy over parameters, a line a scheme: {scheme: {parameters: per cent}}. Raises DataError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("a plot needs matplotlib; install it with: pip install 'refmamba[plot]'") from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for scheme, points in averages.items():
        sizes = sorted(points)
        axes.plot(sizes, [points[size] for size in sizes], "o-", label=scheme)
    axes.set(xlabel="parameters", ylabel="average accuracy, per cent", xscale="log")
    axes.legend()
    write_file(file, lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=150))


@dataclass(frozen=True)
class Settings:
    """What every model of a run shares."""

    folder: Path
    schemes: Sequence[str]
    datasets: Sequence[Dataset]
    limit: int | None
    text: str
    draws: int
    store: Results
    scorer: Scorer


@dataclass(frozen=True)
class ModelTables:
    """What was found for one model. table_1, bits_per_byte: by scheme."""

    model: str
    parameters: int
    table_1: Mapping[str, Mapping[str, Cell]]
    bits_per_byte: Mapping[str, float]
    table_2: Sequence[ablate.Row]
    outliers: Report

    @property
    def file_name(self) -> str:
        """Of figure 1, less its suffix."""
        return "figure1-" + self.model.strip("/").replace("/", "--")

    def markdown(self) -> str:
        """The tables."""
        loss = TABLE_2.get(paper_size(self.model) or "")
        average = f"The paper's average loss at all sites: {loss} points. " if loss else ""
        return "\n\n".join([
            f"## {self.model}", "Table 1's layout, per cent, ± our standard error; the paper's lines where they are known.",
            table_1(self.table_1, self.bits_per_byte),
            f"Table 2: without the outlier channels, and without as many random ones. {average}", ablate.table(self.table_2),
            f"Figure 1: {self.file_name}.png", f"```\n{self.outliers.table()}\n```",
        ])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The same, and the paper's figures, null where they are unknown."""
        rows = {scheme: {name: cell.to_json() for name, cell in row.items()} for scheme, row in self.table_1.items()}
        return {"parameters": self.parameters, "table_1": rows, "bits_per_byte": self.bits_per_byte,
                "table_2": [asdict(row) for row in self.table_2], "outliers": self.outliers.to_json(),
                "table_2_paper_average_loss": TABLE_2.get(paper_size(self.model) or "")}  # fmt: skip


def evaluate_model(choice: ModelChoice, run: Settings) -> ModelTables:
    """Every scheme on every task, the ablations and the outliers. Raises RefmambaError."""
    rows, bits = {}, {}
    counts = [len(data.documents[: run.limit]) for data in run.datasets]
    for scheme in run.schemes:
        who = subject(replace(choice, scheme=scheme), MAX_LENGTH)
        with progress(sum(counts)) as bars:
            for data in run.datasets:
                evaluate(who, data, run.limit, run.store, run.scorer, bars)
        outcomes = [Outcome(who, d, n, run.store.load(who.key(d))) for d, n in zip(run.datasets, counts, strict=True)]
        rows[scheme] = cells(choice.model, scheme, outcomes)
        loaded = load(who.choice)
        tokens = np.concatenate([loaded.tokenizer.encode_array(""), loaded.tokenizer.encode_array(run.text)])
        bits[scheme] = perplexity(loaded.runner, tokens, len(run.text.encode())).bits_per_byte
    loaded = load(choice)
    source = open_checkpoint(loaded.files.folder)
    if isinstance(source, QuantizedModel):
        raise DataError(f"{choice.model}: is saved quantized; the tables need the float checkpoint")
    report = Report(observe(loaded.runner, loaded.tokenizer.encode_array(run.text)), SIGMA, "channels")
    who = subject(choice, MAX_LENGTH)
    scorer = ablate.Scorer(loaded, source, who, run.text, run.datasets, run.limit, run.store)
    ablated = list(ablate.ablate(scorer, report, (*LINEAR_LAYERS, "all"), run.draws, seed=0))
    return ModelTables(choice.model, parameters(source.config), rows, bits, ablated, report)


@click.command("reproduce")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--models", default="small", show_default=True, help="With commas: small, folders, OWNER/NAME on the hub.")
@click.option("--schemes", default=",".join(SCHEMES), show_default=True, help="With commas.")
@click.option("--tasks", default="", help="With commas.  [default: all that have data]")
@click.option("--data", multiple=True, help="As in `refmamba eval`: `sample` (default), `hub`, a folder, TASK=FILE.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each task.")
@click.option("--text", "file", type=click.Path(path_type=Path), help="For outliers and bits per byte.  [default: the passage]")
@click.option("--draws", default=1, show_default=True, type=click.IntRange(0), help="Random controls of each ablation.")
@click.option("--workers", type=click.IntRange(1), help="Score the schemes in N processes (extra `cluster`).")
@click.option("--backend", default=DEFAULT_BACKEND, show_default=True, help="reference, cpu, torch, or module:Class.")
@click.option("--device", help="cpu, cuda, cuda:1: where the backend offers it.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and how long it may take.")
def command(
    folder: Path, models: str, schemes: str, tasks: str, data: tuple[str, ...], limit: int | None, file: Path | None,
    draws: int, workers: int | None, backend: str, device: str | None, dry_run: bool,
) -> None:  # fmt: skip
    """Make the paper's tables and figures in FOLDER. A second run goes on where the first one stopped."""
    names, wanted = list(dict.fromkeys(models.split(","))), list(dict.fromkeys(schemes.split(",")))
    datasets = load_tasks([name for name in tasks.split(",") if name], data)
    text = passage() if file is None else read_text(file)
    click.echo(plan(names, wanted, datasets, limit, backend, device))
    if dry_run:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        store = stack.enter_context(Results(folder / "results.sqlite"))
        scorer = stack.enter_context(cluster(workers, None)) if workers else score_here
        run = Settings(folder, wanted, datasets, limit, text, draws, store, scorer)
        found = [evaluate_model(ModelChoice(model, "fp32", backend, device), run) for model in names]
    for suffix in ("png", "svg"):
        for one in found:
            plot(one.outliers, one.model, folder / f"{one.file_name}.{suffix}")
        figure_2({scheme: {one.parameters: one.table_1[scheme]["average"].value for one in found} for scheme in wanted},
                 folder / f"figure2.{suffix}")  # fmt: skip
    title = f"# Mamba-PTQ, reproduced (specification {SPEC_VERSION}, backend {backend})"
    sources = [f"{data.task.name}: {len(data.documents[:limit])} documents. {data.note}" for data in datasets]
    parts = [title, *sources, *(one.markdown() for one in found), "Figure 2, average accuracy over model size: figure2.png"]
    write_text(folder / "tables.md", "\n\n".join(parts) + "\n")
    values = {"specification": SPEC_VERSION, "backend": backend, "models": {one.model: one.to_json() for one in found}}
    write_text(folder / "tables.json", json.dumps(values, indent=1) + "\n")
    click.echo(f"{folder}: tables.md, tables.json, figures 1 and 2")
