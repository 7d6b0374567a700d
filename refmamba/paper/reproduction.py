"""The tables and figures of Mamba-PTQ (arXiv 2407.12397) from one command, ours beside the published figures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refmamba.errors import DataError
from refmamba.eval_tasks.evaluate import Scorer, evaluate, finished_results, session_of, subject
from refmamba.eval_tasks.load import Dataset
from refmamba.eval_tasks.progress import progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.formats.writing import check_file, json_text, reason, write_text
from refmamba.paper import ablation as ablate
from refmamba.paper.estimate import parameters
from refmamba.paper.outliers import report_on
from refmamba.paper.plots import check_plot, figure_2, plot
from refmamba.paper.published import PAPER_SCHEMES
from refmamba.paper.tables import ModelTables, cells, figure_1_name, guessing
from refmamba.run.perplexity import text_perplexity
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec import SPEC_VERSION
from refmamba.spec.scheme import LINEAR_LAYERS

SCHEMES = (*PAPER_SCHEMES, "int8", "int8-static", "int8-smooth")
SITES = (*LINEAR_LAYERS, "all")


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


def evaluate_model(choice: ModelChoice, run: Settings) -> ModelTables:
    """Every scheme on every task; the ablations and the outliers under fp32. choice: names no scheme. Raises RefmambaError."""
    config = open_model(choice).float_checkpoint().config
    rows, bits = {}, {}
    counts = [len(data.documents[: run.limit]) for data in run.datasets]
    for scheme in run.schemes:
        who = subject(replace(choice, scheme=scheme), MAX_LENGTH)
        with progress(sum(counts)) as bars:
            for data in run.datasets:
                evaluate(who, data, run.limit, run.store, run.scorer, bars)
        counted = zip(run.datasets, counts, strict=True)
        outcomes = [Outcome(who, data, n, finished_results(run.store, who.key(data), data)) for data, n in counted]
        rows[scheme] = cells(choice.model, scheme, outcomes)
        bits[scheme] = text_perplexity(session_of(who.job), run.text).bits_per_byte
    who = subject(replace(choice, scheme="fp32"), MAX_LENGTH)
    report = report_on(session_of(who.job), run.text)
    ablation = ablate.Ablation(who, run.text, run.datasets, run.limit, run.store, run.scorer)
    ablated = list(ablate.ablate(ablation, report, run.sites, run.draws, seed=0))
    return ModelTables(choice.model, parameters(config), rows, bits, ablated, report)


def check_outputs(folder: Path, models: Sequence[str]) -> None:
    """Make the folder. Raises DataError where what `write_all` writes could not be written: before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {reason(error)}") from error
    figures = [f"{name}.{suffix}" for name in ("figure2", *map(figure_1_name, models)) for suffix in ("png", "svg")]
    for name in figures:
        check_plot(folder / name)
    for name in ("results.sqlite", "tables.md", "tables.json", *figures):
        check_file(folder / name)


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
    write_text(folder / "tables.json", json_text(values, indent=1) + "\n")
