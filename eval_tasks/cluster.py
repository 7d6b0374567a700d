"""Blocks of documents on many processes or machines, by dask.distributed.

Only this process writes results. A block whose worker dies is given to another one; what is finished stays finished.
"""

import hashlib
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refmamba.errors import BackendError, DataError, FileError
from refmamba.eval_tasks.evaluate import Block, Job, score_block
from refmamba.eval_tasks.results import Result
from refmamba.formats.hub import SMALL
from refmamba.formats.reading import TEXT_BYTES, read_bytes

WAIT_SECONDS = 5.0  # until it is asked whether there are workers at all
Scores = Callable[[Job, Sequence[Block]], Iterator[list[Result]]]


@contextmanager
def cluster(workers: int | None, address: str | None) -> Iterator[Scores]:
    """A scorer on `workers` spawned processes here, each with its share of the cores and CUDA devices, or on a scheduler's
    workers.

    Raises BackendError where dask.distributed or cryptography is missing, the scheduler does not answer, or a block kills its
    workers. Call it from the main thread.
    """
    dask = _distributed()
    for name in ("distributed", "distributed.client", "asyncio"):  # lost workers and schedulers are dealt with below
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="refmamba-workers-"))
        stack.enter_context(importlib.import_module("dask").config.set({"temporary-directory": scratch}))  # the scheduler's too
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it: Ctrl-C is for this process
        try:
            local = stack.enter_context(dask.LocalCluster(
                n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None, env=environment,
                silence_logs=logging.CRITICAL, security=_keys(dask),
            ))  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, interrupt)
        client = stack.enter_context(dask.Client(local))
        yield lambda job, blocks: _score(client, job, blocks)


def _keys(dask: Any) -> Any:
    """Keys for this run alone: without them any user of the machine could make the scheduler run code."""
    try:
        return dask.Security.temporary()
    except ImportError:
        raise BackendError("several workers need cryptography, to shut others out: pip install 'refmamba[cluster]'") from None


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")  # loaded only here: it is an extra, and slow to import
    except ImportError:
        raise BackendError("several workers need dask.distributed: pip install 'refmamba[cluster]'") from None


def _score(client: Any, job: Job, blocks: Sequence[Block]) -> Iterator[list[Result]]:
    job = _absolute(job)
    inputs = _inputs(job)
    return _finished(client, [client.submit(_on_worker, job, inputs, block, pure=False) for block in blocks])


def _inputs(job: Job) -> str:
    """A hash of the files that a job names besides the model's, which has its own. Raises DataError."""
    total = hashlib.sha256()
    scheme = job.choice.scheme
    for file in (Path(scheme) if isinstance(scheme, str) else None, job.choice.calibrate):  # a Scheme is in the job itself
        if file and file.is_absolute():  # a scheme's name is not
            try:
                total.update(read_bytes(file, TEXT_BYTES) + b"\0")
            except FileError as error:
                raise DataError(f"on {socket.gethostname()}: {error}") from error
    return total.hexdigest()


def _on_worker(job: Job, inputs: str, block: Block) -> list[Result]:
    if _inputs(job) != inputs:
        raise DataError(f"{socket.gethostname()} has another {job.choice.scheme} or {job.choice.calibrate}")
    if job.choice.device == "cuda":
        job = _on_own_device(job, _distributed().get_worker().name)
    try:
        return score_block(job, block)
    except BackendError as error:  # of the machine, and not of the documents: the command's own has what the backend needs
        raise BackendError(f"on {socket.gethostname()}: {error}") from error


def _on_own_device(job: Job, worker: Any) -> Job:
    """The job on one of several CUDA devices, by the number of the worker.

    The workers that this process started are numbered from 0; others have names, and see what CUDA_VISIBLE_DEVICES shows them.
    """
    if not isinstance(worker, int):
        return job
    count = importlib.import_module("torch").cuda.device_count()
    return replace(job, choice=replace(job.choice, device=f"cuda:{worker % max(count, 1)}"))


def _finished(client: Any, futures: list[Any]) -> Iterator[list[Result]]:
    dask, pending, alone = _distributed(), set(futures), False
    try:
        while pending:
            try:
                done, pending = dask.wait(pending, timeout=WAIT_SECONDS, return_when="FIRST_COMPLETED")
            except dask.TimeoutError:
                if not alone and not client.nthreads():
                    tqdm.write("the scheduler has no worker; waiting for one", file=sys.stderr)
                    alone = True
                continue
            alone = False
            for future in done:
                yield future.result()
                future.release()
    except dask.KilledWorker as error:
        raise BackendError(f"a block of documents was lost with each of its workers: {error}") from error
    except (dask.CancelledError, OSError) as error:
        raise BackendError("the connection to the dask scheduler is lost; start it and this command again") from error
    finally:
        if client.status == "running":
            client.cancel(futures)


def _absolute(job: Job) -> Job:
    """The job with paths that hold in another working directory. A link keeps its name, which says what kind of file it is."""
    choice, scheme = job.choice, job.choice.scheme
    model = str(Path(choice.model).absolute()) if choice.model != SMALL and Path(choice.model).exists() else choice.model
    scheme = str(Path(scheme).absolute()) if isinstance(scheme, str) and Path(scheme).is_file() else scheme
    calibrate = choice.calibrate and choice.calibrate.absolute()
    return replace(job, choice=replace(choice, model=model, scheme=scheme, calibrate=calibrate))
