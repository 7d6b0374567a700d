"""The tasks' rows: every format in the wild, where files are found, and every way in which they can be wrong."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refmamba.errors import DataError, FileError, RefmambaError
from refmamba.eval_tasks.load import check_hub, load_file, load_sample, load_tasks
from refmamba.eval_tasks.task import HubFile
from refmamba.eval_tasks.tasks import TASKS

REAL = os.environ.get("REFMAMBA_TASK_DATA")  # a folder with rows of the real data sets

ROWS: dict[str, dict[str, Any]] = {
    "lambada": {"text": 'The  dog sat. "Good\ndog," she said'},
    "hellaswag": {
        "ctx_a": "[header] How to row [title] Sit down.", "ctx_b": "the ÉCOLE", "activity_label": "Sport", "label": 3,
        "endings": ["[title] a.", "b  c.", "[step] d", "e [x] f "],
    },
    "piqa": {"goal": "row", "sol1": "pull ", "sol2": "push", "label": 1},
    "winogrande": {"sentence": "An ant ate a bee as the _ was hungry_.", "option1": "ant", "option2": "bee", "answer": "1"},
    "rte": {"premise": "A is B.", "hypothesis": "B is A.", "label": "not_entailment"},
    "copa": {"premise": " It rained. ", "choice1": "I swam.", "choice2": "Éva slept.", "question": "effect", "label": 0},
    "arc_easy": {
        "question": "Who\nrows?", "choices": {"text": ["an ant", "Bees ", ""], "label": ["1", "2", "3"]}, "answerKey": "2",
    },
    "arc_challenge": {
        "question": {"stem": " Why?", "choices": [{"text": b, "label": a} for a, b in ("Av", "Bw", "Cx", "Dy", "Ez")]},
        "answerKey": "E",
    },
}  # fmt: skip


def write(folder: Path, task: str, *rows: Any, name: str = "") -> Path:
    file = folder / (name or f"{task}.jsonl")
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return file


@pytest.mark.parametrize(
    ("task", "contexts", "continuations", "gold"),
    [
        ("lambada", ['The  dog sat. "Good\ndog," she'], [" said"], 0),
        # the harness's order: a tag at an ending's start leaves two spaces, and nothing is stripped at the end
        ("hellaswag", ["Sport: How to row. Sit down. The école"] * 4, ["  a.", " b c.", "  d", " e f"], 3),
        ("piqa", ["Question: row\nAnswer:"] * 2, [" pull ", " push"], 1),
        ("winogrande", ["An ant ate a bee as the ant", "An ant ate a bee as the bee"], [" was hungry_."] * 2, 0),
        ("rte", ["A is B.\nQuestion: B is A. True or False?\nAnswer:"] * 2, [" True", " False"], 1),
        ("copa", ["It rained therefore"] * 2, ["  i swam.", "  éva slept."], 0),
        ("arc_easy", ["Question: Who\nrows?\nAnswer:"] * 3, [" an ant", " Bees ", " "], 1),
        ("arc_challenge", ["Question:  Why?\nAnswer:"] * 5, [" v", " w", " x", " y", " z"], 4),
    ],
)
def test_a_row_becomes_its_prompt(task: str, contexts: list[str], continuations: list[str], gold: int, tmp_path: Path) -> None:
    (document,) = load_file(TASKS[task], write(tmp_path, task, ROWS[task])).documents
    assert list(document.contexts) == contexts
    assert list(document.continuations) == continuations
    assert document.gold == gold


def test_piqa_s_labels_lie_beside_its_rows(tmp_path: Path) -> None:
    row = {k: v for k, v in ROWS["piqa"].items() if k != "label"}
    file = write(tmp_path, "piqa", row, row, name="valid.jsonl")
    write(tmp_path, "piqa", "1", "0", name="valid-labels.lst")
    assert [d.gold for d in load_file(TASKS["piqa"], file).documents] == [1, 0]


def test_rte_from_glue_s_table_keeps_quotes(tmp_path: Path) -> None:
    table = 'sentence1\tsentence2\tlabel\r\nHe said "no.\tHe spoke.\tentailment\r\n'
    (tmp_path / "dev.tsv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    (document,) = load_file(TASKS["rte"], tmp_path / "dev.tsv").documents
    assert document.contexts[0] == 'He said "no.\nQuestion: He spoke. True or False?\nAnswer:'
    assert document.gold == 0


def test_copa_from_the_original_xml(tmp_path: Path) -> None:
    (tmp_path / "copa-dev.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<copa-corpus version="1.0">\n'
        '<item id="1" asks-for="cause" most-plausible-alternative="2">\n'
        "<p>My dog &amp; I ran.</p>\n<a1>It rained.</a1>\n<a2>We were late.</a2>\n</item>\n</copa-corpus>\n"
    )
    (document,) = load_file(TASKS["copa"], tmp_path / "copa-dev.xml").documents
    assert document.contexts[0] == "My dog & I ran because"
    assert document.continuations == ("  it rained.", "  we were late.")
    assert document.gold == 1
    assert document.where.endswith("copa-dev.xml:3")


HUB_FORM: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "hellaswag": lambda row: row | {"label": str(row["label"]), "ind": 1},
    "rte": lambda row: {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": 1, "idx": 0},
    "arc_challenge": lambda row: {
        "question": row["question"]["stem"], "answerKey": row["answerKey"],
        "choices": {part: [choice[part] for choice in row["question"]["choices"]] for part in ("text", "label")},
    },
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_hub_s_parquet_gives_the_same_documents_and_hash(task: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / f"{task}-validation.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([HUB_FORM.get(task, dict)(ROWS[task])]), file)
    assert load_file(TASKS[task], file).sha256 == load_file(TASKS[task], write(tmp_path, task, ROWS[task])).sha256


def test_the_hash_depends_on_every_part_of_a_document(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"goal": "Row"}, {"sol2": "Push"}, {"label": 0}]
    hashes = [load_file(TASKS["piqa"], write(tmp_path, "piqa", ROWS["piqa"] | change)).sha256 for change in changes]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("task", TASKS)
def test_twenty_sample_rows_that_say_so(task: str) -> None:
    data = load_sample(TASKS[task])
    assert len(data.documents) == 20
    assert "not the benchmark" in data.note
    golds = {document.gold for document in data.documents}
    assert golds == set(range(len(data.documents[0].continuations)))


@pytest.mark.parametrize("task", TASKS)
def test_hub_files_are_pinned(task: str) -> None:
    hub = TASKS[task].hub
    assert len(hub.revision) == 40
    assert int(hub.revision, 16)
    assert hub.sha256 is None or len(bytes.fromhex(hub.sha256)) == 32


def test_a_fetched_file_is_checked_by_hash_and_by_rows(tmp_path: Path) -> None:
    file = write(tmp_path, "piqa", ROWS["piqa"])
    with pytest.raises(DataError, match="delete it and try again"):
        check_hub(TASKS["piqa"], file, HubFile("a/b", "0" * 40, "c", 1, "0" * 64))
    with pytest.raises(DataError, match="1 rows, and a/b has 2"):
        check_hub(TASKS["piqa"], file, HubFile("a/b", "0" * 40, "c", 2, None))
    data = check_hub(TASKS["piqa"], file, HubFile("a/b", "0" * 40, "c", 1, None))
    assert data.source == f"a/b@{'0' * 40}/c"
    assert data.note == "the hub's hash of this file is not at hand, so only its rows were counted"


def test_a_file_in_the_hub_s_cache_is_checked_by_the_hash_it_is_kept_under(tmp_path: Path) -> None:
    content = write(tmp_path, "copa", ROWS["copa"]).read_bytes()
    for name, whole in ((hashlib.sha256(content).hexdigest(), True), ("0" * 64, False)):
        (tmp_path / name).write_bytes(content)
        link = tmp_path / f"{name}.jsonl"
        link.symlink_to(tmp_path / name)
        pinned = HubFile("a/b", "0" * 40, "c", 1, None)
        if whole:
            data = check_hub(TASKS["copa"], link, pinned)
            assert (len(data.documents), data.note) == (1, "")
        else:
            with pytest.raises(DataError, match="delete it and try again"):
                check_hub(TASKS["copa"], link, pinned)


# where data comes from


def test_a_folder_s_usual_names_are_found(tmp_path: Path) -> None:
    for task, name in {"lambada": "lambada_test.jsonl", "hellaswag": "hellaswag_val.jsonl", "winogrande": "dev.jsonl",
                       "copa": "val.jsonl", "rte": "dev.tsv", "piqa": "valid.jsonl", "arc_easy": "ARC-Easy-Test.jsonl",
                       "arc_challenge": "test-00000-of-00001.jsonl"}.items():  # fmt: skip
        folder = tmp_path if name.startswith(task) else tmp_path / task.upper().replace("_", "-")
        folder.mkdir(exist_ok=True)
        if name.endswith("tsv"):
            (folder / name).write_text("sentence1\tsentence2\tlabel\nA.\tB.\tentailment\n")
        else:
            write(folder, task, ROWS[task], name=name)
            if task != "lambada":
                write(folder, task, "{}", name=re.sub("val|dev|test|Test", "train", name))
    write(tmp_path / "PIQA", "piqa", "1", name="valid-labels.lst")
    assert [data.task.name for data in load_tasks((), [str(tmp_path)])] == list(TASKS)


def test_a_named_file_goes_before_the_folder_and_two_candidates_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "rte", ROWS["rte"], name="rte_val.jsonl")
    write(tmp_path, "rte", ROWS["rte"], name="rte_dev.jsonl")
    with pytest.raises(DataError, match=r"rte could be .*rte_dev.jsonl or .*rte_val.jsonl"):
        load_tasks(["rte"], [str(tmp_path)])
    (data,) = load_tasks(["rte"], [str(tmp_path), f"rte={tmp_path}/rte_dev.jsonl"])
    assert data.source.endswith("rte_dev.jsonl")
    (data,) = load_tasks(["rte"], [str(tmp_path), "sample"])
    assert data.source == "sample"


def test_a_task_s_name_is_a_word_of_the_path(tmp_path: Path) -> None:
    for folder, name in (("artemis", "val.jsonl"), ("rte", "interval.jsonl"), ("physicaliqa-train-dev", "dev.jsonl")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "piqa", ROWS["piqa"], name=name)
    assert [(data.task.name, Path(data.source).parent.name) for data in load_tasks((), [str(tmp_path)])] == [
        ("piqa", "physicaliqa-train-dev")
    ]


def test_real_rows_are_read() -> None:
    if REAL is None:
        pytest.skip("REFMAMBA_TASK_DATA names no folder of real rows")
    assert {"lambada", "hellaswag", "piqa", "winogrande", "rte", "copa"} <= {data.task.name for data in load_tasks((), [REAL])}


# what is wrong, with file and line


def without(task: str, field: str) -> dict[str, Any]:
    return {k: v for k, v in ROWS[task].items() if k != field}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("piqa", [ROWS["piqa"], without("piqa", "sol2")], r"piqa.jsonl:2: no field 'sol2' \(it has goal, sol1, label\)"),
        ("piqa", [ROWS["copa"]], r"piqa.jsonl:1: no field 'sol1'.*another task's file"),
        ("piqa", [ROWS["piqa"] | {"label": 2}], "piqa.jsonl:1: label 'label' is 2; it must be one of 0, 1"),
        ("piqa", [ROWS["piqa"] | {"label": True}], "piqa.jsonl:1: label 'label' is True"),
        ("hellaswag", [ROWS["hellaswag"] | {"label": ""}], "hellaswag.jsonl:1: label 'label' is ''"),
        ("hellaswag", [ROWS["hellaswag"] | {"endings": ["a", "b"]}], "'endings' is .*a list of 4 texts"),
        ("winogrande", [ROWS["winogrande"] | {"sentence": "No gap."}], "winogrande.jsonl:1: field 'sentence' has no '_'"),
        ("winogrande", [ROWS["winogrande"] | {"answer": 0}], "label 'answer' is 0; it must be one of 1, 2"),
        ("rte", [ROWS["rte"] | {"label": -1}], "rte.jsonl:1: label 'label' is -1"),
        ("copa", [ROWS["copa"] | {"question": "why"}], "'question' is 'why'; it must be cause or effect"),
        ("copa", [ROWS["copa"] | {"choice1": ""}], "copa.jsonl:1: field 'choice1' is empty"),
        ("arc_easy", [ROWS["arc_easy"] | {"answerKey": "B"}], "label 'answerKey' is 'B'; it must be one of 1, 2, 3"),
        ("arc_easy", [ROWS["arc_easy"] | {"choices": {"text": ["a", "b"], "label": ["A", "B"]}}], "a list of 3 to 5 texts"),
        ("arc_easy", [ROWS["arc_easy"] | {"choices": {"text": list("abcd"), "label": list("AAB")}}], "4 answers with 2 labels"),
        ("arc_easy", [ROWS["arc_easy"] | {"choices": []}], r"field 'choices' is \[\]; it must be an object"),
        ("arc_challenge", [{"question": {"stem": "Why?"}}], "jsonl:1, question: no field 'choices'"),
        ("arc_challenge", [{"question": {"stem": "Why?", "choices": ["a"]}}], "must be a list of objects"),
        ("lambada", [{"text": 7}], "lambada.jsonl:1: field 'text' is 7; it must be a text"),
        ("lambada", [ROWS["lambada"], '{"text": "a b'], "lambada.jsonl:2: not JSON at column 10"),
        ("lambada", ["[1]"], "lambada.jsonl:1: not a JSON object"),
        ("lambada", [ROWS["lambada"], r'{"text": "a \ud83d b"}'], "lambada.jsonl:2: half of a surrogate pair"),
        ("lambada", ["[" * 100_000], "lambada.jsonl:1: brackets stand more than 64 deep"),
        ("lambada", ['{"text": ' + "1" * 5000 + "}"], r"lambada.jsonl:1: the number 1+\.\.\.1+ has more than 19 digits"),
        ("lambada", [ROWS["lambada"], "", ROWS["lambada"]], "lambada.jsonl:2: the line is empty"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_place(task: str, rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, FileError), match=message) as error:
        load_file(TASKS[task], write(tmp_path, task, *rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lambada.jsonl", b"", "lambada.jsonl: the file is empty"),
        ("lambada.jsonl", b'{"text": "a b"}\n{"text": "caf\xe9 b"}\n', "lambada.jsonl:2: byte 0xe9 is not UTF-8"),
        ("lambada.jsonl", '{"text": "a b"}'.encode("utf-16"), "lambada.jsonl:1: byte 0xff is not UTF-8"),
        ("lambada.csv", b"text\na b\n", "unknown format '.csv'"),
        ("lambada.tsv", b"text\n", "lambada.tsv: there are no rows in it"),
        ("lambada.tsv", b"text\tlabel\na b\n", "lambada.tsv:2: 1 fields, and the first line names 2"),
        ("lambada.xml", b"<a>\n<b>\n</a>", "lambada.xml:3: broken XML: mismatched tag"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, FileError), match=message):
        load_file(TASKS["lambada"], tmp_path / name)


def test_a_broken_parquet_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet") as error:
        load_file(TASKS["lambada"], tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_labels_that_do_not_fit_the_rows(tmp_path: Path) -> None:
    row = without("piqa", "label")
    file = write(tmp_path, "piqa", row, row, name="valid.jsonl")
    with pytest.raises(DataError, match=r"valid.jsonl:1: no field 'label', and no valid-labels.lst beside the file"):
        load_file(TASKS["piqa"], file)
    write(tmp_path, "piqa", "0", name="valid-labels.lst")
    with pytest.raises(DataError, match=r"valid-labels.lst:2: 1 labels for the 2 rows"):
        load_file(TASKS["piqa"], file)
    write(tmp_path, "piqa", "0", "5", name="valid-labels.lst")
    with pytest.raises(DataError, match=r"valid.jsonl:2 \(label in valid-labels.lst\): label 'label' is '5'"):
        load_file(TASKS["piqa"], file)


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["squad"], [], "unknown task 'squad'; there are lambada, hellaswag"),
        ([], ["squad=x.jsonl"], "unknown task 'squad'"),
        (["rte"], ["nowhere"], "--data nowhere: no such folder"),
        (["rte"], ["nowhere", "sample"], "--data nowhere: no such folder"),
        (["rte"], ["rte={tmp}"], "is a folder; give the file"),
        (["rte"], ["{tmp}/a=b"], "unknown task"),
        (["rte"], ["rte=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["rte"], ["{tmp}"], "no data for rte in .*add --data rte=FILE"),
        ([], ["{tmp}"], "no task's data in"),
    ],
)
def test_data_that_is_not_there(names: list[str], data: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RefmambaError, match=message):
        load_tasks(names, [word.format(tmp=tmp_path) for word in data])


def test_a_folder_of_any_name_and_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a=b" / "piqa"
    folder.mkdir(parents=True)
    write(folder, "piqa", ROWS["piqa"], name="valid.JSONL")
    assert [data.task.name for data in load_tasks((), [str(tmp_path / "a=b")])] == ["piqa"]
    monkeypatch.chdir(folder)
    assert [data.task.name for data in load_tasks((), ["."])] == ["piqa"]


def test_empty_lines_at_the_end_of_a_file_are_none_of_its_rows(tmp_path: Path) -> None:
    assert len(load_file(TASKS["rte"], write(tmp_path, "rte", ROWS["rte"], "", "\r")).documents) == 1
