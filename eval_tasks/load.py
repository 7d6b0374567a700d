"""Where a task's rows come from: the sample inside the package, local files, or the hub."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from refmamba.errors import DataError, HubError
from refmamba.eval_tasks.formats import READERS, read_rows
from refmamba.eval_tasks.task import Document, HubFile, Task
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats.reading import TEXT_BYTES, folder_exists, listed, read_bytes

SAMPLE, HUB = "sample", "hub"  # words that --data takes besides folders and TASK=FILE
SAMPLE_NOTE = "20 rows written for this package: a sample, not the benchmark"


@dataclass(frozen=True)
class Dataset:
    """A task's documents in the order of the file; doc_id is a document's index.

    source: where they came from. note: what a reader of results must be told about them.
    """

    task: Task
    documents: tuple[Document, ...]
    source: str
    note: str = ""

    @cached_property
    def sha256(self) -> str:
        """A hash of what is asked: every context, continuation and right answer; the file's format does not matter."""
        asked = [[d.contexts, d.continuations, d.gold] for d in self.documents]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=True).encode()).hexdigest()


def load_file(task: Task, file: Path) -> Dataset:
    """A task's documents from one file. Raises DataError with file and line for whatever is wrong in it."""
    rows = read_rows(file, task.labels)
    return Dataset(task, tuple(task.document(row) for row in rows), str(file))


def load_sample(task: Task) -> Dataset:
    """A task's sample rows inside the package."""
    with resources.as_file(resources.files("refmamba.eval_tasks.samples")) as folder:
        documents = load_file(task, folder / f"{task.name}.jsonl").documents
    return Dataset(task, documents, SAMPLE, SAMPLE_NOTE)


def load_hub(task: Task) -> Dataset:
    """The harness's rows from the hub, pinned and checked. Raises HubError or DataError."""
    from huggingface_hub import hf_hub_download

    pinned = task.hub
    try:
        file = Path(hf_hub_download(pinned.repo, pinned.file, revision=pinned.revision, repo_type="dataset"))
    except (OSError, ValueError) as error:  # what the client raises for the network, the hub's answers and its cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubError(f"{task.name}: {pinned.repo} cannot be fetched ({reason}); use --data {task.name}=FILE") from error
    return check_hub(task, file, pinned)


def check_hub(task: Task, file: Path, pinned: HubFile) -> Dataset:
    """The documents of a fetched file, if it is the one that was pinned. Raises DataError.

    Where no hash is pinned, the one that the hub gave for the revision counts: the client's cache names large files by it.
    """
    blob = file.resolve().name
    expected = pinned.sha256 or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    if expected is not None and hashlib.sha256(read_bytes(file, TEXT_BYTES)).hexdigest() != expected:
        raise DataError(f"{file}: is not {pinned.file} of {pinned.repo} at {pinned.revision[:12]}; delete it and try again")
    data = load_file(task, file)
    if len(data.documents) != pinned.rows:
        raise DataError(f"{file}: {len(data.documents)} rows, and {pinned.repo} has {pinned.rows}")
    note = "" if expected is not None else "the hub's hash of this file is not at hand, so only its rows were counted"
    return Dataset(task, data.documents, f"{pinned.repo}@{pinned.revision}/{pinned.file}", note)


def _words(path: str) -> list[str]:
    return re.findall("[a-z0-9]+", path.lower())


def find(task: Task, folder: Path) -> Path | None:
    """The one file of a folder, at most two deep, that has the task's words in its path and its split in its name.

    Raises DataError where several have, and UnreadableFileError for a folder that cannot be read.
    """
    matches, own_name = [], folder.resolve().name  # resolved, since the name of `.` says nothing
    for file in sorted([*listed(folder), *folder.glob("*/*"), *folder.glob("*/*/*")]):
        path, name = (_words(text) for text in ("/".join([own_name, *file.relative_to(folder).parts]), file.name))
        split = any(word.startswith(task.split) for word in name)
        named = any(set(_words(name)) <= set(path) for name in (task.name, task.also) if name)
        if file.suffix.lower() in READERS and named and split:
            matches.append(file)
    if len(matches) > 1:
        raise DataError(f"{folder}: {task.name} could be {' or '.join(map(str, matches))}; say which: --data {task.name}=FILE")
    return matches[0] if matches else None


def load_tasks(names: Sequence[str], data: Iterable[str]) -> list[Dataset]:
    """The named tasks (none named: all that `data` has), each from the last word of --data that gives it.

    data: words `sample`, `hub`, a folder, or TASK=FILE; none at all is the sample. Raises RefmambaError.
    """
    for name in names:
        if name not in TASKS:
            raise DataError(f"unknown task '{name}'; there are {', '.join(TASKS)}")
    words = list(data) or [SAMPLE]
    places = [word for word in words if word in (SAMPLE, HUB) or folder_exists(Path(word))]
    named = {}
    for word in words:
        name, equals, place = word.partition("=")
        if word in places:
            continue
        if not equals:
            raise DataError(f"--data {word}: no such folder; give a folder, TASK=FILE, sample or hub")
        if name not in TASKS:
            raise DataError(f"--data {word}: unknown task '{name}'; there are {', '.join(TASKS)}")
        named[name] = Path(place)
    loaded = []
    for name, task in TASKS.items():
        if names and name not in names:
            continue
        if name in named:
            loaded.append(load_file(task, named[name]))
            continue
        for word in reversed(places):
            if word in (SAMPLE, HUB):
                loaded.append(load_sample(task) if word == SAMPLE else load_hub(task))
                break
            if file := find(task, Path(word)):
                loaded.append(load_file(task, file))
                break
        else:
            if names:
                raise DataError(f"no data for {name} in {' '.join(words)}: add --data {name}=FILE, or --data hub")
    if not loaded:
        raise DataError(f"no task's data in {' '.join(words)}: give --data TASK=FILE")
    return loaded
