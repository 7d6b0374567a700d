"""GPTQ: codes that lose less on the inputs they were made for, in the ranges of their scheme."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import RandomSource, assert_bits

from refmamba.backend import load_backend
from refmamba.errors import DataError
from refmamba.formats.folder import open_checkpoint
from refmamba.run.rounding import gptq, inverse_factor, round_by_gptq
from refmamba.run.session import ModelChoice, quantize_folder
from refmamba.spec.codes import Codes, dequantize
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, linear_sites, quantize_model
from refmamba.spec.scheme import Scheme, parse_scheme, scheme_from_json

TOKENS = np.random.default_rng(0).integers(0, 50, 2100)
WIDE = {"name": "wide", "weights": {"in_proj.weight": {"bits": 3, "scale": "grouped", "group": 256}}}


def test_two_columns_by_hand() -> None:
    """X^T X = [[2, 1], [1, 2]] and scale 1 (absmax 7 at 4 bits): 2.4 becomes 2, and the second column takes over 0.4 / 2."""
    inputs = np.array([[2.0, 1.0], [1.0, 2.0]])
    codes = gptq(np.array([[2.4, 7.0], [0, 0]], np.float32), inputs, 4, "w")
    assert codes.scale.tolist() == [[1.0], [1.0]]
    assert codes.q.tolist() == [[2, 7], [0, 0]]
    U = inverse_factor(inputs)
    assert np.allclose(U.T @ U @ (inputs + 0.02 * np.eye(2)), np.eye(2))
    assert U[1, 0] == 0


def test_the_second_column_makes_up_for_the_first() -> None:
    """Inputs that are the same in both columns: 2.4 + 2.4 is best as 2 + 3, which rounding each by itself misses."""
    inputs = np.full((2, 2), 100.0)
    codes = gptq(np.array([[2.4, 2.4], [7, 0]], np.float32), inputs, 4, "w", per_tensor=True)
    assert codes.scale.shape == ()
    assert codes.q[0].tolist() == [2, 3]


@pytest.mark.parametrize("scheme", ["int4", "w3-mlp", "int8-hadamard", "w4-mlp"])
def test_every_layer_loses_less_on_its_inputs_than_by_rounding(scheme: str, tiny: RandomSource) -> None:
    parsed = parse_scheme(scheme)
    calibration = None
    if parsed.needs_calibration:
        from refmamba.spec.calibrate import calibrate

        calibration = calibrate(tiny, TOKENS)
    rounded = round_by_gptq(tiny, parsed, TOKENS, calibration, load_backend("cpu"))
    plain = quantize_model(tiny, parsed, calibration)
    exact = Mamba(quantize_model(tiny, Scheme("fp32")))
    inputs: dict[str, np.ndarray] = {}
    exact.prefill([TOKENS[:300]], logits="all", hook=lambda site, x: inputs.update({site: x}))
    for site in linear_sites(tiny.config)[:-1]:
        linear, original = rounded.linear(site), tiny.read(f"{site}.weight").astype(np.float64)
        x = inputs[f"{site}.in"].astype(np.float64)
        turned = x
        for transform in linear.transforms:
            operation, arguments = transform.call(inputs[f"{site}.in"], site)
            turned = operation(*arguments).astype(np.float64)
        errors = []
        for model in (rounded, plain):
            weight = model.linear(site).weight
            assert isinstance(weight, Codes)
            assert np.abs(weight.integers()).max() <= 127
            errors.append(float(np.sum((turned @ dequantize(weight).T.astype(np.float64) - x @ original.T) ** 2)))
        assert errors[0] < errors[1], site


def test_a_group_longer_than_a_block_of_columns() -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((6, 300)).astype(np.float32), rng.standard_normal((900, 300))
    codes = gptq(weight, x.T @ x, 3, "w", 256)
    assert codes.steps is not None
    assert codes.steps.shape == (6, 2)
    assert np.abs(codes.q).max() <= 3
    assert codes.steps.min() >= 1
    assert codes.steps.max() <= 42


def test_the_folder_says_so_and_gives_the_same_bits_everywhere(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old man went down to the sea and looked for his boat. " * 200, encoding="utf-8")
    quantize_folder(ModelChoice("small", "int4", calibrate=text), tmp_path / "q", rounding="gptq")
    assert json.loads((tmp_path / "q" / "config.json").read_text("utf-8"))["refmamba"]["rounding"] == "gptq"
    model = open_checkpoint(tmp_path / "q")
    assert isinstance(model, QuantizedModel)
    (expected,), _ = Mamba(model).prefill([np.arange(5)])
    (found,), _ = load_backend("cpu").load(model).prefill([np.arange(5)])
    assert_bits(expected, found)


@pytest.mark.parametrize(("scheme", "message"), [("fp32", "codes no weight"), ("int8-smooth", "smooths")])
def test_what_gptq_is_not_for_is_said(scheme: str, message: str, tiny: RandomSource) -> None:
    with pytest.raises(DataError, match=message):
        round_by_gptq(tiny, parse_scheme(scheme), TOKENS, None, load_backend("cpu"))


def test_too_short_a_text_is_said(tiny: RandomSource, capsys: pytest.CaptureFixture[str]) -> None:
    round_by_gptq(tiny, scheme_from_json(WIDE), TOKENS[:40], None, load_backend("cpu"))
    assert "GPTQ on 40 tokens is too little" in capsys.readouterr().err
