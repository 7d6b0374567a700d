"""`refmamba reproduce`: the paper's tables and figures."""

from contextlib import ExitStack
from pathlib import Path

import click

from refmamba.backend import load_backend
from refmamba.backends import DEFAULT_BACKEND
from refmamba.errors import DataError
from refmamba.eval_tasks.cluster import cluster
from refmamba.eval_tasks.evaluate import score_here
from refmamba.eval_tasks.load import HUB, load_tasks
from refmamba.eval_tasks.results import Results
from refmamba.formats.text import read_text
from refmamba.paper.estimate import plan, work_of, work_on_hub
from refmamba.paper.published import PAPER_TASKS
from refmamba.paper.reproduction import SCHEMES, SITES, Settings, evaluate_model, write_all
from refmamba.paper.tables import ModelTables
from refmamba.run.session import ModelChoice
from refmamba.spec.calibrate import passage


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
