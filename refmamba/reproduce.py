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
from refmamba.arith import F32Array
from refmamba.backend import DEFAULT_BACKEND, Backend, load_backend
from refmamba.calibrate import passage, read_text
from refmamba.checkpoint import open_checkpoint
from refmamba.config import MambaConfig
from refmamba.errors import DataError
from refmamba.eval_tasks import TASKS
from refmamba.eval_tasks.cluster import cluster
from refmamba.eval_tasks.evaluate import Scorer, evaluate, loaded, score_here, subject
from refmamba.eval_tasks.load import HUB, Dataset, load_tasks
from refmamba.eval_tasks.progress import progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.files import write_file, write_text
from refmamba.hub import resolve_model
from refmamba.load import ModelChoice
from refmamba.model import Positions, quantize_model
from refmamba.outliers import Report, plot, report_on
from refmamba.perplexity import text_perplexity
from refmamba.scheme import LINEAR_LAYERS, parse_scheme

PAPER_MODELS = ("130m", "370m", "790m", "1.4b", "2.8b")
PAPER_SIZES = dict(zip(PAPER_MODELS, ((768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64)), strict=True))
PAPER_SCHEMES = ("fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w8a8-mlp", "w8a8-all")
SCHEMES = (*PAPER_SCHEMES, "int8", "int8-static", "int8-smooth")
SITES = (*LINEAR_LAYERS, "all")
PAPER_TASKS = ("lambada", "hellaswag", "piqa", "winogrande", "rte", "copa")
# Table 1, 1.4b, per cent, in the order of PAPER_TASKS. HellaSwag is acc_norm in the first row and acc in the others.
TABLE_1 = {
    "fp32": (64.95, 59.11, 74.16, 61.4, 48.01, 79), "w8-mlp": (64.43, 44.91, 74.32, 60.06, 48.01, 77),
    "w8-all": (63.01, 44.71, 73.07, 60.06, 51.62, 76), "w4-mlp": (0.02, 25.70, 52.29, 51.54, 52.35, 56),
    "w4-all": (0.00, 25.72, 52.39, 50.99, 55.23, 64), "w8a8-mlp": (63.11, 44.42, 73.01, 60.06, 51.62, 76),
    "w8a8-all": (55.35, 43.84, 70.24, 54.3, 52.71, 75),
}  # fmt: skip
TABLE_2 = {"130m": 12.61, "2.8b": 17.49}  # points of average accuracy lost without the outliers at every site
# For the estimate only. Characters a document of the published data: contexts, each once; contexts, once a choice;
# continuations. Means of the first 40 to 500 documents of each task.
HUB_CHARACTERS = {
    "lambada": (316.7, 316.7, 6.7), "hellaswag": (134.7, 538.8, 292.5), "piqa": (55.0, 110.0, 204.2),
    "winogrande": (160.4, 160.4, 50.1), "rte": (361.2, 722.4, 11.0), "copa": (41.5, 83.0, 60.9),
}  # fmt: skip
CHARACTERS_A_TOKEN = 4.0  # of English text under GPT-NeoX's tokenizer
BLOCK = MambaConfig(768, 1, vocab_size=4096)  # what is timed: a block of the smallest model's width, and a part of its head
MEMORY, BYTES_A_PARAMETER = 0.8e9, 11  # of a process at its peak: 2.1 GB and 4.7 GB were measured at 130m's and 370m's shape


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


@dataclass(frozen=True)
class Work:
    """What an evaluation runs: documents, and characters of contexts (each once; once a choice) and of continuations."""

    documents: int
    shared: float
    repeated: float
    continuations: float

    def tokens(self, scheme: str) -> tuple[float, float]:
        """Tokens through the blocks and through the head. Where states cannot be forked every context runs once a choice,
        and every token has logits."""
        if parse_scheme(scheme).whole_sequence:
            whole = (self.repeated + self.continuations) / CHARACTERS_A_TOKEN
            return whole, whole
        return (self.shared + self.continuations) / CHARACTERS_A_TOKEN, self.continuations / CHARACTERS_A_TOKEN


def work_of(datasets: Sequence[Dataset], limit: int | None) -> Work:
    """The work of datasets that are there."""
    documents = [document for data in datasets for document in data.documents[:limit]]
    shared = sum(sum(map(len, set(document.contexts))) for document in documents)
    repeated = sum(sum(map(len, document.contexts)) for document in documents)
    return Work(len(documents), shared, repeated, sum(sum(map(len, document.continuations)) for document in documents))


def work_on_hub(tasks: Sequence[str], limit: int | None) -> Work:
    """The work of the published data, without a download."""
    counts = {task: min(limit or TASKS[task].hub.rows, TASKS[task].hub.rows) for task in tasks}
    sums = (sum(n * HUB_CHARACTERS[task][part] for task, n in counts.items()) for part in range(3))
    return Work(sum(counts.values()), *sums)


class _Random:
    """Weights of BLOCK that nobody trained."""

    config = BLOCK
    _rng = np.random.default_rng(0)

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""
        return self._rng.normal(0, 0.02, BLOCK.shapes()[name]).astype(np.float32)


def speed(scheme: str, backend: Backend) -> tuple[float, float]:
    """Parameter-tokens a second of the blocks and of the head, here and now: (both) parameters x tokens / seconds."""
    shapes = BLOCK.shapes()
    ones = {f"layers.0.{layer}": np.ones(shapes[f"layers.0.{layer}.weight"][1], np.float32) for layer in LINEAR_LAYERS}
    calibration = ones | {"lm_head": np.ones(BLOCK.d_model, np.float32)}
    runner = backend.load(quantize_model(_Random(), parse_scheme(scheme), calibration))
    sequences = [np.arange(64)] * (1 if parse_scheme(scheme).whole_sequence else 8)

    def seconds(logits: Positions) -> float:
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            runner.prefill(sequences, logits=logits)[1].arrays()  # the device has finished when the state is here
            best = min(best, time.perf_counter() - start)
        return best

    tokens, blocks = 64 * len(sequences), seconds("none")
    head = max(seconds("all") - blocks, 1e-9)
    of_head = BLOCK.vocab_size * BLOCK.d_model
    return (parameters(BLOCK) - of_head) * tokens / blocks, of_head * tokens / head


def duration(hours: float) -> str:
    """`9.5 h`, `12 min` or `3 s`."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def plan(
    models: Sequence[str], schemes: Sequence[str], work: Work, ablations: int, fetched: bool, backend: Backend
) -> str:  # fmt: skip
    """Size, memory and time of each model, as tables; the speed is measured on one block, here and now."""
    configs, speeds = {model: config_of(model) for model in models}, {s: speed(s, backend) for s in {*schemes, "fp32"}}

    def hours(config: MambaConfig, scheme: str) -> float:
        (run, scored), (blocks, head) = work.tokens(scheme), speeds[scheme]
        of_head = config.vocab_size * config.d_model
        return (run * (parameters(config) - of_head) / blocks + scored * of_head / head) / 3600

    lines = ["| model | parameters | download at most | memory |", "|---|---|---|---|"]
    for model, config in configs.items():
        count = parameters(config)
        download = f"{4 * count / 1e9:.2f} GB" if "/" in model and not Path(model).is_dir() else "none"
        lines.append(f"| {model} | {count / 1e6:.0f} M | {download} | {(BYTES_A_PARAMETER * count + MEMORY) / 1e9:.1f} GB |")
    lines += ["", f"Time for {work.documents} documents:", "", "| scheme | " + " | ".join(models) + " |"]
    lines.append("|---|" + "---|" * len(models))
    rows = {scheme: [hours(config, scheme) for config in configs.values()] for scheme in schemes}
    rows[f"{ablations} ablations, fp32"] = [ablations * hours(config, "fp32") for config in configs.values()]
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(map(duration, row)) + " |")
    data = f"data: about {2e-6 * (work.shared + work.continuations):.0f} MB; " if fetched else ""
    lines += [
        "",
        f"{data}memory: of one process; with --workers N there are N + 1. Time: at {CHARACTERS_A_TOKEN:g} characters a",
        f"token and the speed of a block {BLOCK.d_model} wide on the backend {backend.name} ({backend.device}), measured now.",
        "Loading a model for each row comes on top. Documents that FOLDER has from a run before are not run again.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Cell:
    """One figure, per cent: ours with its standard error (NaN for one document), the paper's where it is known.

    The paper gives no errors, so that of the difference is ours too.
    """

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
        known = published[PAPER_TASKS.index(name)] if published else None
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
            difference = " | ".join(
                "" if row[name].paper is None else f"{row[name].difference:+.2f} ± {row[name].stderr:.2f}" for name in names
            )
            lines += [f"| | paper | {paper} | |", f"| | difference | {difference} | |"]
    return "\n".join(lines)


def guessing(datasets: Sequence[Dataset]) -> float:
    """Average accuracy of one who guesses, per cent: nothing where a task has no choices."""
    shares = [0 if len(data.documents[0].continuations) == 1 else 1 / len(data.documents[0].continuations) for data in datasets]
    return 100 * float(np.mean(shares))


def figure_2(found: Sequence["ModelTables"], guess: float, file: Path) -> None:
    """Average accuracy, and bits per byte, over parameters, a line a scheme. Raises DataError."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError as error:
        raise DataError("a plot needs matplotlib; install it with: pip install 'refmamba[plot]'") from error
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    accuracy, text = figure.subplots(1, 2)
    found, schemes = sorted(found, key=lambda one: one.parameters), list(found[0].table_1)
    for i, scheme in enumerate(schemes):
        # each scheme a little to the right of the last, so that equal figures do not hide each other
        x = [one.parameters * 1.02 ** (i - (len(schemes) - 1) / 2) for one in found]
        style = {"marker": "osD^v"[i % 5], "ms": 5, "lw": 1.2, "ls": "--" if scheme.endswith("-mlp") else "-", "label": scheme}
        averages = [one.table_1[scheme]["average"] for one in found]
        accuracy.errorbar(x, [cell.value for cell in averages], [cell.stderr for cell in averages], capsize=2, **style)
        text.plot(x, [one.bits_per_byte[scheme] for one in found], **style)
    accuracy.axhline(guess, color="0.5", ls=":", label="guessing")
    accuracy.set(title="average accuracy, ± standard error", ylabel="per cent")
    text.set(title="bits per byte of the text (fewer is better)", ylabel="bits per byte")
    sizes = [one.parameters for one in found]
    for axes in (accuracy, text):
        axes.set(xlabel="parameters", xscale="log", xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
        axes.set_xticks(sizes, [f"{size / 1e6:.3g} M" if size < 1e9 else f"{size / 1e9:.2f} B" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", frameon=False)
    write_file(file, lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=110))


@dataclass(frozen=True)
class Settings:
    """What every model of a run shares."""

    schemes: Sequence[str]
    datasets: Sequence[Dataset]
    limit: int | None
    text: str
    sites: Sequence[str]
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

    @property
    def loss(self) -> Cell | None:
        """What the average loses without the outliers of all sites; None where no channel is one."""
        lost = [row.loss for row in self.table_2 if (row.site, row.which) == ("all", "outliers")]
        if not lost or lost[0] is None:
            return None
        value, stderr = lost[0]
        return Cell(100 * value, math.nan if stderr is None else 100 * stderr, TABLE_2.get(paper_size(self.model) or ""))

    def markdown(self) -> str:
        """The tables."""
        loss = "No channel is an outlier."
        if cell := self.loss:
            loss = f"Average lost without the outliers of all sites: ours {cell.value:.2f} ± {cell.stderr:.2f} points"
            if cell.paper is not None:
                loss += f", the paper's {cell.paper:.2f}, difference {cell.difference:+.2f} ± {cell.stderr:.2f}"
        return "\n\n".join([
            f"## {self.model}", "### Tables 1 and 3", "Per cent, ± our standard error; the paper's lines where they are known.",
            table_1(self.table_1, self.bits_per_byte),
            "### Table 2", "Without the outlier channels, and without as many random ones; the average's difference with its "
            "standard error, the same documents being scored.", ablate.table(self.table_2), loss,
            "### Figure 1", f"![Figure 1]({self.file_name}.png)", f"```\n{self.outliers.table()}\n```",
        ])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The same, and the paper's figures, null where they are unknown."""
        rows = {scheme: {name: cell.to_json() for name, cell in row.items()} for scheme, row in self.table_1.items()}
        return {"parameters": self.parameters, "table_1": rows, "bits_per_byte": self.bits_per_byte,
                "table_2": [asdict(row) for row in self.table_2], "table_2_loss": self.loss and self.loss.to_json(),
                "outliers": self.outliers.to_json()}  # fmt: skip


def evaluate_model(choice: ModelChoice, run: Settings) -> ModelTables:
    """Every scheme on every task, the ablations and the outliers. Raises RefmambaError."""
    _, source = ablate.float_checkpoint(choice)
    rows, bits = {}, {}
    counts = [len(data.documents[: run.limit]) for data in run.datasets]
    for scheme in run.schemes:
        who = subject(replace(choice, scheme=scheme), MAX_LENGTH)
        with progress(sum(counts)) as bars:
            for data in run.datasets:
                evaluate(who, data, run.limit, run.store, run.scorer, bars)
        outcomes = [Outcome(who, d, n, run.store.load(who.key(d))) for d, n in zip(run.datasets, counts, strict=True)]
        rows[scheme] = cells(choice.model, scheme, outcomes)
        bits[scheme] = text_perplexity(loaded(who.job), run.text).bits_per_byte
    who = subject(choice, MAX_LENGTH)
    report = report_on(loaded(who.job), run.text)
    ablation = ablate.Ablation(who, run.text, run.datasets, run.limit, run.store, run.scorer)
    ablated = list(ablate.ablate(ablation, report, run.sites, run.draws, seed=0))
    return ModelTables(choice.model, parameters(source.config), rows, bits, ablated, report)


def write_all(folder: Path, found: Sequence[ModelTables], run: Settings, backend: str) -> None:
    """Tables and figures of the models that are done."""
    for suffix in ("png", "svg"):
        plot(found[-1].outliers, f"{found[-1].model}, fp32", folder / f"{found[-1].file_name}.{suffix}")
        figure_2(found, guessing(run.datasets), folder / f"figure2.{suffix}")
    title = f"# Mamba-PTQ, reproduced (specification {SPEC_VERSION}, backend {backend})"
    sources = [f"- {d.task.name}: {len(d.documents[: run.limit])} documents. {d.note or d.source}" for d in run.datasets]
    figure = "## Figure 2\n\n![Figure 2](figure2.png)"
    write_text(folder / "tables.md", "\n\n".join([title, "\n".join(sources), *(m.markdown() for m in found), figure]) + "\n")
    values = {"specification": SPEC_VERSION, "backend": backend, "models": {one.model: one.to_json() for one in found}}
    write_text(folder / "tables.json", json.dumps(values, indent=1) + "\n")


@click.command("reproduce")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--models", default="small", show_default=True, help="With commas: small, folders, OWNER/NAME on the hub.")
@click.option("--schemes", default=",".join(SCHEMES), show_default=True, help="With commas.")
@click.option("--tasks", default="", help="With commas.  [default: all that have data]")
@click.option("--data", multiple=True, help="As in `refmamba eval`: `sample` (default), `hub`, a folder, TASK=FILE.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each task.")
@click.option("--text", "file", type=click.Path(path_type=Path), help="For outliers and bits per byte.  [default: the passage]")
@click.option("--calibrate", type=click.Path(path_type=Path), help="Text or .json for static scales.  [default: the passage]")
@click.option("--sites", default=",".join(SITES), show_default=True, help="Ablations (table 2), with commas; empty: none.")
@click.option("--draws", default=1, show_default=True, type=click.IntRange(0), help="Random controls of each ablation.")
@click.option("--workers", type=click.IntRange(1), help="Score in N processes (extra `cluster`).")
@click.option("--backend", default=DEFAULT_BACKEND, show_default=True, help="reference, cpu, torch, or module:Class.")
@click.option("--device", help="cpu, cuda, cuda:1: where the backend offers it.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and how long it may take.")
def command(
    folder: Path, models: str, schemes: str, tasks: str, data: tuple[str, ...], limit: int | None, file: Path | None,
    calibrate: Path | None, sites: str, draws: int, workers: int | None, backend: str, device: str | None, dry_run: bool,
) -> None:  # fmt: skip
    """Make the paper's tables and figures in FOLDER. A second run goes on where the first one stopped."""
    names, wanted = list(dict.fromkeys(models.split(","))), list(dict.fromkeys(schemes.split(",")))
    chosen, text = [name for name in tasks.split(",") if name], passage() if file is None else read_text(file)
    if fetched := HUB in data:  # the plan comes before any download
        work = work_on_hub(chosen or PAPER_TASKS, limit)
    else:
        work = work_of(load_tasks(chosen, data), limit)
    where = [site for site in sites.split(",") if site]
    if wrong := set(where) - set(SITES):
        raise DataError(f"--sites: no '{min(wrong)}'; there are {', '.join(SITES)}")
    click.echo(plan(names, wanted, work, len(where) * (1 + draws), fetched, load_backend(backend, device)))
    if dry_run:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        datasets = load_tasks(chosen, data)
        store = stack.enter_context(Results(folder / "results.sqlite"))
        scorer = stack.enter_context(cluster(workers, None)) if workers else score_here
        run, found = Settings(wanted, datasets, limit, text, where, draws, store, scorer), list[ModelTables]()
        for model in names:
            found.append(evaluate_model(ModelChoice(model, "fp32", backend, device, None, calibrate), run))
            write_all(folder, found, run, backend)
    click.echo(f"{folder}: tables.md, tables.json, figures 1 and 2")
