"""Groups with whole steps, rotation, outliers a token, flattened codes: each against its definition."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import RandomSource, assert_bits

from refmamba.backend import load_backend
from refmamba.errors import NonFiniteError, SchemeError
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.hub import resolve_model
from refmamba.formats.quantized import save_quantized
from refmamba.spec.calibrate import calibrate
from refmamba.spec.coders import INPUT_CODERS
from refmamba.spec.codes import Codes, code_flattened, code_grouped
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import NAMED, parse_scheme, scheme_from_json
from refmamba.spec.transforms import hadamard_block, rotate, rotated

TOKENS = np.arange(9)
FILES = resolve_model("small")  # whose tokenizer is saved beside
NEW = ("int4", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8")


def test_a_group_by_hand() -> None:
    """A = 126, so scale 1. The group 126, 63: the step 18 gives 126 and 72, off by 0 and 9, in squares 81; 17 gives 119 and 68,
    74; 16 gives 112 and 64, 197. The group 7, -1 has the step 1."""
    codes = code_grouped(np.array([[126, 63, 7, -1]], np.float32), 4, 2, "w")
    assert codes.scale.tolist() == [[1.0]]
    assert codes.steps is not None
    assert codes.steps.tolist() == [[17, 1]]
    assert codes.q.tolist() == [[7, 4, 7, -1]]


def squared_error(scaled: list[Fraction], step: int, largest: int) -> Fraction:
    """The exact squared error of a group with a step."""
    total = Fraction(0)
    for t in scaled:
        q = max(-largest, min(largest, round(t / step)))  # Fraction rounds half to even
        total += (t - q * step) ** 2
    return total


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 64])
def test_the_step_has_the_least_squared_error(bits: int, group: int) -> None:
    """In rational arithmetic, over the six steps that are tried; 40 columns, so that the last group is shorter."""
    rng = np.random.default_rng([bits, group])
    w = (rng.standard_normal((12, 40)) * rng.choice([0.01, 1, 30], (12, 1))).astype(np.float32)
    codes, largest = code_grouped(w, bits, group, "w"), 2 ** (bits - 1) - 1
    assert codes.steps is not None
    for row in range(12):
        scale = Fraction(float(np.float32(126) / np.abs(w[row]).max()))
        assert float(scale) == codes.scale[row, 0]
        for g in range(-(-40 // group)):
            scaled = [Fraction(float(v)) * scale for v in w[row, g * group : (g + 1) * group]]
            top = min(126 // largest, max(1, math.ceil(max(map(abs, scaled)) / largest)))
            tried = {step: squared_error(scaled, step, largest) for step in range(top, max(0, top - 6), -1)}
            step = int(codes.steps[row, g])
            assert tried[step] <= min(tried.values()) * (1 + Fraction(1, 10**12))
            expected = [max(-largest, min(largest, round(t / step))) for t in scaled]
            assert codes.q[row, g * group : (g + 1) * group].tolist() == expected
    assert np.abs(codes.integers()).max() <= 126


def test_equal_errors_take_the_larger_step() -> None:
    """Scale 1 from the first column. Of 15 and 2 the step 3 makes 15 and 3, the step 2 makes 14 and 2: both are off by 1."""
    codes = code_grouped(np.array([[126] + [0] * 15 + [15, 2] + [0] * 14], np.float32), 4, 16, "w")
    assert codes.steps is not None
    assert codes.steps.tolist() == [[18, 3]]
    assert codes.q[0, 16:18].tolist() == [5, 1]


def test_rows_of_zeros_and_of_nothing_finite() -> None:
    codes = code_grouped(np.array([[0, 0], [1e-35, -1e-36]], np.float32), 4, 16, "w")
    assert codes.q.tolist() == [[0, 0], [0, 0]]
    assert codes.scale.tolist() == [[1.0], [1.0]]
    assert codes.steps is not None
    assert codes.steps.tolist() == [[1], [1]]
    with pytest.raises(NonFiniteError, match="w: "):
        code_grouped(np.array([[np.nan, 1]], np.float32), 4, 16, "w")


@pytest.mark.parametrize(("channels", "block"), [(1536, 512), (2048, 2048), (3072, 1024), (5120, 1024), (7, 1), (48, 16)])
def test_the_rotation_is_hadamard_s_matrix_in_blocks(channels: int, block: int) -> None:
    """H by its definition, (-1)^popcount(i & j), on whole numbers, which stay exact."""
    assert hadamard_block(channels) == block
    i = np.arange(block)
    H = (-1.0) ** np.array([[bin(a & b).count("1") for b in i] for a in i])
    x = np.random.default_rng(0).integers(-1000, 1000, (3, channels)).astype(np.float32)
    expected = (x.reshape(3, -1, block).astype(np.float64) @ H).reshape(3, channels)
    assert_bits(expected.astype(np.float32), rotate(x, "x"))


def test_a_rotated_matrix_undoes_the_rotation(tiny: RandomSource) -> None:
    w = tiny.read("layers.0.in_proj.weight")
    turned = rotated(tiny, ("in_proj",)).read("layers.0.in_proj.weight")
    assert turned.shape == w.shape
    x = np.random.default_rng(1).standard_normal((4, w.shape[1])).astype(np.float32)
    exact = x.astype(np.float64) @ w.T
    assert np.allclose(rotate(x, "x").astype(np.float64) @ turned.T, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert_bits(tiny.read("layers.0.out_proj.weight"), rotated(tiny, ("in_proj",)).read("layers.0.out_proj.weight"))


def test_outliers_are_apart_in_each_token() -> None:
    x = np.array([[1, -6, 5.9], [0.5, 0.25, -1]], np.float32)
    (below, outliers) = [
        operation(*arguments) for operation, arguments in INPUT_CODERS["per_token_outliers"](8, 6.0).calls(x, "x")
    ]
    assert below.q.tolist() == [[22, 0, 127], [64, 32, -127]]  # 127/5.9 = 21.5...; 63.5 and 31.75 to even and nearest
    assert (outliers.q * 2.0 ** -outliers.exponent[:, None]).tolist() == [[0, -6, 0], [0, 0, 0]]


def test_flattened_codes_are_not_held_at_the_largest() -> None:
    codes = code_flattened(np.array([[2, -1, 0.5, 1e30]], np.float32), np.array(1, np.float32), 8, "x")
    assert codes.q.tolist() == [[254, -127, 64, 2**30]]
    assert codes.q.dtype == np.int32
    assert code_flattened(np.ones((1, 2), np.float32), np.array(1e-35, np.float32), 8, "x").q.tolist() == [[0, 0]]


@pytest.mark.parametrize("scheme", NEW)
def test_torch_gives_the_reference_s_bits(scheme: str, tiny: RandomSource) -> None:
    pytest.importorskip("torch")
    model = quantize_model(tiny, parse_scheme(scheme), calibrate(tiny, TOKENS))
    runners = Mamba(model), load_backend("torch").load(model)
    (expected, state), (found, after) = (runner.prefill([TOKENS, TOKENS[:4]], logits="all") for runner in runners)
    for x, y in zip(expected, found, strict=True):
        assert_bits(x, y)
    for x, y in zip(state.arrays(), after.arrays(), strict=True):
        assert_bits(x, y)


@pytest.mark.parametrize("scheme", NEW)
def test_steps_and_prefill_agree(scheme: str, tiny: RandomSource) -> None:
    runner = Mamba(quantize_model(tiny, parse_scheme(scheme), calibrate(tiny, TOKENS)))
    (whole,), _ = runner.prefill([TOKENS], logits="all")
    state = runner.initial_state(1)
    for row, token in zip(whole, TOKENS, strict=True):
        logits, state = runner.step(np.array([token]), state)
        assert_bits(row[None], logits)


@pytest.mark.parametrize("scheme", NEW)
def test_a_saved_folder_gives_the_same_bits(scheme: str, tiny: RandomSource, tmp_path: Path) -> None:
    model = quantize_model(tiny, parse_scheme(scheme), calibrate(tiny, TOKENS))
    save_quantized(model, tmp_path / "q", FILES)
    opened = open_checkpoint(tmp_path / "q")
    assert isinstance(opened, QuantizedModel)
    assert opened.scheme == model.scheme
    (expected,), _ = Mamba(model).prefill([TOKENS])
    (found,), _ = Mamba(opened).prefill([TOKENS])
    assert_bits(expected, found)


def test_weights_of_four_bits_are_packed_with_their_steps(tiny: RandomSource, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save_quantized(quantize_model(tiny, parse_scheme("int4-all")), tmp_path / "q", FILES)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    rows, columns = tiny.config.shapes()["layers.0.in_proj.weight"]
    assert tensors["layers.0.in_proj.weight.q"].shape == (rows, (columns + 1) // 2)
    assert tensors["layers.0.in_proj.weight.steps"].shape == (rows, 1)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_scheme_survives_json(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme_from_json(scheme.to_json()) == scheme


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bits": 5, "scale": "grouped"}, "has 5 bits; weights take 2 to 4"),
        ({"bits": 4, "scale": "grouped", "group": 48}, "has the group 48; it is a power of two from 16 to 256"),
        ({"bits": 8, "scale": "per_channel", "group": 64}, "has the option group, which per_channel does not take"),
    ],
)
def test_what_a_scheme_file_cannot_say_is_named(entry: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme_from_json({"name": "file", "weights": {"in_proj.weight": entry}})


def test_groups_are_for_matrices() -> None:
    with pytest.raises(SchemeError, match=r"conv1d.weight is no matrix of a product; grouped is for those"):
        scheme_from_json({"name": "file", "weights": {"conv1d.weight": {"bits": 4, "scale": "grouped"}}})


def test_flattened_inputs_need_codes_for_the_weight() -> None:
    """31 by 23 bits are more than a product of float64 holds."""
    values = {"name": "file", "inputs": {"out_proj": {"bits": 8, "scale": "flattened"}}}
    with pytest.raises(SchemeError, match="out_proj is flattened, for which its weight must be in codes"):
        scheme_from_json(values)
    weights = {"out_proj.weight": {"bits": 8, "scale": "per_channel"}}
    assert scheme_from_json(values | {"weights": weights}).calibrated == {"out_proj"}


def test_a_site_is_smoothed_or_rotated() -> None:
    values = parse_scheme("int8-smooth").to_json() | {"rotate": ["in_proj"]}
    with pytest.raises(SchemeError, match="in_proj is smoothed and rotated; choose one"):
        scheme_from_json(values)


def test_a_group_of_another_size_is_a_scheme_file(tiny: RandomSource) -> None:
    scheme = scheme_from_json({"name": "file", "weights": {"in_proj.weight": {"bits": 3, "scale": "grouped", "group": 16}}})
    weight = Mamba(quantize_model(tiny, scheme)).linear["layers.0.in_proj"].weight
    assert isinstance(weight, Codes)
    assert weight.steps is not None
    assert weight.steps.shape == (96, 2)
    assert np.abs(weight.q).max() == 3


def test_the_percentile_cuts_the_maxima(tiny: RandomSource) -> None:
    """The smallest magnitude that is not below so many of the site's, over tokens and channels."""
    whole, cut = calibrate(tiny, TOKENS), calibrate(tiny, TOKENS, 0.9)
    for site, maxima in whole.items():
        limit = cut[site].max()
        assert_bits(np.minimum(maxima, limit), cut[site], site)
        assert limit < maxima.max()
