"""reproduce: the published figures stand where they belong, unknown ones stay blank, and the command in a tiny form."""

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from refmamba.backend import load_backend
from refmamba.commands.main import refmamba
from refmamba.eval_tasks import evaluate as evaluate_module
from refmamba.eval_tasks.load import load_sample
from refmamba.eval_tasks.report import Outcome
from refmamba.eval_tasks.results import Result
from refmamba.eval_tasks.score import Score
from refmamba.eval_tasks.tasks.arc import EASY as ARC_EASY
from refmamba.eval_tasks.tasks.copa import TASK as COPA
from refmamba.eval_tasks.tasks.hellaswag import TASK as HELLASWAG
from refmamba.eval_tasks.tasks.lambada import TASK as LAMBADA
from refmamba.paper import estimate
from refmamba.paper.ablation import Row
from refmamba.paper.estimate import Work, config_of, duration, parameters, plan, work_of, work_on_hub
from refmamba.paper.outliers import Report
from refmamba.paper.plots import figure_2
from refmamba.paper.published import PAPER_TASKS, paper_size
from refmamba.paper.tables import (
    Cell,
    ModelTables,
    TextRow,
    beside_successors,
    cells,
    guessing,
    paired_difference,
    planted_table,
    table_1,
    text_table,
)  # fmt: skip


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
    assert baseline["lambada"].answers == (1.0, 1.0)  # greedy, so right
    assert baseline["hellaswag acc_norm"].answers == ()  # the average is that of acc alone
    for model, scheme in (("state-spaces/mamba-130m", "fp32"), ("state-spaces/mamba-1.4b", "int8")):
        assert all(cell.paper is None for cell in cells(model, scheme, outcomes).values())


def test_unknown_cells_stay_blank() -> None:
    row = {"copa": Cell(70.0, 4.6, 79.0), "average": Cell(60.0, 1.0, None)}
    rows = {"fp32": row, "int8": {name: Cell(1.0, 0.5, None) for name in row}}
    assert table_1(rows).splitlines()[2:] == [
        "| fp32 | ours | 70.00 ± 4.60 | 60.00 ± 1.00 |",
        "| | paper | 79.00 |  |",
        "| | difference | -9.00 ± 4.60 |  |",
        "| int8 | ours | 1.00 ± 0.50 | 1.00 ± 0.50 |",
    ]


def test_the_text_s_rows_stand_over_the_first() -> None:
    rows = {"fp32": TextRow(1.5, 0.0, 3_000_000), "int4": TextRow(1.5044, 0.0123456, 515_000)}
    lines = text_table(rows).splitlines()
    assert lines[2:] == ["| fp32 | 1.5000 | +0.0000 | 0.00000 | 3.00 |", "| int4 | 1.5044 | +0.0044 | 0.01235 | 0.52 |"]
    lines = planted_table({"in_proj 2^5": rows, "out_proj 2^5": rows}).splitlines()
    assert lines[0] == "| scheme | in_proj 2^5 | out_proj 2^5 |"
    assert lines[2:] == ["| fp32 | 1.5000 | 1.5000 |", "| int4 | +0.0044, 0.0123 | +0.0044, 0.0123 |"]


def test_later_papers_stand_beside_ours_where_the_task_is_the_same() -> None:
    """Averages by hand: 60 of all six, 62 of five without LAMBADA; a row that lacks a task has none over it."""
    values = {"lambada": 50.0, "hellaswag": 1.0, "hellaswag acc_norm": 60.0, "piqa": 70.0, "arc_easy": 65.0,
              "arc_challenge": 2.0, "arc_challenge acc_norm": 35.0, "winogrande": 80.0}  # fmt: skip
    row = {name: Cell(value, 1.0, None) for name, value in values.items()}
    lines = beside_successors("mamba-1.4b", {"int8": row, "w8-all": {"lambada": row["lambada"]}}).splitlines()
    figures = "61.50 | 57.60 | 72.00 | 63.00 | 32.20 | 58.70 | 57.50 |  |"
    assert f"| W4A8, Quamba2 | Quamba2, arXiv 2503.22879, table 11 | {figures}" in lines
    assert "| W4A8, best | MambaQuant, arXiv 2501.13484, its logs |  |  |  |  |  |  |  | 55.60 |" in lines
    assert "| int8 | ours | 50.00 | 60.00 | 70.00 | 65.00 | 35.00 | 80.00 | 60.00 | 62.00 |" in lines
    assert "| w8-all | ours | 50.00 |  |  |  |  |  |  |  |" in lines
    assert beside_successors("small", {"int8": row}) == ""


def test_the_average_is_that_of_the_papers_tasks() -> None:
    outcomes = []
    for task, greedy in ((LAMBADA, True), (ARC_EASY, False)):
        data = load_sample(task)
        results = {i: Result(i, tuple(Score(-float(k), greedy) for k in range(len(data.documents[i].continuations))))
                   for i in range(2)}  # fmt: skip
        outcomes.append(Outcome(None, data, 2, results))  # type: ignore[arg-type]  # names nothing here
    row = cells("small", "fp32", outcomes)
    assert row["average"].value == row["lambada"].value == 100.0
    assert row["arc_easy"].answers == ()
    assert cells("small", "fp32", outcomes[1:])["average"].value == row["arc_easy"].value


def test_whole_sequence_schemes_run_a_context_for_each_choice() -> None:
    """COPA's first document: one context for both choices; 4 characters a token, logits of the continuations only."""
    data = load_sample(COPA)
    (context, _), choices = data.documents[0].contexts, sum(map(len, data.documents[0].continuations))
    work = work_of([data], 1)
    assert work.tokens("int8") == ((len(context) + choices) / 4, choices / 4)
    assert work.tokens("w8a8-all") == ((2 * len(context) + choices) / 4,) * 2


def test_work_of_the_published_data() -> None:
    """Document counts as lm-evaluation-harness lists them; HellaSwag's contexts run once, or four times."""
    whole = work_on_hub(PAPER_TASKS, None)
    assert whole.documents == 5153 + 10042 + 1838 + 1267 + 277 + 100
    assert work_on_hub(["copa", "lambada"], 200).documents == 300
    hellaswag = work_on_hub(["hellaswag"], None)
    assert hellaswag.repeated == pytest.approx(4 * hellaswag.shared)


def test_the_plan_of_published_models_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    models = "state-spaces/mamba-130m-hf,state-spaces/mamba-2.8b-hf"
    words = ["reproduce", str(tmp_path / "out"), "--data", "hub", "--models", models, "--schemes", "fp32,int8-hadamard",
             "--sites", "all", "--draws", "2", "--dry-run"]  # fmt: skip
    done = CliRunner().invoke(refmamba, words)
    assert done.exit_code == 0, done.output
    assert "| state-spaces/mamba-130m-hf | 129 M | 0.52 GB |" in done.stdout
    assert "22225 documents" in done.stdout  # 18677 of the paper's tasks, 2376 and 1172 of ARC's
    assert "| 3 ablations, fp32 | " in done.stdout


def test_the_time_of_a_plan_is_work_over_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and head each at a speed of its own: 36 s and 3.6 s for a token."""
    model = "state-spaces/mamba-130m"
    config = config_of(model)
    head = config.vocab_size * config.d_model
    monkeypatch.setattr(estimate, "speed", lambda scheme, backend: ((129_135_360 - head) / 36.0, head / 3.6))
    work = Work(1, shared=300, repeated=300, continuations=100)  # 100 tokens, 25 of them through the head: 1.025 h
    half = Work(1, shared=150, repeated=150, continuations=50)
    rows = {"int8": "int8", "int4, GPTQ": "int4"}
    table = plan([model], rows, work, half, 2, False, load_backend("reference")).splitlines()
    assert "| int8 | 1.0 h |" in table
    assert "| int4, GPTQ | 1.0 h |" in table
    assert "| 2 ablations, fp32 | 1.0 h |" in table
    assert "| all | 3.1 h |" in table
    assert duration(0.5) == "30 min"
    assert duration(0.01) == "36 s"


def test_the_loss_stands_beside_the_papers() -> None:
    rows = [Row("none", "baseline", 0, 1.0, {}, (0.0, 0.0)), Row("all", "outliers", 3, 1.1, {}, (0.15, 0.02))]
    report = Report({}, 6.0, "channels")
    tables = {model: ModelTables(model, 1, {}, {}, rows, report, {}) for model in ("mamba-130m", "small")}
    assert tables["mamba-130m"].loss == Cell(15.0, 2.0, 12.61)
    assert tables["small"].loss == Cell(15.0, 2.0, None)


def test_the_paired_difference_by_hand() -> None:
    """copa: 0 1 0 0, so 0.25 with the error sqrt(0.75 / 3) / 2 = 0.25; rte: -1, 0, so -0.5 with sqrt(0.5) / sqrt(2) = 0.5."""
    row = {"copa": Cell(75.0, 0.0, None, (1.0, 1.0, 0.0, 1.0)), "rte": Cell(50.0, 0.0, None, (0.0, 1.0))}
    baseline = {"copa": Cell(50.0, 0.0, None, (1.0, 0.0, 0.0, 1.0)), "rte": Cell(100.0, 0.0, None, (1.0, 1.0))}
    averages = {"average": Cell(0.0, 0.0, None)}
    difference, stderr = paired_difference(row | averages, baseline | averages)
    assert difference == pytest.approx(-12.5)
    assert stderr == pytest.approx(100 * (0.25**2 + 0.5**2) ** 0.5 / 2)


def test_figure_2_has_the_schemes_along_its_axis_and_a_mark_for_each_model(tmp_path: Path) -> None:
    row = {"copa": Cell(50.0, 0.0, None, (1.0, 0.0)), "average": Cell(50.0, 0.0, None)}
    rows = dict.fromkeys(("fp32", "w8-all", "int8"), row)
    text = {scheme: TextRow(bits, 0.0, 1) for scheme, bits in (("fp32", 1.5), ("w8-all", 1.4999), ("int8", 1.7))}
    report = Report({}, 6.0, "channels")
    models = [ModelTables(name, size, rows, text, [], report, {}) for name, size in (("large", 9), ("tiny", 4))]
    figure_2(models, 50.0, tmp_path / "figure2.svg")
    drawn = (tmp_path / "figure2.svg").read_text("utf-8")
    for label in ("w8-all", "int8", "tiny; under fp32 50.0 % are right, 1.5000 bits per byte"):
        assert f"<!-- {label} -->" in drawn
    assert drawn.index("<!-- tiny;") < drawn.index("<!-- large;")
    assert "<!-- fp32 -->" not in drawn


def test_guessing_counts_nothing_where_there_are_no_choices() -> None:
    assert guessing([load_sample(task) for task in (LAMBADA, HELLASWAG, COPA)]) == pytest.approx((0 + 25 + 50) / 3)


def test_command_makes_every_table_and_figure_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    folder, fours = tmp_path / "out", tmp_path / "fours.json"
    fours.write_text('{"name": "fours", "weights": {"dt_proj.weight": {"bits": 4, "scale": "grouped", "group": 16}}}')
    words = ["reproduce", str(folder), "--schemes", "fp32,w8-all", "--tasks", "copa,hellaswag", "--limit", "2",
             "--sites", "all", "--text", str(text), "--gptq", str(fours), "--planted", "10"]  # fmt: skip
    planned = CliRunner().invoke(refmamba, [*words, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "Time for 4 documents" in planned.stdout
    assert not folder.exists()
    done = CliRunner().invoke(refmamba, words)
    assert done.exit_code == 0, done.output
    names = {file.name for file in folder.iterdir()}
    assert names >= {"tables.md", "tables.json", "figure1-small.png", "figure1-small.svg", "figure2.png", "figure2.svg"}
    written = (folder / "tables.json").read_text()
    tables = json.loads(written)["models"]["small"]
    assert list(tables["table_1"]["fp32"]) == ["hellaswag", "hellaswag acc_norm", "copa", "average"]
    assert all(cell["paper"] is None for row in tables["table_1"].values() for cell in row.values())
    assert "NaN" not in written
    assert list(tables["text"]) == list(tables["table_1"]) == ["fp32", "w8-all", f"{fours}, GPTQ"]
    fp32, w8, gptq = tables["text"].values()
    assert fp32["divergence"] == 0 < gptq["divergence"] < w8["divergence"]
    assert fp32["bits_per_byte"] != w8["bits_per_byte"]
    assert fp32["weight_bytes"] == 3 * w8["weight_bytes"] > gptq["weight_bytes"]
    planted = tables["planted"]
    assert list(planted) == ["in_proj 2^10", "out_proj 2^10"]
    # The same function, in fixed point with 10 bits less of every other channel.
    assert planted["in_proj 2^10"]["fp32"]["bits_per_byte"] == pytest.approx(fp32["bits_per_byte"], rel=1e-4)
    for under in planted.values():  # a channel that shares its scale with all of the tensor drowns them
        assert under["w8-all"]["divergence"] > 10 * w8["divergence"]

    def nothing_is_left(*_: object) -> None:
        raise AssertionError("a document was scored again")

    (folder / "tables.json").unlink()
    monkeypatch.setattr(evaluate_module, "score_documents", nothing_is_left)
    again = CliRunner().invoke(refmamba, words)
    assert again.exit_code == 0, again.output
    assert (folder / "tables.json").read_text() == written
