"""`refmamba reproduce`: the paper's tables and figures."""

import re
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
    percentile_option,
    tasks_option,
    text_option,
    workers_option,
)  # fmt: skip
from refmamba.errors import DataError
from refmamba.eval_tasks.cluster import cluster
from refmamba.eval_tasks.evaluate import score_here
from refmamba.eval_tasks.load import HUB, load_tasks
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.tasks import TASKS
from refmamba.paper.estimate import plan, work_of, work_on_hub
from refmamba.paper.published import PAPER_TASKS
from refmamba.paper.reproduction import SCHEMES, SITES, Settings, check_outputs, evaluate_model, row_by_gptq, write_all
from refmamba.paper.tables import ModelTables
from refmamba.run.session import ModelChoice

MOST_POWER = 20  # of two; beyond it the smallest numbers of a model are no longer exact


@click.command(
    "reproduce",
    cls=Command,
    examples=["refmamba reproduce out --dry-run", "refmamba reproduce out --schemes fp32,w8-all,int8 --tasks copa --limit 5"],
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@names_option("--models", default="small", help="With commas: small, folders, OWNER/NAME on the hub.")
@model_options(calibrate_option, percentile_option, backend_option, device_option)
@names_option("--schemes", default=",".join(SCHEMES), help="With commas.")
@names_option("--gptq", help="Schemes, with commas, that are rounded by GPTQ on --calibrate FILE too: another row each.")
@text_option("For outliers, bits per byte and the KL divergence to fp32.")
@names_option("--planted", help="Also with planted outliers 2^N larger: N, with commas, as 5,7,10.")
@click.option("--sites", default=",".join(SITES), show_default=True, help="Ablations (table 2), with commas; empty: none.")
@click.option("--draws", default=1, show_default=True, type=click.IntRange(0, 10_000), help="Random controls of each ablation.")
@tasks_option(default="all")
@data_option
@limit_option
@workers_option
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and how long it may take.")
def command(
    folder: Path, models: tuple[str, ...], choice: ModelChoice, schemes: tuple[str, ...], gptq: tuple[str, ...] | None,
    text: TextFile, planted: tuple[str, ...] | None, sites: str, draws: int, tasks: tuple[str, ...], data: tuple[str, ...],
    limit: int | None, workers: int | None, dry_run: bool,
) -> None:  # fmt: skip
    """Make the paper's tables and figures in FOLDER. A second run goes on where the first one stopped."""
    if fetched := HUB in data:  # the plan comes before any download
        named = tasks or tuple(TASKS)
        work, ablated = work_on_hub(named, limit), work_on_hub([name for name in named if name in PAPER_TASKS], limit)
    else:
        loaded = load_tasks(tasks, data)
        work, ablated = work_of(loaded, limit), work_of([data for data in loaded if data.task.name in PAPER_TASKS], limit)
    where = [site for site in sites.split(",") if site]
    if wrong := set(where) - set(SITES):
        raise DataError(f"--sites: no '{min(wrong)}'; there are {', '.join(SITES)}")
    powers = [_power(word) for word in planted or ()]
    backend = load_backend(choice.backend, choice.device)
    if not dry_run:
        check_outputs(folder, models)
    names = {scheme: scheme for scheme in schemes} | {row_by_gptq(scheme): scheme for scheme in gptq or ()}
    click.echo(plan(models, names, work, ablated, len(where) * (1 + draws), fetched, backend))
    if dry_run:
        return
    with ExitStack() as stack:
        datasets = load_tasks(tasks, data)
        store = stack.enter_context(Results(folder / "results.sqlite"))
        scorer = stack.enter_context(cluster(workers, None)) if workers else score_here
        run = Settings(folder, schemes, gptq or (), powers, datasets, limit, text.text, where, draws, store, scorer)
        finished = list[ModelTables]()
        for model in models:
            finished.append(evaluate_model(replace(choice, model=model), run))
            write_all(folder, finished, run, choice.backend)
    click.echo(f"{folder}: tables.md, tables.json, figures 1 and 2")


def _power(word: str) -> int:
    if not re.fullmatch("[0-9]{1,2}", word) or int(word) > MOST_POWER:
        raise DataError(f"--planted {word}: give whole numbers up to {MOST_POWER} with commas between, as 5,7,10")
    return int(word)
