"""`refmamba reproduce`: the paper's tables and figures."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from refmamba.backend import load_backend
from refmamba.commands.options import (
    Command,
    TextFile,
    backend_option,
    calibrate_option,
    data_option,
    device_option,
    limit_option,
    model_options,
    names_option,
    tasks_option,
    text_option,
    workers_option,
)  # fmt: skip
from refmamba.errors import DataError
from refmamba.eval_tasks.cluster import cluster
from refmamba.eval_tasks.evaluate import score_here
from refmamba.eval_tasks.load import HUB, load_tasks
from refmamba.eval_tasks.results import Results
from refmamba.paper.estimate import plan, work_of, work_on_hub
from refmamba.paper.published import PAPER_TASKS
from refmamba.paper.reproduction import SCHEMES, SITES, Settings, check_outputs, evaluate_model, write_all
from refmamba.paper.tables import ModelTables
from refmamba.run.session import ModelChoice


@click.command(
    "reproduce",
    cls=Command,
    examples=["refmamba reproduce out --dry-run", "refmamba reproduce out --schemes fp32,w8-all,int8 --tasks copa --limit 5"],
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@names_option("--models", default="small", help="With commas: small, folders, OWNER/NAME on the hub.")
@model_options(calibrate_option, backend_option, device_option)
@names_option("--schemes", default=",".join(SCHEMES), help="With commas.")
@text_option("For outliers and bits per byte.")
@click.option("--sites", default=",".join(SITES), show_default=True, help="Ablations (table 2), with commas; empty: none.")
@click.option("--draws", default=1, show_default=True, type=click.IntRange(0, 10_000), help="Random controls of each ablation.")
@tasks_option(default="all")
@data_option
@limit_option
@workers_option
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and how long it may take.")
def command(
    folder: Path, models: tuple[str, ...], choice: ModelChoice, schemes: tuple[str, ...], text: TextFile, sites: str,
    draws: int, tasks: tuple[str, ...], data: tuple[str, ...], limit: int | None, workers: int | None, dry_run: bool,
) -> None:  # fmt: skip
    """Make the paper's tables and figures in FOLDER. A second run goes on where the first one stopped."""
    if fetched := HUB in data:  # the plan comes before any download
        work = work_on_hub(tasks or PAPER_TASKS, limit)
    else:
        work = work_of(load_tasks(tasks, data), limit)
    where = [site for site in sites.split(",") if site]
    if wrong := set(where) - set(SITES):
        raise DataError(f"--sites: no '{min(wrong)}'; there are {', '.join(SITES)}")
    backend = load_backend(choice.backend, choice.device)
    if not dry_run:
        check_outputs(folder, models)
    click.echo(plan(models, schemes, work, len(where) * (1 + draws), fetched, backend))
    if dry_run:
        return
    with ExitStack() as stack:
        datasets = load_tasks(tasks, data)
        store = stack.enter_context(Results(folder / "results.sqlite"))
        scorer = stack.enter_context(cluster(workers, None)) if workers else score_here
        run, found = Settings(schemes, datasets, limit, text.text, where, draws, store, scorer), list[ModelTables]()
        for model in models:
            found.append(evaluate_model(replace(choice, model=model), run))
            write_all(folder, found, run, choice.backend)
    click.echo(f"{folder}: tables.md, tables.json, figures 1 and 2")
