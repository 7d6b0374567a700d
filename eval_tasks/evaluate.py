"""A task under a scheme: what is finished is read, the rest is scored in blocks, each saved as soon as it is there."""

import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refmamba.backend import Backend, numerics
from refmamba.errors import BackendError, DataError
from refmamba.eval_tasks.load import Dataset
from refmamba.eval_tasks.progress import Progress
from refmamba.eval_tasks.results import Key, Result, Results
from refmamba.eval_tasks.score import requests, score, sizes_of
from refmamba.eval_tasks.task import Document
from refmamba.formats.folder import opened_files
from refmamba.formats.hub import ModelFiles
from refmamba.formats.reading import TEXT_BYTES, read_bytes, regular
from refmamba.run.session import ModelChoice, Session, open_session
from refmamba.spec import SPEC_VERSION
from refmamba.spec.calibrate import passage
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme

Block = list[tuple[int, Document]]


@dataclass(frozen=True)
class Job:
    """What a process needs to score documents, and what it must find. numerics: of the backend, as `numerics_of` has it."""

    choice: ModelChoice
    max_length: int
    model_sha256: str
    numerics: str
    spec_version: str = SPEC_VERSION

    def open(self) -> Session:
        """The model, which is loaded when it first runs.

        Raises RefmambaError, so DataError where its files are others, and BackendError where the packages of a backend are that
        is not exact.
        """
        session = open_session(self.choice)
        if (model_sha256(session.opened.files), SPEC_VERSION) != (self.model_sha256, self.spec_version):
            raise DataError(f"{self.choice.model}: this process has other files of that name, or another refmamba")
        if (numbers := numerics_of(session.backend)) != self.numerics:
            raise BackendError(f"its kernels are {numbers}, and those of the command {self.numerics}; install the same")
        return session


def numerics_of(backend: Backend) -> str:
    """What tells the numbers of a backend that is not exact from those of another version of it; empty for an exact one."""
    return "" if backend.exact else ", ".join(numerics(backend).values()) or "float32"


# A block's results as they come, in any order. A call may begin with the work; it does not wait for it.
Scorer = Callable[[Job, Sequence[Block]], Iterator[list[Result]]]

_LOCK = threading.Lock()  # a worker may have several threads, and a runner is for one
_HELD: list[tuple[Job, Session]] = []  # the last job's model


def session_of(job: Job) -> Session:
    """The job's model, of which a process holds one at a time. Raises RefmambaError."""
    if not (_HELD and _HELD[0][0] == job):
        _HELD[:] = [(job, job.open())]
    return _HELD[0][1]


def score_block(job: Job, block: Block) -> list[Result]:
    """Score some documents; the model is loaded once for each process and job. Raises RefmambaError."""
    with _LOCK:
        return score_documents(session_of(job), job.max_length, block)


def score_documents(session: Session, max_length: int, block: Block) -> list[Result]:
    """Score some documents. Raises RefmambaError."""
    choices = [requests(document, session.tokenizer, max_length) for _, document in block]
    scores = iter(score(session.runner, session.backend, list(itertools.chain.from_iterable(choices))))
    return [
        Result(doc_id, tuple(itertools.islice(scores, len(part)))) for (doc_id, _), part in zip(block, choices, strict=True)
    ]


def score_here(job: Job, blocks: Sequence[Block]) -> Iterator[list[Result]]:
    """The Scorer of this process."""
    return (score_block(job, block) for block in blocks)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, as every result names it."""

    choice: ModelChoice
    model_sha256: str
    scheme: Scheme
    calibration: str
    percentile: float | None
    backend: Backend
    max_length: int
    added_tokens: list[int]

    @property
    def job(self) -> Job:
        """What scores it."""
        device = "cuda" if self.backend.device == "cuda" else self.choice.device  # also where the backend chose it
        return Job(replace(self.choice, device=device), self.max_length, self.model_sha256, numerics_of(self.backend))

    def key(self, data: Dataset) -> Key:
        """The name of a task's results."""
        where = ("", "") if self.backend.exact else (self.backend.name, self.backend.device)
        return Key(
            self.model_sha256, json.dumps(self.scheme.to_json(), sort_keys=True), self.calibration, data.task.name,
            data.sha256, SPEC_VERSION, self.max_length, self.choice.add_bos, *where, numerics_of(self.backend),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The names, for JSON."""
        return {
            "model": self.choice.model, "model_sha256": self.model_sha256, "scheme": self.scheme.name,
            "scheme_map": self.scheme.to_json(), "calibration_sha256": self.calibration or None, "percentile": self.percentile,
            "backend": self.backend.name, "device": self.backend.device, "exact": self.backend.exact,
            "spec_version": SPEC_VERSION, "max_length": self.max_length, "added_tokens": self.added_tokens,
        } | numerics(self.backend)  # fmt: skip


def model_sha256(files: ModelFiles) -> str:
    """A hash of the files that are read of a model. Raises RefmambaError."""
    total = hashlib.sha256()
    for file in opened_files(files):
        status = regular(file).stat()
        digest = _file_sha256(file, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


@functools.lru_cache
def _file_sha256(file: Path, version: tuple[int, ...]) -> str:
    """Of a file while it stays the same: a run under several schemes reads it once."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; a model folder needs it") from error


def subject(choice: ModelChoice, max_length: int) -> Subject:
    """Find out what a choice of model is without quantizing it. Raises RefmambaError."""
    session = open_session(choice)
    opened, calibration = session.opened, ""
    if session.scheme.needs_calibration and not isinstance(opened.checkpoint, QuantizedModel):
        calibration = calibration_sha256(choice)
    sha256, added = model_sha256(opened.files), session.tokenizer.added
    return Subject(choice, sha256, session.scheme, calibration, session.percentile, session.backend, max_length, added)


def calibration_sha256(choice: ModelChoice) -> str:
    """Of the text or the maxima that the model is calibrated with, and of the percentile where it cuts. Raises FileError."""
    text = passage().encode() if choice.calibrate is None else read_bytes(choice.calibrate, TEXT_BYTES)
    cut = b"" if choice.percentile == 1 else f"\0percentile {choice.percentile!r}".encode()
    return hashlib.sha256(text + cut).hexdigest()


def finished_results(results: Results, key: Key, data: Dataset) -> dict[int, Result]:
    """What there is of a task's results, by doc_id. Raises DataError, JSONError where they are not those of its documents."""
    finished = results.load(key)
    for doc_id, result in finished.items():
        choices = len(data.documents[doc_id].continuations) if 0 <= doc_id < len(data.documents) else 0
        if len(result.scores) != choices:
            raise DataError(f"the result of document {doc_id} of {data.task.name} is broken; give another --results FILE")
    return finished


def evaluate(subject: Subject, data: Dataset, limit: int | None, results: Results, scorer: Scorer, progress: Progress) -> None:
    """Score what is missing of a task's first `limit` documents into `results`. Raises RefmambaError."""
    evaluate_all([(subject, data)], limit, results, scorer, progress)


def evaluate_all(
    pairs: Iterable[tuple[Subject, Dataset]], limit: int | None, results: Results, scorer: Scorer, progress: Progress
) -> None:
    """The same for several; the scorer is given all of them before the first is waited for, so that no worker idles."""
    started = []
    for subject, data in pairs:
        key = subject.key(data)
        documents, finished = data.documents[:limit], finished_results(results, key, data)
        missing = [(i, document) for i, document in enumerate(documents) if i not in finished]
        missing.sort(key=lambda item: len(item[1].contexts[0]) + sum(map(len, item[1].continuations)), reverse=True)
        size = sizes_of(subject.backend).documents
        blocks = scorer(subject.job, [missing[i : i + size] for i in range(0, len(missing), size)])
        started.append((key, f"{subject.scheme.name} {data.task.name}", len(documents), len(missing), blocks))
    for key, name, count, left, blocks in started:
        progress.start(name, count)
        progress.skip(count - left)
        for block in blocks:
            results.save(key, block)
            progress.saved(len(block))
