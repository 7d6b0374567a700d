"""Outlier channels: the definition by hand, what the hook saw, and the command."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import assert_bits

from refmamba.commands.main import refmamba
from refmamba.errors import DataError
from refmamba.paper.outliers import Report, SiteStatistics, observe
from refmamba.paper.plots import plot
from refmamba.spec.calibrate import WEIGHTS_ONLY
from refmamba.spec.config import ParameterSource
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS, parse_scheme

TOKENS = np.random.default_rng(1).integers(0, 50, 30)


def site(maxima: list[float]) -> SiteStatistics:
    return SiteStatistics(np.array(maxima, np.float32))


def test_threshold_by_hand() -> None:
    """Maxima 1 nine times and 11: mean 2, deviation 3 (population)."""
    one = site([1.0] * 9 + [11.0])
    assert one.threshold(2.5) == 9.5
    assert one.outliers(2.5).tolist() == [9]
    assert one.threshold(3.0) == 11.0
    assert one.outliers(3.0).tolist() == []  # beyond, not at


def test_no_channel_of_few_is_beyond_six_deviations() -> None:
    assert site([1.0] * 36 + [1e6]).outliers(6.0).tolist() == []  # K = 37: sqrt(36) = 6
    assert site([1.0] * 37 + [1e6]).outliers(6.0).tolist() == [37]


def test_values_are_taken_over_channels_and_tokens() -> None:
    """1, -1, 1, -1 and 5, -5: mean 0, mean square 9, so the band of one deviation is +-3."""
    one = site([0.0, 0.0])
    one.add(np.array([[1, 5], [-1, -5]], np.float32))
    one.add(np.array([[1, 1], [-1, -1]], np.float32))
    assert one.threshold(1.0, "values") == pytest.approx(np.sqrt((2 * 25 + 6) / 8))
    assert one.outliers(1.0, "values").tolist() == [1]
    assert one.maxima.tolist() == [1.0, 5.0]


def test_observe_sees_the_inputs_of_the_forward(tiny: ParameterSource) -> None:
    model = quantize_model(tiny, parse_scheme("fp32"))
    inputs: dict[str, np.ndarray] = {}
    Mamba(model).prefill([TOKENS], hook=lambda name, value: inputs.__setitem__(name, value))
    sites = observe(Mamba(model), TOKENS)
    assert list(sites) == [f"layers.{i}.{p}" for i in range(2) for p in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    assert_bits(np.abs(inputs["layers.1.norm"]).max(axis=0), sites["layers.1.in_proj"].maxima)
    assert_bits(np.abs(inputs["layers.0.u"]).max(axis=0), sites["layers.0.x_proj"].maxima)
    assert_bits(np.abs(inputs["layers.1.gate"]).max(axis=0), sites["layers.1.out_proj"].maxima)


def test_recurring_channels() -> None:
    flat, high = [1.0] * 50, [1.0] * 49 + [100.0]
    report = Report({"layers.0.in_proj": site(high), "layers.1.in_proj": site(high), "layers.2.in_proj": site(flat),
                     "layers.0.x_proj": site(high)}, 6.0, "channels")  # fmt: skip
    assert report.recurring("in_proj") == {49: 2}
    assert report.recurring("x_proj") == {}


def test_figure_1_names_the_outliers(tmp_path: Path) -> None:
    """On a logarithmic axis: a channel of zeros is left out without a warning."""
    sites = {f"layers.{i}.{layer}": site([0.0] + [1.0] * 48 + [100.0]) for i in range(2) for layer in LINEAR_LAYERS}
    plot(Report(sites, 6.0, "channels"), "title", tmp_path / "figure1.svg")
    drawn = (tmp_path / "figure1.svg").read_text("utf-8")
    assert drawn.count("<!-- 49 -->") == len(sites)
    assert "<!-- 48 -->" not in drawn


def test_command_prints_json_and_writes_plots(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    for suffix, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        file = tmp_path / f"figure.{suffix}"
        done = CliRunner().invoke(refmamba, ["outliers", "--text", str(text), "--sigma", "3", "--plot", str(file), "--json"])
        assert done.exit_code == 0, done.output
        assert file.read_bytes().startswith(magic)
    result = json.loads(done.stdout)
    assert result["scheme"] == "fp32"
    for values in result["sites"].values():
        assert values["share"] == len(values["outliers"]) / values["channels"]
        assert (values["absmax"] > values["threshold"]) == bool(values["outliers"])


def test_a_missing_matplotlib_and_a_wrong_name_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report({}, 6.0, "channels")
    with pytest.raises(DataError, match=r"\.png or \.svg"):
        plot(report, "", tmp_path / "figure.jpg")
    imported = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"refmamba\[plot\]"):
        plot(report, "", tmp_path / "figure.png")


def test_saved_maxima_calibrate(tmp_path: Path) -> None:
    """Those of the fp32 forward; under the built-in calibration's scheme and on its text they are its own."""
    text, fp32, own = tmp_path / "text.txt", tmp_path / "fp32.json", tmp_path / "own.json"
    scheme = tmp_path / "scheme.json"
    scheme.write_text(json.dumps(WEIGHTS_ONLY.to_json()))
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    run = ["perplexity", "--text", str(text), "--scheme", "int8-smooth", "--json", "--calibrate"]
    words = ["outliers", "--text", str(text), "--scheme"]
    for name, file in (("fp32", fp32), (str(scheme), own)):
        done = CliRunner().invoke(refmamba, [*words, name, "--save-calibration", str(file)])
        assert done.exit_code == 0, done.output
        assert "lm_head" not in done.stdout
    found = [json.loads(CliRunner().invoke(refmamba, [*run, str(file)]).stdout)["bits_per_byte"] for file in (fp32, own, text)]
    assert found[1] == found[2]
    assert found[0] != found[1]
    failed = CliRunner().invoke(refmamba, ["outliers", "--save-calibration", str(text)])
    assert isinstance(failed.exception, DataError)
