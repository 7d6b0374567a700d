"""`refmamba eval`: the tasks, on any model, schemes and backend; see refmamba.eval_tasks."""

import itertools
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from refmamba.commands.options import (
    MOST,
    Command,
    OutputFile,
    data_option,
    json_option,
    limit_option,
    model_options,
    names_option,
    print_json,
    results_option,
    tasks_option,
    workers_option,
)  # fmt: skip
from refmamba.errors import DataError, RefmambaError
from refmamba.run.session import ModelChoice


@click.command(
    "eval",
    cls=Command,
    examples=["refmamba eval --tasks piqa,copa --schemes fp32,int8", "refmamba eval --data hub --samples samples.jsonl --json"],
)
@model_options()
@names_option("--schemes", help="Several schemes, with commas between.")
@tasks_option(default="all")
@data_option
@limit_option
@results_option
@click.option("--samples", type=OutputFile(), help="Write one JSON object a document here.")
@click.option(
    "--max-length", type=click.IntRange(1, MOST), default=2048, show_default=True, help="Tokens; longer contexts are cut."
)
@workers_option
@click.option("--dask", help="Score on the workers of this dask scheduler, tcp://HOST:PORT (extra `cluster`).")
@json_option
def command(
    choice: ModelChoice, schemes: tuple[str, ...] | None, tasks: tuple[str, ...], data: tuple[str, ...], limit: int | None,
    results: Path, samples: Path | None, max_length: int, workers: int | None, dask: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Score tasks as lm-evaluation-harness does, and print their metrics; --json as it lays them out."""
    from refmamba.eval_tasks import report
    from refmamba.eval_tasks.cluster import cluster
    from refmamba.eval_tasks.evaluate import evaluate_all, finished_results, score_here, subject
    from refmamba.eval_tasks.load import load_tasks
    from refmamba.eval_tasks.progress import progress
    from refmamba.eval_tasks.results import Results
    from refmamba.formats.writing import write_text

    if workers and dask:
        raise click.UsageError("give either --workers or --dask")
    if schemes is not None and choice.scheme is not None:
        raise click.UsageError("give either --schemes, or --scheme, --bits and --act-bits")
    datasets = load_tasks(tasks, data)
    subjects = [subject(replace(choice, scheme=name), max_length) for name in schemes or (choice.scheme,)]
    if len({evaluated.scheme.name for evaluated in subjects}) < len(subjects):
        raise DataError(f"--schemes {','.join(schemes or ())}: two of them have the same name; give each scheme file its own")
    counts = [len(dataset.documents[:limit]) for dataset in datasets]

    def show() -> None:
        """What there is, on stdout and in the samples' file."""
        outcomes = [
            report.Outcome(evaluated, dataset, count, finished_results(store, evaluated.key(dataset), dataset))
            for evaluated, (dataset, count) in itertools.product(subjects, zip(datasets, counts, strict=True))
        ]
        if as_json:
            print_json(report.as_json(outcomes))
        else:
            click.echo(report.text(outcomes))
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
