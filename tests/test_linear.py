"""A linear layer is resolved once: coders from outside the package, backends that do not know them, parts, steps, records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import RandomSource

from refmamba.backend import check_support, load_backend
from refmamba.errors import BackendError, SchemeError
from refmamba.spec.coders import INPUT_CODERS, Call, PerToken
from refmamba.spec.codes import Codes, code, dequantize, fixed_point, integer_product, rescale
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS, Quantizer, Scheme, parse_scheme

TOKENS = np.arange(9)


@dataclass(frozen=True)
class InTwoParts:
    """A stranger's coder: even channels in N-bit codes, odd ones in fixed point, each a product of its own."""

    bits: int
    whole_sequence: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def calls(self, x: Any, site: str) -> Sequence[Call]:
        """Two parts."""
        even = np.arange(x.shape[1]) % 2 == 0
        return [
            (code, (np.where(even, x, np.float32(0)), self.bits, site, "per_row")),
            (fixed_point, (np.where(even, np.float32(0), x), 30, site)),
        ]


@pytest.fixture
def in_two_parts() -> Iterator[Scheme]:
    """A scheme with that coder at the input of out_proj, while the coder is entered."""
    INPUT_CODERS["in_two_parts"] = InTwoParts
    try:
        weights = {f"{layer}.weight": Quantizer(8, "per_channel") for layer in LINEAR_LAYERS}
        yield Scheme("new", weights, {"out_proj": Quantizer(8, "in_two_parts")})
    finally:
        del INPUT_CODERS["in_two_parts"]


def test_a_coder_from_outside_runs_on_the_reference(tiny: RandomSource, in_two_parts: Scheme) -> None:
    reference = load_backend("reference")
    check_support(reference, in_two_parts)
    runner = Mamba(quantize_model(tiny, in_two_parts))
    trace = runner.trace(TOKENS)
    x, weight = (
        trace["layers.1.out_proj.in"] if "layers.1.out_proj.in" in trace.sites else trace["layers.1.gate"],
        runner.linear,
    )
    w = weight["layers.1.out_proj"].weight
    values = []
    for operation, arguments in InTwoParts(8).calls(x, "layers.1.out_proj.in"):
        part = operation(*arguments)
        values.append(rescale(integer_product(part, w), part, w))
    assert trace["layers.1.out_proj.result"].tobytes() == values[0].tobytes()
    assert trace["layers.1.out_proj.result_2"].tobytes() == values[1].tobytes()
    assert trace["layers.1.out_proj.sum"].tobytes() == (values[0] + values[1]).tobytes()
    whole, _ = runner.prefill([TOKENS], logits="all")
    steps, state = [], runner.initial_state(1)
    for token in TOKENS:
        logits, state = runner.step(np.array([token]), state)
        steps.append(logits)
    assert np.concatenate(steps).tobytes() == whole[0].tobytes()


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_a_backend_refuses_a_coder_that_it_does_not_know(name: str, tiny: RandomSource, in_two_parts: Scheme) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    backend = load_backend(name)
    message = (
        rf"backend '{name}' does not know the input scale in_two_parts of out_proj \(scheme new\); use --backend reference"
    )
    with pytest.raises(BackendError, match=message):
        check_support(backend, in_two_parts)
    with pytest.raises(BackendError, match=message):
        backend.load(quantize_model(tiny, in_two_parts))


def test_a_scale_that_nobody_knows_is_no_scheme() -> None:
    with pytest.raises(SchemeError, match="scale 'per_block'; inputs take per_tensor, per_token, static"):
        Scheme("new", {}, {"in_proj": Quantizer(8, "per_block")})


@pytest.mark.parametrize("name", ["reference", "cpu", "torch"])
def test_every_built_in_scheme_is_supported(name: str) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    backend = load_backend(name)
    for scheme in ("fp32", "w2-mlp", "w8-all", "w4a16-all", "w8a2-mlp", "int8", "int8-static", "int8-smooth"):
        assert backend.supports(parse_scheme(scheme)) is None


def test_steps_multiply_the_codes_of_their_group() -> None:
    """By hand: codes 1, -7, 3 | 2, 7 with steps 2 and 18, scale 4."""
    w = Codes(np.array([[1, -7, 3, 2, 7]], np.int8), np.array([[4]], np.float32), 4, np.array([[2, 18]], np.uint8), 3)
    assert w.integers().tolist() == [[2, -14, 6, 36, 126]]
    assert w.integers().dtype == np.int8
    assert dequantize(w).tolist() == [[0.5, -3.5, 1.5, 9.0, 31.5]]
    assert dequantize(w.rows(np.array([0, 0]))).tolist() == [[0.5, -3.5, 1.5, 9.0, 31.5]] * 2
    x = Codes(np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, -127]], np.int8), np.ones((), np.float32), 8)
    assert integer_product(x, w).tolist() == [[156.0], [-16002.0]]


@pytest.mark.parametrize("scheme", ["fp32", "w8a8-all", "int8"])
def test_the_record_has_every_operation_with_its_arguments(scheme: str, tiny: RandomSource) -> None:
    """Each recorded step, run again, gives what was recorded; the values are those that a hook sees."""
    runner = Mamba(quantize_model(tiny, parse_scheme(scheme)))
    trace = runner.trace(TOKENS)
    assert [step.sites[0] for step in trace][:2] == ["embedding", "layers.0.norm"]
    assert trace[-1].sites == ("lm_head.result",)
    for step in trace:
        if step.operation in OPERATIONS:
            again = OPERATIONS[step.operation](*step.arguments)
            for result, value in zip(
                again if isinstance(again, tuple) else (again,), dict(step.values()).values(), strict=True
            ):
                assert getattr(result, "q", result).tobytes() == getattr(value, "q", value).tobytes()
    seen: dict[str, Any] = {}
    runner.prefill([TOKENS], logits="all", hook=lambda site, value: seen.update({site: value}))
    assert set(trace.sites) <= set(seen)
    assert all(getattr(trace[site], "q", trace[site]).tobytes() == seen[site].tobytes() for site in trace.sites)


def test_a_record_is_looked_at_by_name_layer_and_operation(tiny: RandomSource) -> None:
    runner = Mamba(quantize_model(tiny, parse_scheme("int8")))
    _, state = runner.prefill([TOKENS])
    trace = runner.trace(TOKENS, state)
    step = trace.step("layers.1.ssm_state")
    assert step.operation == "selective_scan"
    assert step.sites == ("layers.1.scan", "layers.1.ssm_state")
    assert step.arguments[-1].tobytes() == state.ssm[0, 1].tobytes()  # the state that the call began with
    assert trace["layers.1.scan"].shape == (9, 48)
    assert [s.operation for s in trace.operation("rms_norm")] == ["rms_norm"] * 3
    assert all(site.startswith("layers.1.") for s in trace.layer(1) for site in s.sites)
    assert len(trace.layer(0)) == len(trace.layer(1)) == len(trace[1 : 1 + len(trace.layer(0))])
    with pytest.raises(KeyError):
        trace["layers.9.scan"]


def test_coders_are_values() -> None:
    assert PerToken(8) == PerToken(8) != PerToken(7)
