"""The tables and figures of Mamba-PTQ (arXiv 2407.12397) from one command, ours beside the published figures."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from refmamba.errors import DataError
from refmamba.eval_tasks.evaluate import Scorer, calibration_sha256, evaluate, finished_results, session_of, subject
from refmamba.eval_tasks.load import Dataset
from refmamba.eval_tasks.progress import progress
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.formats.reading import reason
from refmamba.formats.writing import check_file, json_text, write_text
from refmamba.paper import ablation as ablate
from refmamba.paper import planted
from refmamba.paper.estimate import parameters
from refmamba.paper.outliers import report_on
from refmamba.paper.plots import check_plot, figure_2, plot
from refmamba.paper.published import PAPER_SCHEMES, PAPER_TASKS
from refmamba.paper.tables import ModelTables, TextRow, cells, figure_1_name, guessing
from refmamba.run.perplexity import kept_baseline, text_perplexity
from refmamba.run.session import ModelChoice, Session, open_model, open_session, quantize_folder
from refmamba.run.timing import weight_bytes
from refmamba.spec import SPEC_VERSION
from refmamba.spec.scheme import LINEAR_LAYERS, NAMED

BASELINE = "fp32"
SCHEMES = (*PAPER_SCHEMES, *(name for name in NAMED if name != BASELINE))
SITES = (*LINEAR_LAYERS, "all")


@dataclass(frozen=True)
class Settings:
    """What every model of a run shares.

    gptq: schemes that have another row, the weights rounded by GPTQ. planted: powers of two of the planted channels.
    """

    folder: Path
    schemes: Sequence[str]
    gptq: Sequence[str]
    planted: Sequence[int]
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
    baseline = subject(replace(choice, scheme=BASELINE), MAX_LENGTH)
    choices = {scheme: replace(choice, scheme=scheme) for scheme in run.schemes}
    choices |= {row_by_gptq(scheme): rounded(replace(choice, scheme=scheme), run.folder) for scheme in run.gptq}
    rows, text = {}, {}
    counts = [len(data.documents[: run.limit]) for data in run.datasets]
    with scored_text(session_of(baseline.job), run) as score_text:
        for name, chosen in choices.items():
            contender = subject(chosen, MAX_LENGTH)
            with progress(sum(counts)) as bars:
                for data in run.datasets:
                    evaluate(contender, data, run.limit, run.store, run.scorer, bars)
            counted = zip(run.datasets, counts, strict=True)
            outcomes = [
                Outcome(contender, data, n, finished_results(run.store, contender.key(data), data)) for data, n in counted
            ]
            rows[name] = cells(choice.model, name, outcomes)
            text[name] = score_text(session_of(contender.job))
    report = report_on(session_of(baseline.job), run.text)
    papers = [data for data in run.datasets if data.task.name in PAPER_TASKS]
    ablation = ablate.Ablation(baseline, run.text, papers, run.limit, run.store, run.scorer)
    ablated = list(ablate.ablate(ablation, report, run.sites, run.draws, seed=0))
    return ModelTables(choice.model, parameters(config), rows, text, ablated, report, dict(planted_rows(choice, run)))


@contextmanager
def scored_text(session: Session, run: Settings) -> Iterator[Callable[[Session], TextRow]]:
    """Score the run's text under the baseline, and give what scores it under another scheme. Raises RefmambaError."""
    with kept_baseline(run.folder) as baseline:
        scheme, bits = session.scheme, text_perplexity(session, run.text, baseline.keep).bits_per_byte
        first = TextRow(bits, 0.0, weight_bytes(session.runner.model))

        def row(session: Session) -> TextRow:
            if session.scheme == scheme:
                return first
            comparison = baseline.comparison()
            bits = text_perplexity(session, run.text, comparison.look).bits_per_byte
            return TextRow(bits, comparison.mean, weight_bytes(session.runner.model))

        yield row


def row_by_gptq(scheme: str) -> str:
    """The name of the row of a scheme whose weights are rounded by GPTQ."""
    return f"{scheme}, GPTQ"


def rounded(choice: ModelChoice, folder: Path) -> ModelChoice:
    """The model under its scheme, rounded by GPTQ and saved in the folder, where an earlier run may have left it."""
    original = subject(choice, MAX_LENGTH)
    named = [original.model_sha256, original.scheme.to_json(), calibration_sha256(choice), choice.add_bos, SPEC_VERSION]
    place = folder / f"gptq-{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]}"
    if not place.exists():
        quantize_folder(choice, place, rounding="gptq")
    return replace(choice, model=str(place), scheme=None)


def planted_rows(choice: ModelChoice, run: Settings) -> Iterator[tuple[str, dict[str, TextRow]]]:
    """The text under every scheme, for each planted channel: `in_proj 2^5` and its rows. Raises RefmambaError."""

    def session(site: str, power: int, scheme: str) -> Session:
        opened = open_session(replace(choice, scheme=scheme))
        source = planted.Planted(opened.opened.float_checkpoint(), site, power)
        return replace(opened, opened=replace(opened.opened, checkpoint=source))

    for site in planted.SITES:
        for power in run.planted:
            with scored_text(session(site, power, BASELINE), run) as score_text:
                rows = {scheme: score_text(session(site, power, scheme)) for scheme in run.schemes}
                for scheme in run.gptq:
                    made = session(site, power, scheme)
                    made = replace(made, opened=replace(made.opened, checkpoint=made.opened.rounded_by_gptq()))
                    rows[row_by_gptq(scheme)] = score_text(made)
            yield f"{site} 2^{power}", rows


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


def write_all(folder: Path, models: Sequence[ModelTables], run: Settings, backend: str) -> None:
    """Tables and figures of the models that are done."""
    for suffix in ("png", "svg"):
        plot(models[-1].outliers, f"{models[-1].model}, fp32", folder / f"{models[-1].file_name}.{suffix}")
        figure_2(models, guessing(run.datasets), folder / f"figure2.{suffix}")
    title = f"# Mamba-PTQ, reproduced (specification {SPEC_VERSION}, backend {backend})"
    sources = [f"- {d.task.name}: {len(d.documents[: run.limit])} documents. {d.note or d.source}" for d in run.datasets]
    figure = "## Figure 2\n\n![Figure 2](figure2.png)"
    write_text(folder / "tables.md", "\n\n".join([title, "\n".join(sources), *(m.markdown() for m in models), figure]) + "\n")
    values = {"specification": SPEC_VERSION, "backend": backend, "models": {model.model: model.to_json() for model in models}}
    write_text(folder / "tables.json", json_text(values, indent=1) + "\n")
