"""`refmamba ablate`: what the outlier channels carry, table 2."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import click

from refmamba.commands.options import (
    SEEDS,
    Command,
    InputFile,
    Number,
    TextFile,
    data_option,
    json_option,
    limit_option,
    model_options,
    print_json,
    results_option,
    tasks_option,
    text_option,
)  # fmt: skip
from refmamba.eval_tasks.evaluate import score_here, session_of, subject
from refmamba.eval_tasks.load import load_tasks
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.formats.text import read_text
from refmamba.paper.ablation import Ablation, ablate, table
from refmamba.paper.outliers import SIGMA, Over, report_on
from refmamba.run.progress import bar
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.scheme import LINEAR_LAYERS


@click.command("ablate", cls=Command, examples=["refmamba ablate --text book.txt --site in_proj --draws 3"])
@model_options()
@click.option("--site", "sites", multiple=True, type=click.Choice([*LINEAR_LAYERS, "all"]),
              help="Where to zero; repeatable.  [default: each, and all]")  # fmt: skip
@text_option("Where the outliers are looked for.")
@click.option("--score", "scored", type=InputFile(), help="The text that is scored.  [default: the same]")
@click.option("--sigma", default=SIGMA, show_default=True, type=Number(0), help="As in `refmamba outliers`.")
@click.option(
    "--over", default="channels", show_default=True, type=click.Choice(get_args(Over)), help="As in `refmamba outliers`."
)
@click.option("--draws", default=3, show_default=True, type=click.IntRange(0, 10_000), help="Random controls of each site.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, SEEDS), help="Of the controls.")
@tasks_option(default=None)
@data_option
@limit_option
@results_option
@json_option
def command(
    choice: ModelChoice, sites: tuple[str, ...], text: TextFile, scored: Path | None, sigma: float, over: Over, draws: int,
    seed: int, tasks: tuple[str, ...] | None, data: tuple[str, ...], limit: int | None, results: Path, as_json: bool,
) -> None:  # fmt: skip
    """Zero the outlier channels, and random ones beside them (table 2); fp32 unless a scheme is named."""
    scored_text = text.text if scored is None else read_text(scored)
    datasets = load_tasks(tasks, data) if tasks is not None else []
    open_model(choice, "fp32").float_checkpoint()
    baseline = subject(replace(choice, scheme=choice.scheme or "fp32"), MAX_LENGTH)
    described = session_of(baseline.job).describe()
    with Results(results) if datasets else nullcontext() as store:  # opened before the work: it may not be ours
        report = report_on(session_of(baseline.job), text.text, sigma, over)
        ablation = Ablation(baseline, scored_text, datasets, limit, store, score_here)
        where, rows = sites or (*LINEAR_LAYERS, "all"), []
        with bar(1 + len(where) * (1 + draws), "ablations", "row") as done:
            for row in ablate(ablation, report, where, draws, seed):
                rows.append(row)
                done.update()
    if as_json:
        print_json(described | {"sigma": sigma, "over": over, "rows": [asdict(row) for row in rows]})
    else:
        click.echo(table(rows))
