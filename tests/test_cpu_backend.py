"""The CPU backend has the reference's bits: every scheme, odd sizes, batches, chunks, threads, and no VNNI."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from conftest import RandomSource, assert_bits

from refmamba.backends.cpu import runner as cpu_runner
from refmamba.backends.cpu.backend import Cpu
from refmamba.backends.cpu.kernels import regions
from refmamba.backends.cpu.kernels.codes import start_units
from refmamba.backends.cpu.kernels.digits import grouped_tiles, spread_bytes
from refmamba.backends.cpu.kernels.tables import Run, Site
from refmamba.backends.cpu.memory import Arena, address, aligned
from refmamba.backends.cpu.pack import Packed, pack, packed_bytes, padded_rows
from refmamba.backends.cpu.passes import passes
from refmamba.backends.cpu.state import State
from refmamba.backends.cpu.threads import Threads
from refmamba.conformance.models import ModelChecks
from refmamba.errors import BackendError, NonFiniteError
from refmamba.spec import arith
from refmamba.spec.calibrate import calibrate
from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.ops import log_softmax
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS, Quantizer, Scheme, parse_scheme, scheme_from_json
from refmamba.spec.trace import last_site

ROOT = Path(__file__).resolve().parent.parent
MIXED = scheme_from_json({
    "name": "mixed",
    "weights": {"in_proj.weight": {"bits": 3, "scale": "per_channel"}, "dt_proj.weight": {"bits": 5, "scale": "per_tensor"},
                "A_log": {"bits": 6, "scale": "per_channel"}},
    "inputs": {"in_proj": {"bits": 5, "scale": "per_tensor"}, "x_proj": {"bits": 8, "scale": "per_token"},
               "out_proj": {"bits": 4, "scale": "static"}, "lm_head": {"bits": 8, "scale": "per_tensor"}},
    "outputs": {"in_proj": {"bits": 9, "scale": "per_token"}, "out_proj": {"bits": 16, "scale": "per_tensor"},
                "dt_proj": {"bits": 2, "scale": "per_token"}},
})  # fmt: skip
NEW = ("int4", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8")
METHODS = scheme_from_json({
    "name": "several methods",
    "weights": {"in_proj.weight": {"bits": 3, "scale": "grouped", "group": 16},
                "dt_proj.weight": {"bits": 2, "scale": "grouped", "group": 32},
                "out_proj.weight": {"bits": 4, "scale": "grouped", "group": 128}},
    "inputs": {"in_proj": {"bits": 7, "scale": "per_token_outliers", "threshold": 0.7},
               "x_proj": {"bits": 8, "scale": "per_token"}, "out_proj": {"bits": 4, "scale": "flattened", "quantile": 0.5},
               "lm_head": {"bits": 8, "scale": "per_token_outliers", "threshold": 1.5}},
    "outputs": {"in_proj": {"bits": 9, "scale": "per_token"}},
    "rotate": ["in_proj", "x_proj"],
})  # fmt: skip
WHOLE = replace(METHODS, name="and of a whole sequence", inputs={**METHODS.inputs, "x_proj": Quantizer(8, "per_tensor")})
SCHEMES = [
    *map(parse_scheme, ("fp32", "w8-mlp", "w8-all", "w5-all", "w4-mlp", "w4-all", "w2-all", "w8a8-mlp", "w4a16-all", "int8",
                        "int8-static", "int8-smooth")),
    MIXED, *map(parse_scheme, NEW), METHODS, WHOLE,
]  # fmt: skip
CONFIGS = {
    "plain": MambaConfig(64, 2, 100),
    "odd": MambaConfig(40, 2, 101, d_state=5, dt_rank=3, d_conv=2),
    "biased": MambaConfig(24, 2, 37, d_state=8, dt_rank=48, d_conv=3, use_bias=True, use_conv_bias=False, tie_embeddings=False),
    "tiny": MambaConfig(3, 1, 5, d_state=1, dt_rank=1, d_conv=1),
    "wide state": MambaConfig(16, 1, 33, d_state=20),
}


def quantized(config: MambaConfig, scheme: Scheme) -> QuantizedModel:
    source = RandomSource(config)
    return quantize_model(source, scheme, calibrate(source, tokens(config, 9)) if scheme.needs_calibration else {})


def tokens(config: MambaConfig, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length)


def equal_states(a: Any, b: Any) -> None:
    for name, x, y in zip(("conv", "ssm"), a.arrays(), b.arrays(), strict=True):
        assert x.dtype == np.float32
        assert_bits(x, y, name)


def equal_lists(expected: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> None:
    for i, (x, y) in enumerate(zip(expected, arrays, strict=True)):
        assert_bits(x, y, f"array {i}")


@pytest.fixture(scope="module")
def backend() -> Cpu:
    return Cpu()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_of_the_reference(name: str, scheme: Scheme, backend: Cpu) -> None:
    config = CONFIGS[name]
    model = quantized(config, scheme)
    ours, reference = backend.load(model), Mamba(model)
    ids = tokens(config, 40)
    (a,), after_a = reference.prefill([ids], logits="all")
    (b,), after_b = ours.prefill([ids], logits="all")
    assert_bits(a, b)
    equal_states(after_a, after_b)
    batch = [ids[:3], ids[4:5], ids[2:20]]
    rows_a, after_a = reference.prefill(batch)
    rows_b, after_b = ours.prefill(batch)
    equal_lists(rows_a, rows_b)
    for t in range(3):
        step_a, after_a = reference.step(ids[t : t + 3], after_a)
        step_b, after_b = ours.step(ids[t : t + 3], after_b)
        assert_bits(step_a, step_b)
    equal_states(after_a, after_b)


def test_a_zero_of_the_other_sign_is_found(backend: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the test above, and by what `refmamba verify` runs."""
    arrays, scheme = State.arrays, parse_scheme("w8a8-mlp")

    def flipped(self: State) -> tuple[np.ndarray, ...]:
        return tuple(np.where(x == 0, -x, x) for x in arrays(self))

    monkeypatch.setattr(State, "arrays", flipped)
    with pytest.raises(AssertionError, match=r"conv, element .* expected 00000000 \(0\.0\), found 80000000 \(-0\.0\)"):
        test_bits_of_the_reference("plain", scheme, backend)
    checks = ModelChecks(backend, quantized(CONFIGS["plain"], scheme), [tokens(CONFIGS["plain"], 40)])
    assert [str(wrong) for _, wrong in checks.run() if wrong]


@pytest.mark.parametrize("scheme", [*map(parse_scheme, ("fp32", "w4-all", "int8", *NEW)), METHODS], ids=lambda s: s.name)
def test_chunks_and_many_passes_change_nothing(scheme: Scheme, backend: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["odd"]
    runner = backend.load(quantized(config, scheme))
    batch = [tokens(config, n, n) for n in (1, 17, 5, 9)]
    whole, state = runner.prefill(batch, logits="all")
    monkeypatch.setattr(cpu_runner, "PASS_ROWS", 7)
    pieces, other = runner.prefill(batch, logits="all")
    equal_lists(whole, pieces)
    equal_states(state, other)
    lasts, _ = runner.prefill(batch)
    equal_lists([x[-1:] for x in whole], lasts)
    assert [x.shape for x in runner.prefill(batch, logits="none")[0]] == [(0, config.vocab_size)] * 4
    state_of_one = runner.initial_state(1)
    for t in batch[1]:
        last, state_of_one = runner.step(np.array([t]), state_of_one)
    assert_bits(whole[1][-1:], last)
    equal_states(state_of_one, state.take([1]))


EVERY = Scheme("every", inputs=dict.fromkeys(LINEAR_LAYERS, Quantizer(8, "per_token_outliers", threshold=0.05)))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("scheme", [*map(parse_scheme, ("fp32", "flatten-int8")), METHODS, EVERY], ids=lambda s: s.name)
def test_rows_longer_than_a_block(rows: int, scheme: Scheme, backend: Cpu) -> None:
    """d_inner 4192: the fixed-point product is joined from two blocks, with a rounding after each."""
    config = MambaConfig(2096, 1, 20)
    model = quantized(config, scheme)
    (a,), _ = Mamba(model).prefill([tokens(config, rows)], logits="all")
    (b,), _ = backend.load(model).prefill([tokens(config, rows)], logits="all")
    assert_bits(a, b)


class Cancelling(RandomSource):
    """Every output of in_proj is 300 products of 2^51 to 2^52, the same with the other sign, and a rest of about 2^30."""

    def read(self, name: str) -> arith.F32Array:
        rng = np.random.default_rng(3)
        if name == "layers.0.in_proj.weight":
            codes = rng.integers(2**21, 2**22, (2400, 300))
            rest = rng.integers(-1, 2, codes.shape) * (np.arange(300) < 4)
            weight: arith.F32Array = np.ldexp(np.concatenate([codes, rest - codes], axis=1), -22).astype(np.float32)
            return weight
        if name == "embedding.weight":
            return np.tile(rng.uniform(0.5, 1, (50, 300)).astype(np.float32), 2)
        return np.ones(600, np.float32) if name == "layers.0.norm.weight" else super().read(name)


@pytest.mark.parametrize("rows", [1, 5, 40, 130])
def test_sums_of_which_float64_keeps_too_little(rows: int, backend: Cpu) -> None:
    """On the way a sum is near 2^60, where float64 is off by 2^7 at each step: about the last bit of the float32 result."""
    model, batch = (
        quantize_model(Cancelling(MambaConfig(600, 1, 50)), parse_scheme("fp32")),
        [tokens(CONFIGS["plain"], rows) % 50],
    )
    seen: list[np.ndarray] = []

    def look(site: str, value: np.ndarray) -> None:
        if site == "layers.0.in_proj.out":
            seen.append(value.copy())

    Mamba(model).prefill(batch, hook=look)
    backend.load(model).prefill(batch, hook=look)
    expected, shown = seen
    assert_bits(expected, shown)


def grouped_product(q: np.ndarray, steps: np.ndarray, group: int, x: np.ndarray) -> np.ndarray:
    """The kernels' product of weights in groups (32, K) with rows of digits, 1, 4 or 8 of them (rows, K): int32 (rows, 32)."""
    (rows, k), site, run = x.shape, np.zeros(len(Site), np.int64), np.zeros(len(Run), np.int64)
    w = Packed.of(Codes(q, np.ones((32, 1), np.float32), 4, steps, group), padded_rows(32), Arena())
    codes, starts, out = aligned(x.shape, np.int8), aligned((rows, -(-k // min(64, group))), np.int32), aligned((rows, 2, 16))
    codes[...] = x
    assert w.steps is not None
    site[[Site.CODES, Site.STEPS, Site.STEP_BYTES]] = address(w.digits), address(w.steps), w.steps[0].size
    site[[Site.K, Site.GROUP_BITS, Site.UNITS, Site.SLICES]] = k, group.bit_length() - 1, starts.shape[1], 1
    run[[Run.CODES, Run.STARTS]] = address(codes), address(starts)
    for row in range(rows):
        start_units(address(run), address(site), address(codes) + row * k, row)
    grouped_tiles(address(run), address(site), 0, 0, rows, 0, k, address(out))
    return out.view(np.int32).reshape(rows, 32)


@pytest.mark.parametrize(("largest", "step"), [(7, 18), (3, 42), (1, 126)])
def test_codes_in_groups_become_bytes(largest: int, step: int) -> None:
    """Every code times every step, plus 128, as the bytes of a weight that is not in groups have it."""
    q = np.tile(np.arange(-largest, largest + 1), 1024)[:1008]
    q = np.stack([np.roll(q, row) for row in range(32)]).astype(np.int8)
    steps = (np.arange(32 * 63).reshape(32, 63) % step + 1).astype(np.uint8)
    w = Packed.of(Codes(q, np.ones((32, 1), np.float32), 4, steps, 16), padded_rows(32), Arena())
    assert w.steps is not None
    site, out = np.zeros(len(Site), np.int64), aligned((2, 1008 // 4, 16, 4), np.uint8)
    site[[Site.CODES, Site.STEPS, Site.STEP_BYTES]] = address(w.digits), address(w.steps), w.steps[0].size
    site[[Site.K, Site.GROUP_BITS]] = 1008, 4
    for strip in range(2):
        spread_bytes(address(site), strip, address(out[strip]))
    integers = q * steps.repeat(16, axis=1).astype(np.int64)
    assert_bits(out.swapaxes(1, 2).reshape(32, 1008), (integers + 128).astype(np.uint8))


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("largest", "step"), [(7, 18), (3, 42), (1, 126)])
def test_the_largest_sums_of_groups_are_exact(largest: int, step: int, group: int) -> None:
    """Codes, steps and activations at their ends, alike or of changing signs, in the longest row; digits of -128 in a block."""
    for k, low in ((65536, -127), (4096, -128), (304, -128)):
        ends = np.array([low, 127])
        column = np.arange(k)
        x = np.stack([ends[column * 0], ends[column * 0 + 1], *(ends[column // n % 2] for n in (1, 2, 4, 8, 64, 3))])
        q = np.array([-largest, largest])[column // np.array([[1], [2], [4], [64], [k], [3], [8], [5]]).repeat(4, axis=0) % 2]
        q[::2] *= -1
        steps = np.full((32, -(-k // group)), step, np.uint8)
        steps[16:, ::2] = 1
        expected = x @ (q * steps.repeat(group, axis=1)[:, :k]).T
        for rows in (1, 4, 8):
            assert np.array_equal(grouped_product(q.astype(np.int8), steps, group, x[-rows:]), expected[-rows:])


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 33, 65, 255, 257, 5000, 50280])
def test_log_softmax_of_any_length(n: int, backend: Cpu) -> None:
    """Rows of a length that is no multiple of a vector lie at any address."""
    logits = (np.random.default_rng(n).normal(0, 9, (5, n))).astype(np.float32)
    logits[1] = -3
    logits[2, n // 2] = 80
    assert_bits(log_softmax(logits), backend.operations()["log_softmax"](logits))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_log_softmax_hides_no_value_that_is_none(bad: float, backend: Cpu) -> None:
    logits = np.zeros((2, 40), np.float32)
    logits[1, 21] = bad
    assert np.isnan(backend.operations()["log_softmax"](logits)).all(axis=1).tolist() == [False, True]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scheme", [parse_scheme("w8a8-all"), WHOLE], ids=lambda s: s.name)
def test_any_number_of_threads(scheme: Scheme, count: int) -> None:
    config = CONFIGS["plain"]
    model = quantized(config, scheme)
    backend = Cpu()
    backend.threads = Threads(count)
    (a,), state_a = Mamba(model).prefill([tokens(config, 40)], logits="all")
    (b,), state_b = backend.load(model).prefill([tokens(config, 40)], logits="all")
    assert_bits(a, b)
    equal_states(state_a, state_b)


def test_callers_on_several_threads(backend: Cpu) -> None:
    config = CONFIGS["plain"]
    runner = backend.load(quantized(config, parse_scheme("int8")))
    texts = [tokens(config, 5 + n, n) for n in range(12)]
    alone = [runner.prefill([t])[0][0] for t in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda t: runner.prefill([t])[0][0], texts))
    equal_lists(alone, together)


def test_a_state_is_a_value(backend: Cpu) -> None:
    config = CONFIGS["odd"]
    runner = backend.load(quantized(config, parse_scheme("int8")))
    _, state = runner.prefill([tokens(config, 4), tokens(config, 2, 1)])
    before = [x.copy() for x in state.arrays()]
    fork = state.take([1, 0, 1])
    assert fork.batch == 3
    x, _ = runner.step(np.array([1, 2, 1]), fork)
    y, _ = runner.step(np.array([2, 1]), state)
    assert_bits(x[0], y[1])
    assert_bits(x[1], y[0])
    assert_bits(x[2], x[0])
    equal_lists(before, state.arrays())


@pytest.mark.parametrize("scheme", [parse_scheme("w8a8-all"), parse_scheme("int8-hadamard"), WHOLE], ids=lambda s: s.name)
def test_hooks_show_the_references_values(scheme: Scheme, backend: Cpu) -> None:
    config = CONFIGS["odd"]
    model = quantized(config, scheme)
    seen: list[dict[str, np.ndarray]] = [{}, {}]
    order: list[list[str]] = [[], []]
    runners: list[Any] = [Mamba(model), backend.load(model)]
    for i, runner in enumerate(runners):

        def look(site: str, value: np.ndarray, i: int = i) -> None:
            seen[i][site] = np.array(value)
            order[i].append(site)

        runner.prefill([tokens(config, 6)], hook=look)
    assert {last_site(site) for site in seen[1]} == set(backend.sites or ())
    assert order[1] == [site for site in order[0] if site in seen[1]]
    for site, value in seen[1].items():
        assert_bits(seen[0][site], value, site)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "w8a8-all", "int8-static", *NEW])
@pytest.mark.parametrize(
    ("name", "bad"), [("layers.1.D", np.nan), ("layers.0.conv1d.bias", np.inf), ("norm_f.weight", -np.inf)]
)
def test_a_value_without_codes_is_named(name: str, bad: float, scheme: str, backend: Cpu) -> None:
    config = CONFIGS["plain"]
    model = quantized(config, parse_scheme(scheme))
    value = model.value(name).copy()
    value[1] = bad
    broken = QuantizedModel(config, model.scheme, {**model.params, name: value})
    with pytest.raises(NonFiniteError) as expected:
        Mamba(broken).prefill([tokens(config, 3)])
    with pytest.raises(NonFiniteError) as error:
        backend.load(broken).prefill([tokens(config, 3)])
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("name", ["exp", "softplus", "silu"])
def test_bits_of_the_polynomials(name: str, backend: Cpu) -> None:
    """Random bit patterns of every magnitude, and the neighbours of every threshold."""
    patterns = np.random.default_rng(0).integers(-(2**31), 2**31, 200_000).astype(np.int32).view(np.float32)
    usual = np.random.default_rng(1).uniform(-100, 100, 200_000).astype(np.float32)
    edges = np.array([0, -0.0, 20, 87.336, 88.722, 0.34657359, 2**-126, 2**-149, np.inf, np.nan], np.float32)
    near = np.concatenate([(edges.view(np.int32) + i).view(np.float32) for i in range(-3, 4)])
    x = np.concatenate([patterns, usual, near, -near])
    with np.errstate(all="ignore"):
        expected = getattr(arith, name)(x)
    ours = backend.operations()[name](x)
    assert_bits(expected, ours)


def test_packed_layout_of_a_byte_weight() -> None:
    """Row 17 is lane 1 of the second strip, and column 6 byte 2 of the second group: worked out by hand."""
    q = np.zeros((20, 7), np.int8)
    q[17, 6] = -5
    w = Codes(q, np.ones((), np.float32), 8)
    order = padded_rows(20)
    out = np.empty(packed_bytes(w, len(order)), np.uint8)
    pack(w, order, out)
    assert len(order) == 32
    assert np.flatnonzero(out != 128).tolist() == [1 * 16 * 16 + 1 * 64 + 1 * 4 + 2]
    assert out.max() == 128
    assert out.min() == 123


def test_bits_of_a_code_in_memory() -> None:
    """4 bits a code up to 4 bits, 8 up to 8, 24 for fixed point."""
    q, unit = np.zeros((32, 16), np.int32), np.ones((), np.float32)
    sizes = [packed_bytes(w, 32) for w in (Codes(q, unit, 4), Codes(q, unit, 5), FixedPoint(q, q[:, 0]))]
    assert sizes == [256, 512, 1536]


def test_a_region_more_than_there_are_counters_for(backend: Cpu) -> None:
    """Of each of four products: codes 1 region, or 2 with a scale for the whole sequence; the product 1; its output 2. The
    scan 1. So 21 where every scale is the sequence's, 17 for scales of a token."""
    for scale, most in (("per_tensor", 21), ("per_token", 17)):
        quantizers = dict.fromkeys(LINEAR_LAYERS, Quantizer(8, scale))
        runner = backend.load(quantized(CONFIGS["plain"], Scheme("all", {}, quantizers, quantizers)))
        for reserved in (most, most - 1):
            runner._set(REGIONS=reserved)
            if reserved < most:
                with pytest.raises(BackendError, match="more regions"):
                    runner.prefill([np.arange(3)])
            else:
                runner.prefill([np.arange(3)])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 2, 5, 96, 1572])
def test_shares_are_every_item_once(items: int, threads: int) -> None:
    run, counter, taken = np.zeros(len(Run), np.int64), np.zeros(1, np.int64), list[int]()
    run[Run.THREADS] = threads
    share = numba.njit(lambda *arguments: regions.share(*arguments))
    while (part := share(address(run), address(counter), items))[0] < items:
        taken += range(*part)
    assert taken == list(range(items))


def test_memory_is_used_again_once_nobody_holds_it(backend: Cpu) -> None:
    runner = backend.load(quantized(CONFIGS["plain"], parse_scheme("int8")))
    _, state = runner.prefill([np.arange(3)])
    first, held = state.arrays(), state.ssm
    addresses = set[int]()
    for token in range(9):
        _, state = runner.step(np.array([token]), state)
        addresses.add(int(state.ssm_in[0]))
    # A view of the first state keeps its memory, and the others take turns.
    assert address(held) not in addresses
    assert len(addresses) == 2
    assert_bits(first[1][0], held[0].swapaxes(2, 3).reshape(first[1][0].shape))


def test_a_fork_copies_nothing(backend: Cpu) -> None:
    runner = backend.load(quantized(CONFIGS["plain"], parse_scheme("int8")))
    _, state = runner.prefill([np.arange(3), np.arange(5)])
    fork = state.take([1, 0, 1])
    assert fork.ssm is state.ssm
    equal_lists([old[[1, 0, 1]] for old in state.arrays()], fork.arrays())


def test_a_copied_state_is_its_own(backend: Cpu) -> None:
    runner = backend.load(quantized(CONFIGS["plain"], parse_scheme("int8")))
    _, state = runner.prefill([np.arange(3), np.arange(5)])
    expected, _ = runner.step(np.array([7, 8]), state)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    del state
    runner.prefill([np.arange(9), np.arange(2)])  # takes the memory of the first
    for copied in copies:
        assert_bits(expected, runner.step(np.array([7, 8]), copied)[0])


def test_short_passes_of_forks(backend: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces shorter than the convolution, in and out of the same memory, from states that share theirs."""
    model = quantized(CONFIGS["plain"], parse_scheme("w8-all"))
    runner, reference = backend.load(model), Mamba(model)
    sequences = [tokens(CONFIGS["plain"], n, n) for n in (7, 1, 5)]
    _, theirs = reference.prefill([np.arange(3)])
    _, ours = runner.prefill([np.arange(3)])
    expected, after = reference.prefill(sequences, theirs.take([0, 0, 0]), logits="all")
    monkeypatch.setattr(cpu_runner, "PASS_ROWS", 2)
    found, state = runner.prefill(sequences, ours.take([0, 0, 0]), logits="all")
    equal_lists(expected, found)
    equal_states(state, after)


def test_a_fork_of_a_sequence_that_is_none(backend: Cpu) -> None:
    state = backend.load(quantized(CONFIGS["plain"], parse_scheme("int8"))).initial_state(2)
    assert state.take([-1]).batch == 1
    with pytest.raises(IndexError):
        state.take([2])


def test_passes_fill_up_in_order() -> None:
    assert passes([3, 5, 1], 4) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)], [(2, 0, 1)]]


def test_aligned() -> None:
    assert all(address(aligned((n, 3))) % 64 == 0 for n in range(1, 9))


def test_whoever_waits_for_the_compiler_is_told(tmp_path: Path) -> None:
    """The first load of this place and processor, and no other."""
    code = (
        "from conftest import TINY, RandomSource\nfrom refmamba.backends.cpu.backend import Cpu\n"
        "from refmamba.spec.parameters import quantize_model\nfrom refmamba.spec.scheme import parse_scheme\n"
        "Cpu().load(quantize_model(RandomSource(TINY), parse_scheme('int8')))"
    )

    def said(**variables: str) -> bool:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": path} | variables
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stderr.startswith("compiling the CPU kernels")

    other = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert [said(), said(), said(**other), said(**other), said()] == [True, False, True, False, False]


@pytest.mark.ci
def test_without_vnni() -> None:
    """The same comparison in a process whose numba compiles for an older processor."""
    code = (
        "from refmamba.backends.cpu.kernels import tiles; assert not tiles.VNNI\n"
        "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/test_cpu_backend.py', '-k',"
        " '(reference and (plain or odd) and not (mlp or a8 or a16)) or too_little or log_softmax or than_a_block'"
        " ' or largest_sums']))"
    )
    older = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | older, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["fp32", "w8-all", "w4-all", "int8", "w4-mlp", "int4", "int4-all"])
def test_a_loaded_model_still_gives_its_parameters(name: str, backend: Cpu) -> None:
    """They are unpacked from the one copy of the codes."""
    model = quantized(CONFIGS["biased"], parse_scheme(name))
    loaded = backend.load(model).model
    assert set(loaded.params) == set(model.params)
    for key, param in model.params.items():
        ours = loaded.params[key]
        assert type(ours) is type(param)
        if isinstance(param, Codes) and isinstance(ours, Codes):
            assert_bits(param.q, ours.q)
            assert_bits(param.scale, ours.scale)
            assert (ours.q.dtype, ours.bits, ours.group) == (param.q.dtype, param.bits, param.group)
            assert_bits(param.integers(), ours.integers())
        elif isinstance(param, FixedPoint) and isinstance(ours, FixedPoint):
            assert_bits(param.q, ours.q)
            assert_bits(param.exponent, ours.exponent)
        else:
            assert_bits(model.value(key), loaded.value(key))
