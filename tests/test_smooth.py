"""SmoothQuant: factors worked out by hand, the same function before quantization, and planted outliers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import assert_bits

from refmamba.backend import load_backend
from refmamba.commands.main import refmamba
from refmamba.errors import SchemeError
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.hub import resolve_model
from refmamba.formats.tokenizer import Tokenizer, load_tokenizer
from refmamba.paper.planted import Planted
from refmamba.paper.smoothing import search
from refmamba.run.perplexity import perplexity
from refmamba.spec.arith import F32Array
from refmamba.spec.calibrate import calibrate, passage
from refmamba.spec.config import ParameterSource
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS, Quantizer, Scheme, parse_scheme, scheme_from_json
from refmamba.spec.transforms import exponents, smoothed

TOKENS = np.random.default_rng(0).integers(0, 50, 40)
TEXT = """Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down the whole
particulars about Treasure Island, from the beginning to the end, keeping nothing back but the bearings of the island,
and that only because there is still treasure not yet lifted, I take up my pen in the year of grace 17--, and go back
to the time when my father kept the Admiral Benbow inn, and the brown old seaman with the sabre cut first took up his
lodging under our roof.
"""


@pytest.mark.parametrize(
    ("alpha", "activation", "weight", "k"),
    [
        (0.5, 16, 1, 2),  # sqrt(16 / 1) = 4
        (0.5, 16, 4, 1),
        (0.5, 1, 16, -2),
        (0.5, 1.96, 1, 0),  # 1.40 is nearer to 1 than to 2, on the scale of logarithms: below sqrt(2)
        (0.5, 2.0164, 1, 1),  # 1.42
        (1.0, 8, 1024, 3),
        (0.0, 1024, 8, -3),
        (0.75, 16, 1, 3),
        (0.5, 0, 4, 0),
        (0.5, 4, 0, 0),
    ],
)
def test_exponents_by_hand(alpha: float, activation: float, weight: float, k: int) -> None:
    assert exponents(np.array([activation], np.float32), np.array([weight], np.float32), alpha).tolist() == [k]


def smoothed_fp32(source: ParameterSource, alpha: Mapping[str, float]) -> QuantizedModel:
    rest, _, inner = smoothed(source, calibrate(source, TOKENS), alpha)
    model = quantize_model(rest, parse_scheme("fp32"))
    return replace(model, params={**model.params, **inner})


@pytest.mark.parametrize("alpha", [dict.fromkeys(LINEAR_LAYERS, 0.5), dict.fromkeys(LINEAR_LAYERS, 0.9),
                                   *({layer: 0.5} for layer in LINEAR_LAYERS)])  # fmt: skip
def test_smoothing_leaves_the_function(tiny: ParameterSource, alpha: dict[str, float]) -> None:
    plain, smooth = quantize_model(tiny, parse_scheme("fp32")), smoothed_fp32(tiny, alpha)
    changed = [name for name in plain.params if not np.array_equal(read(plain, name), read(smooth, name))]
    assert changed, "no factor but 1: the test shows nothing"
    (before,), _ = Mamba(plain).prefill([TOKENS], logits="all")
    (after,), _ = Mamba(smooth).prefill([TOKENS], logits="all")
    np.testing.assert_allclose(after, before, atol=2e-6 * float(np.abs(before).max()))


def read(model: QuantizedModel, name: str) -> F32Array:
    param = model.params[name]
    return param if isinstance(param, np.ndarray) else param.q.astype(np.float32)


@pytest.fixture(scope="module")
def small() -> tuple[ParameterSource, Tokenizer]:
    files = resolve_model("small")
    source = open_checkpoint(files.folder)
    assert not isinstance(source, QuantizedModel)
    return source, load_tokenizer(files, source.config)


def bits_per_byte(source: ParameterSource, tokenizer: Tokenizer, scheme: str, calibration: Mapping[str, F32Array]) -> float:
    runner = load_backend("cpu").load(quantize_model(source, parse_scheme(scheme), calibration))
    tokens = np.concatenate([tokenizer.encode_array(""), tokenizer.encode_array(TEXT)])
    return perplexity(runner, tokens, len(TEXT)).bits_per_byte


def test_planted_outliers_break_static_int8_and_smoothing_recovers(small: tuple[ParameterSource, Tokenizer]) -> None:
    source, tokenizer = small
    calibration = calibrate(source, tokenizer.encode_array(passage()))
    schemes = ("fp32", "int8-static", "int8-smooth")
    before = {scheme: bits_per_byte(source, tokenizer, scheme, calibration) for scheme in schemes}
    planted = Planted(source, "in_proj", 7)
    calibration = calibrate(planted, tokenizer.encode_array(passage()))
    after = {scheme: bits_per_byte(planted, tokenizer, scheme, calibration) for scheme in schemes}
    assert after["fp32"] == pytest.approx(before["fp32"], abs=1e-5)
    assert before["int8-static"] < before["fp32"] + 0.05
    assert after["int8-static"] > before["fp32"] + 0.15
    assert after["int8-smooth"] < before["fp32"] + 0.05


def test_smoothing_recovers_from_any_factor(small: tuple[ParameterSource, Tokenizer]) -> None:
    """Calibration's own forward must survive the planted channel, so no weight of it may share its scale."""
    source, tokenizer = small
    planted = Planted(source, "in_proj", 12)
    calibration = calibrate(planted, tokenizer.encode_array(passage()))
    before = bits_per_byte(planted, tokenizer, "fp32", {})
    assert bits_per_byte(planted, tokenizer, "int8-static", calibration) > before + 1
    assert bits_per_byte(planted, tokenizer, "int8-smooth", calibration) < before + 0.05


def test_calibration_sees_the_inputs_of_a_forward_with_weights_in_codes(tiny: ParameterSource) -> None:
    """Eq. (27): the weights of int8, the activations as they are."""
    weights = ("embedding", "lm_head", *LINEAR_LAYERS)
    coded = Scheme("by hand", {f"{name}.weight": Quantizer(8, "per_channel") for name in weights})
    seen: dict[str, F32Array] = {}
    Mamba(quantize_model(tiny, coded)).prefill([TOKENS], logits="all", hook=lambda name, x: seen.__setitem__(name, x))
    found = calibrate(tiny, TOKENS)
    layers = {f"layers.{i}.{layer}" for i in range(2) for layer in LINEAR_LAYERS}
    assert set(found) == layers | {f"{layer}.rotated" for layer in layers} | {"lm_head"}
    for site in (*layers, "lm_head"):
        assert_bits(np.abs(seen[f"{site}.in"]).max(axis=0), found[site], site)


def test_smoothing_undoes_a_planted_power_of_two_exactly(tiny: ParameterSource) -> None:
    """s of the planted channel is 2^shift times what it was, for every alpha: the same bits come out."""
    calibration = calibrate(tiny, TOKENS)
    planted = {site: m.copy() for site, m in calibration.items()}
    for site, m in planted.items():
        if site.endswith("in_proj"):
            m[5] *= 2**7
    scheme = parse_scheme("int8-smooth")
    logits = [
        Mamba(quantize_model(source, scheme, absmax)).prefill([TOKENS], logits="all")[0][0]
        for source, absmax in ((tiny, calibration), (Planted(tiny, "in_proj", 7), planted))
    ]
    assert_bits(logits[0], logits[1])


def test_a_scheme_file_chooses_alpha_and_layers() -> None:
    values = parse_scheme("int8-smooth").to_json() | {"name": "mine", "smooth": {"in_proj": 0.8}}
    scheme = scheme_from_json(values)
    assert scheme.smooth == {"in_proj": 0.8}
    assert "in_proj" in scheme.table()
    assert "alpha 0.8" in scheme.table()


@pytest.mark.parametrize(
    ("smooth", "message"),
    [({"lm_head": 0.5}, "no site 'lm_head'"), ({"in_proj": 1.5}, "alpha 1.5"), ({"in_proj": True}, "alpha True"),
     ({"out_proj": 0.5}, "static scale on the input of out_proj")],
)  # fmt: skip
def test_a_wrong_alpha_is_one_line(smooth: dict[str, float], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Scheme("mine", inputs={"in_proj": Quantizer(8, "static")}, smooth=smooth)


def test_search_finds_the_lowest_point_layer_by_layer() -> None:
    lowest = {"in_proj": 0.3, "x_proj": 0.5, "dt_proj": 0.5, "out_proj": 0.9}

    def bits(alphas: Mapping[str, float]) -> float:
        return sum((alphas.get(layer, 2.0) - value) ** 2 for layer, value in lowest.items())

    alike = list(search(bits, per_site=False))
    assert [set(alphas.values()) for alphas, _ in alike] == [set(), *({k / 10} for k in range(11))]
    assert min(search(bits, per_site=True), key=lambda item: item[1])[0] == lowest


def test_search_leaves_a_layer_as_it_is_where_smoothing_hurts() -> None:
    def bits(alphas: Mapping[str, float]) -> float:
        return (alphas.get("in_proj", 0.0) - 0.7) ** 2 + alphas.get("x_proj", -1.0)

    tried = list(search(bits, per_site=True))
    best = min(tried, key=lambda item: item[1])[0]
    assert best["in_proj"] == 0.7
    assert "x_proj" not in best
    assert len(tried) == 12 + 4 * 11


def test_search_writes_a_scheme_that_runs(tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "mine.json"
    text.write_text(TEXT[:200])
    done = CliRunner().invoke(refmamba, ["smooth-search", "--text", str(text), "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 13
    as_json = CliRunner().invoke(refmamba, ["smooth-search", "--text", str(text), "--json"])
    found = json.loads(as_json.stdout)
    assert len(found["tried"]) == 12
    assert found["best"] == min(found["tried"], key=lambda one: one["bits_per_byte"])
    assert json.loads(file.read_text())["smooth"] == found["best"]["alpha"]
    run = CliRunner().invoke(refmamba, ["perplexity", "--scheme", str(file), "--calibrate", str(text), "--text", str(text)])
    assert f"mine: {done.stdout.splitlines()[-1].split()[1].rstrip(':')} bits a byte" in run.stdout
