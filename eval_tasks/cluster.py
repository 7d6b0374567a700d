"""Blocks of documents on many processes or machines, by dask.distributed.

Only this process writes results. A block whose worker dies is given to another one; what is finished stays finished.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from refmamba.errors import BackendError
from refmamba.eval_tasks.evaluate import Block, Job, score_block
from refmamba.eval_tasks.results import Result

Scores = Callable[[Job, Sequence[Block]], Iterator[list[Result]]]


@contextmanager
def cluster(workers: int | None, address: str | None) -> Iterator[Scores]:
    """A scorer on `workers` spawned processes here, each with its share of the cores, or on a scheduler's workers.

    Raises BackendError where dask.distributed is missing, the scheduler does not answer, or a block kills its workers.
    """
    dask = _distributed()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # a lost worker is dealt with below
    if address is not None:
        try:
            client = dask.Client(address, timeout="5s")
        except (OSError, ValueError) as error:
            raise BackendError(f"no dask scheduler answers at {address}: {error}") from error
        with client:
            yield lambda job, blocks: _score(client, job, blocks)
        return
    threads = str(max(1, (os.cpu_count() or 1) // (workers or 1)))
    environment = {"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    with (
        dask.LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None, env=environment,
            silence_logs=logging.CRITICAL,
        ) as local,
        dask.Client(local) as client,
    ):  # fmt: skip
        yield lambda job, blocks: _score(client, job, blocks)


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")  # loaded only here: it is an extra, and slow to import
    except ImportError:
        raise BackendError("several workers need dask.distributed: pip install 'refmamba[cluster]'") from None


def _score(client: Any, job: Job, blocks: Sequence[Block]) -> Iterator[list[Result]]:
    dask = _distributed()
    futures = [client.submit(score_block, _absolute(job), block, pure=False) for block in blocks]
    try:
        for future in dask.as_completed(futures):
            yield future.result()
            future.release()
    except dask.KilledWorker as error:
        raise BackendError(f"a block of documents was lost with each of its workers: {error}") from error
    finally:
        client.cancel(futures)


def _absolute(job: Job) -> Job:
    """The job with paths that hold in another working directory."""
    choice = job.choice
    model = str(Path(choice.model).resolve()) if Path(choice.model).is_dir() else choice.model
    scheme = str(Path(choice.scheme).resolve()) if choice.scheme and Path(choice.scheme).is_file() else choice.scheme
    calibrate = choice.calibrate and choice.calibrate.resolve()
    return replace(job, choice=replace(choice, model=model, scheme=scheme, calibrate=calibrate))
