"""The Triton kernels as the compiler leaves them: no instruction that is not exact, and the same bits when it runs.

tools/compile_kernels.py compiles for a GPU that is not there; tests/ptx.py runs what it gives. `make gpu-proof` does the
first for every configuration; here it is done for one of each kind.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_bits
from ptx import launch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import torch
import triton
from compile_kernels import ARCHITECTURES, Configuration, compiled, configurations, faults, specialized
from triton_faults import FAULTS, SHAPE, planted

from refmamba.backends.triton.kernels import alone, layers
from refmamba.backends.triton.table import row_blocks, spread_block
from refmamba.spec import arith, codes, ops
from refmamba.spec.arith import F32Array

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="kernels are interpreted here"),
]

RUN = ("sm_80", "sm_90")
RNG = np.random.default_rng(14)


def run(kernel: Any, grid: tuple[int, ...], warps: int, architecture: str, /, **arguments: Any) -> str:
    """Compile a kernel for these arguments and run its PTX on them. Arrays are changed in place."""
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    configuration = specialized(kernel, warps, 2, tensors)
    ptx: str = compiled(configuration, architecture).asm["ptx"]
    constants = dict(configuration.constants)
    launch(ptx, kernel.__name__, grid, warps, [arguments[p.name] for p in kernel.params if p.name not in constants])
    return ptx


def any_floats(n: int) -> F32Array:
    """Ordinary numbers, all bit patterns, and the special values."""
    x = RNG.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    x[: n // 2] = RNG.standard_normal(n // 2) * 30
    x[:10] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 88.722, -87.336, 20.0]
    return x


UNARY: dict[str, Callable[[F32Array], F32Array]] = {
    "exp": arith.exp, "log": arith.log, "softplus": arith.softplus, "silu": arith.silu, "state_matrix": ops.state_matrix,
}  # fmt: skip


@pytest.mark.parametrize("architecture", RUN)
@pytest.mark.parametrize("op", UNARY)
def test_an_elementwise_function_has_its_bits(op: str, architecture: str) -> None:
    x = any_floats(8192)
    y = np.empty_like(x)
    run(alone.elementwise_kernel, (8,), 4, architecture, x_ptr=x, z_ptr=None, y_ptr=y, n=8190, largest=0.0, OP=op, BLOCK=1024)
    with np.errstate(all="ignore"):
        assert_bits(UNARY[op](x[:8190]), y[:8190])


def test_the_decay_s_exp_has_exp_s_bits() -> None:
    x = -np.abs(any_floats(8192))
    x = np.where(np.isnan(x), np.float32(-1), x)
    x[:3] = -0.0, -np.inf, -87.336
    y = np.empty_like(x)
    run(alone.elementwise_kernel, (8,), 4, "sm_90", x_ptr=x, z_ptr=None, y_ptr=y, n=8192, largest=0.0, OP="exp_of_decay",
        BLOCK=1024)  # fmt: skip
    assert_bits(arith.exp(x), y)


@pytest.mark.parametrize("architecture", RUN)
def test_a_gate_and_a_step_have_their_bits(architecture: str) -> None:
    x, z = any_floats(2048), any_floats(2048)[::-1].copy()
    for op, function in (("gate", ops.gate), ("step_size", ops.step_size), ("log1p", lambda y, _: arith.log1p(y))):
        y = np.empty_like(x)
        operand = np.abs(RNG.random(2048, np.float32)) if op == "log1p" else x
        run(alone.elementwise_kernel, (2,), 4, architecture, x_ptr=operand, z_ptr=z, y_ptr=y, n=2048, largest=0.0, OP=op,
            BLOCK=1024)  # fmt: skip
        with np.errstate(all="ignore"):
            assert_bits(function(operand, z), y, op)


@pytest.mark.parametrize("architecture", RUN)
def test_codes_have_their_bits(architecture: str) -> None:
    x = np.nan_to_num(any_floats(2048), nan=1, posinf=3e38, neginf=-3e38)
    scale = codes.scale_of(np.array([3, 0, 1e-31, 3e38] * 512, np.float32), 8)
    m = np.abs(x)
    m[m < codes.ABSMAX_ZERO] = 0
    s, e = np.empty_like(x), np.empty(2048, np.int32)
    q, f = np.empty(2048, np.int32), np.empty(2048, np.int32)
    at: dict[str, Any] = {"n": 2048, "largest": 127.0, "BLOCK": 1024}
    run(alone.elementwise_kernel, (2,), 4, architecture, x_ptr=x, z_ptr=scale, y_ptr=q, OP="quantize", **at)
    run(alone.elementwise_kernel, (2,), 4, architecture, x_ptr=x, z_ptr=None, y_ptr=s, OP="scale_of", **at)
    run(alone.elementwise_kernel, (2,), 4, architecture, x_ptr=x, z_ptr=None, y_ptr=e, OP="activation_exponent", **at)
    fixed = codes.fixed_point(x[:, None], codes.ACTIVATION_BITS, "x")
    run(alone.elementwise_kernel, (2,), 4, architecture, x_ptr=x, z_ptr=fixed.exponent, y_ptr=f, OP="fixed_point", **at)
    with np.errstate(all="ignore"):
        assert np.array_equal(codes.quantize(x, scale, 8), q)
    assert_bits(codes.scale_of(m, 8), s)
    assert np.array_equal(fixed.exponent, e)
    assert np.array_equal(fixed.q[:, 0], f)


@pytest.mark.parametrize("architecture", RUN)
@pytest.mark.parametrize("taps", [4, 1])
def test_the_convolution_has_its_bits(taps: int, architecture: str) -> None:
    rows, k = 21, 70
    x, state = (RNG.standard_normal(shape).astype(np.float32) for shape in ((rows, k), (k, taps - 1)))
    weight, bias = (RNG.standard_normal(shape).astype(np.float32) for shape in ((k, taps), k))
    y, new = np.empty_like(x), np.empty_like(state)
    run(alone.conv1d_kernel, (2, 2), 4, architecture, x_ptr=x, weight_ptr=weight.T.copy(), bias_ptr=bias, state_ptr=state,
        new_state_ptr=new, y_ptr=y, rows=rows, K=k, TAPS=taps, M=16, BK=64)  # fmt: skip
    expected, expected_state = ops.conv1d(x, state, weight, bias)
    assert_bits(expected, y)
    assert_bits(expected_state, new)


@pytest.mark.parametrize("architecture", RUN)
def test_the_codes_of_a_convolution_have_their_bits(architecture: str) -> None:
    k, lengths, blocks = 768, (6, 2), row_blocks(8, 768)
    rows = sum(lengths)
    x, state = RNG.standard_normal((rows, k)).astype(np.float32), RNG.standard_normal((2, k, 3)).astype(np.float32)
    weight, bias = (RNG.standard_normal(shape).astype(np.float32) for shape in ((k, 4), k))
    u, new, q, scale = np.empty_like(x), np.empty_like(state), np.empty((rows, k), np.int8), np.empty(rows, np.float32)
    run(layers.code_kernel, (rows,), blocks.warps, architecture, x_ptr=x, x_stride=k, weight_ptr=weight.T.copy(), bias_ptr=bias,
        eps=0.0, state_ptr=state, new_state_ptr=new, state_stride=k * 3, length_ptr=np.array(lengths, np.int32),
        sequence_ptr=np.repeat(np.arange(2, dtype=np.int32), lengths),
        position_ptr=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        power_ptr=None, threshold=0.0, u_ptr=u, peak_ptr=None, static_ptr=None, failure_ptr=np.full(1, 99, np.int32), site=0,
        q_ptr=q, scale_ptr=scale, rows=rows, largest=127.0, K=k, SOURCE="conv", TAPS=4, WIDTH=1, PART="all", CODER="per_token",
        DIGITS=1, M=blocks.rows, BK=blocks.depth)  # fmt: skip
    for b, now in enumerate((slice(0, lengths[0]), slice(lengths[0], rows))):
        y, kept = ops.conv1d(x[now], state[b], weight, bias)
        assert_bits(arith.silu(y), u[now])
        assert_bits(kept, new[b])
    expected = codes.code(u, 8, "x", "per_row")
    assert np.array_equal(expected.q, q)
    assert_bits(expected.scale.reshape(-1), scale)


@pytest.mark.parametrize("architecture", RUN)
@pytest.mark.parametrize(("lanes", "tile"), [(1, 4), (4, 4), (8, 8), (16, 16)])
@pytest.mark.parametrize("decays", [True, False])
def test_the_scan_and_its_gate_have_their_bits(decays: bool, lanes: int, tile: int, architecture: str) -> None:
    e, n, lengths, channels = 35, 16, (2 * lanes + 1, 3), 32 // lanes
    rows = sum(lengths)

    def normal(*shape: int) -> F32Array:
        return RNG.standard_normal(shape).astype(np.float32)

    u, z, bc, D, h = normal(rows, e), normal(rows, e), normal(rows, 2 * n), normal(e), normal(2, e, n)
    delta, A = np.abs(normal(rows, e)) * np.float32(2), -np.exp(normal(e, n) * 2)
    A[0, :3] = -0.0, -3e38, -100
    y, new = np.empty_like(u), np.empty_like(h)
    run(layers.scan_kernel, (-(-e // channels), 2), 1, architecture, u_ptr=u, delta_ptr=delta, B_ptr=bc[:, :n].copy(),
        C_ptr=bc[:, n:].copy(), z_ptr=z, A_ptr=A, D_ptr=D, h_ptr=h, new_h_ptr=new, h_stride=e * n,
        start_ptr=np.array([0, lengths[0]], np.int32), length_ptr=np.array(lengths, np.int32), y_ptr=y,
        E=e, BC_STRIDE=n, Z_STRIDE=e, DECAYS=decays, STATES=n, N=n, TILE=tile, LANES=lanes, BE=channels)  # fmt: skip
    for b, now in enumerate((slice(0, lengths[0]), slice(lengths[0], rows))):
        with np.errstate(over="ignore"):
            expected, state = ops.selective_scan(u[now], delta[now], A, bc[now, :n], bc[now, n:], D, h[b])
        assert_bits(ops.gate(expected, z[now]), y[now])
        assert_bits(state, new[b])


@pytest.mark.parametrize("architecture", RUN)
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("k", [151, 160])  # neither fills its last group
def test_the_bytes_of_a_packed_weight_are_its_codes_times_their_steps(k: int, group: int, architecture: str) -> None:
    n = 37
    codes_, steps = RNG.integers(-7, 8, (n, k), np.int8), RNG.integers(1, 19, (n, 3), np.uint8)
    codes_[0], steps[0] = np.resize([-7, 7], k), 18  # the largest products, 126
    q, (columns, depth) = np.full((n, k), 99, np.int8), spread_block(k)
    ptx = run(layers.spread_kernel, (-(-n // columns), -(-k // depth)), 4, architecture, w_ptr=codes.pack4(codes_),
              steps_ptr=steps if group else None, q_ptr=q, N=n, K=k, GROUP=group, BN=columns, BK=depth)  # fmt: skip
    assert faults(ptx) == []
    assert np.array_equal(q, codes_.astype(int) * (steps.repeat(64, 1)[:, :k] if group else 1))


@pytest.mark.parametrize("architecture", RUN)
def test_a_sum_has_its_bits(architecture: str) -> None:
    x, y = RNG.standard_normal((6, 100)).astype(np.float32), np.empty(6, np.float32)
    run(alone.tree_sum_kernel, (2,), 4, architecture, x_ptr=x, y_ptr=y, rows=6, K=100, M=4, WIDTH=128)
    assert_bits(arith.tree_sum(x), y)


def test_one_kernel_of_each_kind_is_exact_on_every_architecture() -> None:
    kinds: dict[tuple[Any, ...], Configuration] = {}
    for configuration in configurations([2560], ["fp32", "int8"]):
        constants = dict(configuration.constants)
        kind = [constants.get(name) for name in ("SOURCE", "OP", "CODER", "DIGITS", "PLANES", "PACKED", "TILE", "LANES")]
        kinds.setdefault((configuration.kernel.__name__, *kind), configuration)
    for i, configuration in enumerate(kinds.values()):  # every configuration on each of them: make gpu-proof
        ptx = compiled(configuration, ARCHITECTURES[i % len(ARCHITECTURES)]).asm["ptx"]
        assert faults(ptx) == [], configuration.name


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.text])
def test_a_fault_is_found_in_the_text(name: str, tmp_path: Path) -> None:
    fault, x = FAULTS[name], torch.zeros(SHAPE)
    arguments = fault.arguments | {"x_ptr": x, "y_ptr": x}
    right = specialized(getattr(alone, fault.kernel), 4, 2, arguments)
    wrong = specialized(planted(tmp_path, fault), 4, 2, arguments)
    assert faults(compiled(right, "sm_90").asm["ptx"]) == []
    found = faults(compiled(wrong, "sm_90").asm["ptx"])
    assert any(line.startswith(fault.text) for line in found), found


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.run])
def test_a_fault_is_found_when_it_runs(name: str, tmp_path: Path) -> None:
    x, y, fault = RNG.standard_normal(SHAPE).astype(np.float32), np.empty(6, np.float32), FAULTS[name]
    ptx = run(planted(tmp_path, fault), fault.grid, 4, "sm_90", x_ptr=x, y_ptr=y, **fault.arguments)
    assert faults(ptx) == []  # the text is as good as before
    assert np.any(arith.tree_sum(x) != y)


def test_the_table_of_faults_is_the_documented_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "GPU.md").read_text("utf-8")
    for name, fault in FAULTS.items():
        assert " ".join(f"| {name} | {fault.found} |".split()) in " ".join(text.split()), name


def test_fusion_is_found() -> None:
    x = torch.zeros(600)
    configuration = specialized(alone.elementwise_kernel, 4, 2, {"x_ptr": x, "z_ptr": None, "y_ptr": x, "n": 600,
                                "largest": 0.0, "OP": "exp", "BLOCK": 1024})  # fmt: skip
    assert faults(compiled(configuration, "sm_90").asm["ptx"]) == []
    fused = compiled(configuration, "sm_90", enable_fp_fusion=True).asm["ptx"]
    assert any("fused" in fault for fault in faults(fused))
