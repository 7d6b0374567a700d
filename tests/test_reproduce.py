"""reproduce: the published figures stand where they belong, unknown ones stay blank, and the command in a tiny form."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from refmamba.cli import refmamba
from refmamba.eval_tasks.hellaswag import TASK as HELLASWAG
from refmamba.eval_tasks.lambada import TASK as LAMBADA
from refmamba.eval_tasks.load import load_sample
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Result
from refmamba.eval_tasks.score import Score
from refmamba.eval_tasks.winogrande import TASK as WINOGRANDE
from refmamba.reproduce import Cell, cells, characters, config_of, paper_size, parameters, table_1


@pytest.mark.parametrize(
    ("model", "size", "count"),
    [("state-spaces/mamba-130m", "130m", 129_135_360), ("state-spaces/mamba-2.8b-hf", "2.8b", 2_768_345_600)],
)
def test_sizes_of_the_papers_models_need_no_download(model: str, size: str, count: int) -> None:
    """129 M and 2.77 B, as published with the weights."""
    assert paper_size(model) == size
    assert parameters(config_of(model)) == count


def test_other_names_have_no_published_figures() -> None:
    assert paper_size("small") is None
    assert paper_size("someone/mamba-1.4b-chat") is None


def test_only_published_cells_are_filled_in() -> None:
    outcomes = []
    for task in (LAMBADA, HELLASWAG):
        data = load_sample(task)
        choices = len(data.documents[0].continuations)
        results = {i: Result(i, (Score(-1.0, True),) * choices) for i in range(2)}
        outcomes.append(Outcome(None, data, 2, results))  # type: ignore[arg-type]  # names nothing here
    baseline, w8 = (cells("state-spaces/mamba-1.4b", scheme, outcomes) for scheme in ("fp32", "w8-mlp"))
    assert {name: cell.paper for name, cell in baseline.items()} == {
        "lambada": 64.95, "hellaswag": None, "hellaswag acc_norm": 59.11, "average": None}  # fmt: skip
    assert {name: cell.paper for name, cell in w8.items()} == {
        "lambada": 64.43, "hellaswag": 44.91, "hellaswag acc_norm": None, "average": None}  # fmt: skip
    assert baseline["lambada"].difference == pytest.approx(35.05)
    for model, scheme in (("state-spaces/mamba-130m", "fp32"), ("state-spaces/mamba-1.4b", "int8")):
        assert all(cell.paper is None for cell in cells(model, scheme, outcomes).values())


def test_unknown_cells_stay_blank() -> None:
    row = {"copa": Cell(70.0, 4.6, 79.0), "average": Cell(60.0, 1.0, None)}
    rows = {"fp32": row, "int8": {name: Cell(1.0, 0.5, None) for name in row}}
    assert table_1(rows, {"fp32": 1.5, "int8": 1.6}).splitlines()[2:] == [
        "| fp32 | ours | 70.00 ± 4.60 | 60.00 ± 1.00 | 1.5000 |", "| | paper | 79.00 |  | |", "| | difference | -9.00 |  | |",
        "| int8 | ours | 1.00 ± 0.50 | 1.00 ± 0.50 | 1.6000 |",
    ]  # fmt: skip


def test_whole_sequence_schemes_run_a_context_for_each_choice() -> None:
    lambada, winogrande = load_sample(LAMBADA), load_sample(WINOGRANDE)
    assert characters([lambada], None, "w8a8-all") == characters([lambada], None, "w8-all")  # one choice
    first = winogrande.documents[0]
    assert characters([winogrande], 1, "fp32") == sum(map(len, {*first.contexts})) + sum(map(len, first.continuations))


def test_command_makes_every_table_and_figure(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    folder = tmp_path / "out"
    words = ["reproduce", str(folder), "--schemes", "fp32,w8-all", "--tasks", "copa,hellaswag", "--limit", "1", "--draws", "0",
             "--text", str(text)]  # fmt: skip
    planned = CliRunner().invoke(refmamba, [*words, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "2 x 2" in planned.stdout
    assert not folder.exists()
    done = CliRunner().invoke(refmamba, words)
    assert done.exit_code == 0, done.output
    names = {file.name for file in folder.iterdir()}
    assert names >= {"tables.md", "tables.json", "figure1-small.png", "figure1-small.svg", "figure2.png", "figure2.svg"}
    tables = json.loads((folder / "tables.json").read_text())["models"]["small"]
    assert list(tables["table_1"]["fp32"]) == ["hellaswag", "hellaswag acc_norm", "copa", "average"]
    assert all(cell["paper"] is None for row in tables["table_1"].values() for cell in row.values())
    assert "NaN" not in (folder / "tables.json").read_text()
    assert tables["bits_per_byte"]["fp32"] != tables["bits_per_byte"]["w8-all"]
