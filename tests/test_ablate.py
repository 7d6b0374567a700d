"""Ablation: zeroed columns are zeroed activations, controls are as many other channels, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from refmamba.ablate import Ablated, random_channels
from refmamba.cli import refmamba
from refmamba.errors import DataError
from refmamba.model import Mamba, ParameterSource, quantize_model
from refmamba.outliers import Report, Site
from refmamba.scheme import parse_scheme

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
    report = Report({"layers.0.in_proj": Site(np.arange(10, dtype=np.float32))}, 1.0, "channels")
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
    again = CliRunner().invoke(refmamba, words)
    assert "| in_proj | outliers |" in again.stdout
