"""Ablation: zeroed columns are zeroed activations, controls are as many other channels, and the command."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from refmamba.commands.main import refmamba
from refmamba.errors import DataError
from refmamba.eval_tasks.evaluate import score_block, score_here, subject
from refmamba.eval_tasks.load import load_sample
from refmamba.eval_tasks.results import Result, Results
from refmamba.eval_tasks.score import Score
from refmamba.eval_tasks.tasks import TASKS
from refmamba.paper.ablation import Ablated, Ablation, Row, random_channels, table, without
from refmamba.paper.outliers import Report, SiteStatistics
from refmamba.run.session import ModelChoice
from refmamba.spec.config import ParameterSource
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

TOKENS = np.random.default_rng(2).integers(0, 50, 20)


def test_zeroed_columns_are_a_zeroed_activation(tiny: ParameterSource) -> None:
    """The norm's weight zeroes channel 3 of in_proj's input; so does column 3 of in_proj's weight."""

    class Norm:
        config = tiny.config

        def read(self, name: str) -> np.ndarray:
            x = tiny.read(name).copy()
            if name == "layers.1.norm.weight":
                x[3] = 0
            return x

    fp32, channels = parse_scheme("fp32"), {"layers.1.in_proj": np.array([3])}
    logits = [
        Mamba(quantize_model(source, fp32)).prefill([TOKENS], logits="all")[0][0]
        for source in (tiny, Norm(), Ablated(tiny, channels))
    ]
    np.testing.assert_allclose(logits[2], logits[1], atol=1e-6)
    assert np.abs(logits[2] - logits[0]).max() > 1e-4


def test_other_weights_stay(tiny: ParameterSource) -> None:
    ablated = Ablated(tiny, {"layers.1.in_proj": np.array([3])})
    for name in tiny.config.shapes():
        changed = np.flatnonzero((ablated.read(name) != tiny.read(name)).reshape(-1, tiny.read(name).shape[-1]).any(axis=0))
        assert changed.tolist() == ([3] if name == "layers.1.in_proj.weight" else [])


def test_controls_are_as_many_other_channels() -> None:
    report = Report({"layers.0.in_proj": SiteStatistics(np.arange(10, dtype=np.float32))}, 1.0, "channels")
    outliers = report.channels
    assert outliers["layers.0.in_proj"].tolist() == [8, 9]  # mean 4.5, deviation 2.87
    draws = [random_channels(report, outliers, (0, draw))["layers.0.in_proj"].tolist() for draw in range(20)]
    assert all(len(set(draw)) == 2 and max(draw) < 8 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 5
    assert draws[0] == random_channels(report, outliers, (0, 0))["layers.0.in_proj"].tolist()
    many = {"layers.0.in_proj": np.arange(6)}
    with pytest.raises(DataError, match="larger --sigma"):
        random_channels(report, many, (0,))


def test_command_scores_text_and_tasks(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    words = ["ablate", "--text", str(text), "--sigma", "4", "--site", "in_proj", "--draws", "1",
             "--tasks", "copa", "--limit", "2", "--results", str(tmp_path / "results.sqlite")]  # fmt: skip
    first = CliRunner().invoke(refmamba, [*words, "--json"])
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)["rows"]
    assert [row["which"] for row in rows] == ["baseline", "outliers", "random 1"]
    assert rows[0]["channels"] == 0
    assert 0 < rows[1]["channels"] == rows[2]["channels"]
    assert len({row["bits_per_byte"] for row in rows}) == 3
    assert all(row["tasks"]["copa"]["acc"][0] in (0.0, 0.5, 1.0) for row in rows)
    assert rows[0]["loss"] == [0.0, 0.0]
    assert rows[1]["loss"][0] == rows[0]["tasks"]["copa"]["acc"][0] - rows[1]["tasks"]["copa"]["acc"][0]
    again = CliRunner().invoke(refmamba, words)
    assert "| in_proj | outliers |" in again.stdout


def test_the_loss_is_paired(tmp_path: Path) -> None:
    """Right before and after, right before only, wrong before and after, right after only, right before only: the lost
    ones are 0, 1, 0, -1, 1, their mean 0.2, their error sqrt(2.8 / 4) / sqrt(5)."""
    choice = ModelChoice("small", "fp32")
    base, data = subject(choice, 2048), load_sample(TASKS["copa"])
    less = without(base, {"layers.0.in_proj": np.array([3, 5])})
    right, wrong = ([Score(-1.0, False), Score(-2.0, False)], [Score(-2.0, False), Score(-1.0, False)])

    def results(correct: str) -> list[Result]:
        of = zip(correct, data.documents, strict=False)
        return [Result(i, tuple(right if (c == "y") == (d.gold == 0) else wrong)) for i, (c, d) in enumerate(of)]

    with Results(tmp_path / "r.sqlite") as store:
        store.save(base.key(data), results("yynny"))
        store.save(less.key(data), results("ynnyn"))
        ablation = Ablation(base, "Call me Ishmael.", [data], 5, store, score_here)
        row = ablation.row("in_proj", "outliers", {"layers.0.in_proj": np.array([3, 5])})
    assert row.loss is not None
    assert row.loss == pytest.approx((0.2, math.sqrt(2.8 / 4) / math.sqrt(5)))
    assert "-20.00 ± 37.42" in table([ablation_baseline(row), row])


def ablation_baseline(row: Row) -> Row:
    return replace(row, site="none", which="baseline", channels=0, loss=(0.0, 0.0))


def test_nothing_zeroed_is_the_model_itself_and_anything_has_a_name_of_its_own() -> None:
    base, data = subject(ModelChoice("small", "fp32"), 2048), load_sample(TASKS["copa"])
    assert without(base, {}) is base
    assert without(base, {"layers.0.in_proj": np.array([], np.int64)}) is base
    one, other = (without(base, {"layers.0.in_proj": np.array([c])}) for c in (3, 5))
    assert len({who.key(data) for who in (base, one, other)}) == 3


def test_other_processes_zero_the_same_channels() -> None:
    """A worker of a cluster gets the job alone, pickled."""
    base = subject(ModelChoice("small", "fp32"), 2048)
    less = without(base, {"layers.0.in_proj": np.arange(100)})
    document = load_sample(TASKS["copa"]).documents[0]
    sent = pickle.loads(pickle.dumps(less.job))
    (here,), (before,) = (score_block(job, [(0, document)]) for job in (sent, base.job))
    assert here.scores != before.scores
