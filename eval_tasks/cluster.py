"""Blocks of documents on many processes or machines, by dask.distributed.

Only this process writes results. A block whose worker dies is given to another one; what is finished stays finished.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from refmamba.errors import BackendError
from refmamba.eval_tasks.evaluate import Block, Job, score_block
from refmamba.eval_tasks.results import Result

Scores = Callable[[Job, Sequence[Block]], Iterator[list[Result]]]


@contextmanager
def cluster(workers: int | None, address: str | None) -> Iterator[Scores]:
    """A scorer on `workers` spawned processes here, each with its share of the cores, or on a scheduler's workers.

    Raises BackendError where dask.distributed is missing, the scheduler does not answer, or a block kills its workers.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise BackendError("several workers need dask.distributed: pip install 'refmamba[cluster]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # a lost worker is dealt with below
    if address is not None:
        try:
            client = Client(address, timeout="10s")
        except (OSError, ValueError) as error:
            raise BackendError(f"no dask scheduler answers at {address}: {error}") from error
        with client:
            yield lambda job, blocks: _score(client, job, blocks)
        return
    threads = str(max(1, (os.cpu_count() or 1) // (workers or 1)))
    environment = {"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None, env=environment,
            silence_logs=logging.CRITICAL,
        ) as local,
        Client(local) as client,
    ):  # fmt: skip
        yield lambda job, blocks: _score(client, job, blocks)


def _score(client, job: Job, blocks: Sequence[Block]) -> Iterator[list[Result]]:  # type: ignore[no-untyped-def]
    from distributed import KilledWorker, as_completed

    futures = [client.submit(score_block, _absolute(job), block, pure=False) for block in blocks]
    try:
        for future in as_completed(futures):
            yield future.result()
            future.release()
    except KilledWorker as error:
        raise BackendError(f"a block of documents was lost with each of its workers: {error}") from error
    finally:
        client.cancel(futures)


def _absolute(job: Job) -> Job:
    """The job with paths that hold in another working directory."""
    choice = job.choice
    model, scheme = (str(Path(word).resolve()) if Path(word).exists() else word for word in (choice.model, choice.scheme))
    calibrate = choice.calibrate and choice.calibrate.resolve()
    return replace(job, choice=replace(choice, model=model, scheme=scheme, calibrate=calibrate))
