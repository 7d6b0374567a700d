"""`refmamba ablate`: what the outlier channels carry, table 2."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from refmamba.commands.options import MODEL_OPTIONS
from refmamba.eval_tasks.evaluate import loaded, score_here, subject
from refmamba.eval_tasks.load import load_tasks
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.score import MAX_LENGTH
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats.text import read_text
from refmamba.paper.ablation import Ablation, ablate, float_checkpoint, table
from refmamba.paper.outliers import SIGMA, Over, report_on
from refmamba.run.session import ModelChoice, choose_scheme
from refmamba.spec.calibrate import passage
from refmamba.spec.scheme import LINEAR_LAYERS


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
