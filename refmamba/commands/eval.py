"""`refmamba eval`: the six tasks, on any model, schemes and backend; see refmamba.eval_tasks."""

import itertools
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from refmamba.commands.options import MODEL_OPTIONS
from refmamba.errors import DataError, RefmambaError


def _names(option: str, text: str) -> list[str]:
    """What an option lists with commas between. Raises DataError where it lists nothing."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise DataError(f"--{option} '{text}': names nothing; leave it out, or give names with commas between")
    return names


@click.command("eval")
@click.option("--tasks", help="lambada,hellaswag,piqa,winogrande,rte,copa; default: all that have data.")
@click.option("--schemes", help="Several schemes, with commas between.")
@click.option("--data", multiple=True, help="A folder, TASK=FILE, `hub` or `sample` (default); repeatable.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each task.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), default="refmamba-results.sqlite",
              show_default=True, help="Keeps every document's result; a run goes on where the last one stopped.")  # fmt: skip
@click.option("--samples", type=click.Path(path_type=Path, dir_okay=False), help="Write one JSON object a document here.")
@click.option("--max-length", type=click.IntRange(1), default=2048, show_default=True, help="Tokens; longer contexts are cut.")
@click.option("--workers", type=click.IntRange(1), help="Score in N processes of this machine (extra `cluster`).")
@click.option("--dask", help="Score on the workers of this dask scheduler, tcp://HOST:PORT (extra `cluster`).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, as lm-evaluation-harness lays it out.")
def command(
    tasks: str | None, schemes: str | None, data: tuple[str, ...], limit: int | None, results: Path, samples: Path | None,
    max_length: int, workers: int | None, dask: str | None, as_json: bool, scheme: str | None, bits: int | None,
    act_bits: int | None, **model: Any,
) -> None:  # fmt: skip
    """Score the six tasks as lm-evaluation-harness does, and print their metrics."""
    from refmamba.eval_tasks import report
    from refmamba.eval_tasks.cluster import cluster
    from refmamba.eval_tasks.evaluate import evaluate_all, score_here, subject
    from refmamba.eval_tasks.load import load_tasks
    from refmamba.eval_tasks.progress import progress
    from refmamba.eval_tasks.results import Results
    from refmamba.formats.files import write_text
    from refmamba.run.session import ModelChoice, choose_scheme

    if workers and dask:
        raise click.UsageError("give either --workers or --dask")
    if schemes is not None and (scheme or bits or act_bits):
        raise click.UsageError("give either --schemes, or --scheme, --bits and --act-bits")
    if samples and not samples.parent.is_dir():
        raise DataError(f"{samples}: cannot be written: there is no folder {samples.parent}")
    names = _names("schemes", schemes) if schemes is not None else [choose_scheme(scheme, bits, act_bits)]
    datasets = load_tasks(_names("tasks", tasks) if tasks is not None else [], data)
    subjects = [subject(replace(ModelChoice(**model), scheme=name), max_length) for name in dict.fromkeys(names)]
    if len({who.scheme.name for who in subjects}) < len(subjects):
        raise DataError(f"--schemes {schemes}: two of them have the same name; give each scheme file its own")
    counts = [min(limit or len(one.documents), len(one.documents)) for one in datasets]

    def show() -> None:
        """What there is, on stdout and in the samples' file."""
        outcomes = [
            report.Outcome(who, one, count, store.load(who.key(one)))
            for who, (one, count) in itertools.product(subjects, zip(datasets, counts, strict=True))
        ]
        click.echo(json.dumps(report.as_json(outcomes), ensure_ascii=False) if as_json else report.text(outcomes))
        if samples:
            write_text(samples, report.samples(outcomes))

    with ExitStack() as stack:
        store = stack.enter_context(Results(results))
        scorer = stack.enter_context(cluster(workers, dask)) if workers or dask else score_here
        try:
            with progress(len(subjects) * sum(counts)) as bars:
                evaluate_all(itertools.product(subjects, datasets), limit, store, scorer, bars)
        except (KeyboardInterrupt, RefmambaError):
            show()
            raise
        show()


for _option in reversed(MODEL_OPTIONS):
    command = _option(command)
