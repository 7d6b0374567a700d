"""The results file: nothing lost, nothing computed twice, nothing mixed up."""

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from refmamba.errors import DataError, NonFiniteError
from refmamba.eval_tasks.evaluate import Block, Job, Subject, evaluate, subject
from refmamba.eval_tasks.load import Dataset, load_sample
from refmamba.eval_tasks.progress import Progress, progress
from refmamba.eval_tasks.results import Key, Result, Results
from refmamba.eval_tasks.score import Score
from refmamba.eval_tasks.tasks import TASKS
from refmamba.run.session import ModelChoice

KEY = Key("model", "{}", "", "piqa", "data", "1.0", 2048)


def result(doc_id: int, value: float = -1.5) -> Result:
    return Result(doc_id, (Score(value, False), Score(-0.1 - 0.2, True)))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with Results(tmp_path / "r.sqlite") as results:
        results.save(KEY, [result(3, -1 / 3), result(0)])
    with Results(tmp_path / "r.sqlite") as results:
        assert results.load(KEY) == {0: result(0), 3: result(3, -1 / 3)}


@pytest.mark.parametrize("field", [field.name for field in fields(Key)])
def test_every_part_of_the_key_separates(field: str, tmp_path: Path) -> None:
    changed: dict[str, Any] = {field: 7 if field == "max_length" else "other"}
    other = replace(KEY, **changed)
    with Results(tmp_path / "r.sqlite") as results:
        results.save(KEY, [result(0)])
        assert results.load(other) == {}


def test_the_first_result_of_a_document_stays(tmp_path: Path) -> None:
    with Results(tmp_path / "r.sqlite") as results:
        results.save(KEY, [result(0)])
        results.save(KEY, [result(0, -7.0), result(1)])
        assert results.load(KEY) == {0: result(0), 1: result(1)}


def test_a_block_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with Results(tmp_path / "r.sqlite") as results:
        with pytest.raises(DataError, match=r"r\.sqlite: cannot be written"):
            results.save(KEY, [result(0), Result(None, ())])  # type: ignore[arg-type]
        assert results.load(KEY) == {}
        results.save(KEY, [result(0)])


def test_another_file_is_not_a_results_file(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_text("notes " * 100)
    with pytest.raises(DataError, match=r"r\.sqlite: cannot be used as a results file: file is not a database"):
        Results(tmp_path / "r.sqlite")
    with pytest.raises(DataError, match="unable to open"):
        Results(tmp_path / "nowhere" / "r.sqlite")
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as other:
        other.execute("CREATE TABLE result (name)")
    content = (tmp_path / "other.sqlite").read_bytes()
    with pytest.raises(DataError, match=r"other\.sqlite: .*another program's database"):
        Results(tmp_path / "other.sqlite")
    assert (tmp_path / "other.sqlite").read_bytes() == content


def test_a_broken_results_file_is_one_line(tmp_path: Path) -> None:
    with Results(tmp_path / "r.sqlite") as results:
        results.save(KEY, [result(i) for i in range(200)])
    content = bytearray((tmp_path / "r.sqlite").read_bytes())
    content[8192:] = b"\xa5" * len(content[8192:])  # the first pages hold the tables' names
    (tmp_path / "r.sqlite").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.sqlite: cannot be") as error, Results(tmp_path / "r.sqlite") as results:
        results.load(KEY)
    assert "\n" not in str(error.value)


def _write(file: Path, start: int) -> None:
    with Results(file) as results:
        for block in range(40):
            results.save(KEY, [result(start + 2 * (4 * block + i)) for i in range(4)])


def test_opening_waits_for_one_who_writes_before_the_file_has_its_log(tmp_path: Path) -> None:
    file = tmp_path / "r.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as writer:
        timer = threading.Timer(0.3, writer.execute, ["COMMIT"])

        class Interrupted(Results):
            """Between the tables and the change of journal mode, another process begins to write."""

            @contextmanager
            def _transaction(self) -> Iterator[None]:
                with super()._transaction():
                    yield
                if not timer.is_alive() and not timer.finished.is_set():
                    writer.execute("BEGIN IMMEDIATE")
                    timer.start()

        with Interrupted(file) as results:
            results.save(KEY, [result(0)])
            assert results.load(KEY) == {0: result(0)}
        timer.join()


def test_two_processes_write_to_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path / "r.sqlite", start)) for start in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    with Results(tmp_path / "r.sqlite") as results:
        assert sorted(results.load(KEY)) == list(range(320))
    assert sqlite3.connect(tmp_path / "r.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)


# evaluate


@pytest.fixture(scope="module")
def small() -> Subject:
    return subject(ModelChoice("small", "int8"), 2048)


@pytest.fixture
def bars() -> Iterator[Progress]:
    with progress(20) as bars:
        yield bars


class Recording:
    """A Scorer that gives made-up scores and writes down what it was asked; it fails at a block of its choice."""

    def __init__(self, fail_at: int = -1) -> None:
        self.asked: list[list[int]] = []
        self._fail_at = fail_at

    @property
    def documents(self) -> list[int]:
        return [doc_id for block in self.asked for doc_id in block]

    def __call__(self, job: Job, blocks: Sequence[Block]) -> Iterator[list[Result]]:
        for block in blocks:
            self.asked.append([doc_id for doc_id, _ in block])
            if len(self.asked) == self._fail_at:
                raise NonFiniteError("rows:9: a NaN")
            yield [result(doc_id, -float(doc_id)) for doc_id, _ in block]


def test_only_what_is_missing_is_scored(small: Subject, bars: Progress, tmp_path: Path) -> None:
    data, scorer = load_sample(TASKS["piqa"]), Recording()
    with Results(tmp_path / "r.sqlite") as results:
        evaluate(small, data, 5, results, scorer, bars)
        assert sorted(scorer.documents) == [0, 1, 2, 3, 4]
        evaluate(small, data, None, results, scorer, bars)
        assert sorted(scorer.documents) == list(range(20))
        evaluate(small, data, None, results, scorer, bars)
        assert sorted(scorer.documents) == list(range(20))


def test_an_error_keeps_the_blocks_before_it(small: Subject, bars: Progress, tmp_path: Path) -> None:
    data, scorer = load_sample(TASKS["piqa"]), Recording(fail_at=2)
    with Results(tmp_path / "r.sqlite") as results:
        with pytest.raises(NonFiniteError, match="rows:9"):
            evaluate(small, data, None, results, scorer, bars)
        assert sorted(results.load(small.key(data))) == sorted(scorer.asked[0])


def test_the_longest_documents_come_first(small: Subject, bars: Progress, tmp_path: Path) -> None:
    data, scorer = load_sample(TASKS["lambada"]), Recording()
    with Results(tmp_path / "r.sqlite") as results:
        evaluate(small, data, None, results, scorer, bars)
    lengths = [len(data.documents[i].contexts[0] + data.documents[i].continuations[0]) for i in scorer.documents]
    assert lengths == sorted(lengths, reverse=True)


def test_the_key_holds_all_that_numbers_depend_on(small: Subject, tmp_path: Path) -> None:
    data = load_sample(TASKS["piqa"])
    passage = tmp_path / "text.txt"
    passage.write_text("Once upon a time there was a fox. " * 20)

    def key(choice: ModelChoice = small.choice, length: int = 2048, data: Dataset = data) -> Key:
        return subject(choice, length).key(data)

    assert key() == small.key(data)
    others = [
        key(replace(small.choice, scheme="fp32")),
        key(length=1024),
        key(data=load_sample(TASKS["copa"])),
        key(replace(small.choice, scheme="int8-static")),
        key(replace(small.choice, scheme="int8-static", calibrate=passage)),
        key(replace(small.choice, scheme="int8-static", calibrate=passage, percentile=0.99)),
    ]
    assert len({small.key(data), *others}) == 7
    # an exact backend's numbers are every exact backend's; another's carry its name
    assert key(replace(small.choice, backend="reference")) == key()
    inexact: Any = type("Inexact", (), {"name": "fast", "device": "cuda", "exact": False, "dtype": "bfloat16"})()
    named = replace(small, backend=inexact).key(data)
    assert (named.backend, named.device, named.dtype) == ("fast", "cuda", "bfloat16")
