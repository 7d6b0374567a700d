"""The Triton kernels as the compiler leaves them: no instruction that is not exact, and the same bits when it runs.

tools/compile_kernels.py compiles for a GPU that is not there; tests/ptx.py runs what it gives. `make gpu-proof` does the
first for every configuration; here it is done for one of each kind.
"""

import importlib
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import assert_bits
from ptx import launch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import torch
import triton
from compile_kernels import ARCHITECTURES, Configuration, compiled, configurations, faults, specialized

from refmamba.backends.triton.kernels import alone, layers
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
    run(alone.conv1d_kernel, (2, 2), 4, architecture, x_ptr=x, weight_ptr=weight, bias_ptr=bias, state_ptr=state,
        new_state_ptr=new, y_ptr=y, rows=rows, K=k, TAPS=taps, M=16, BK=64)  # fmt: skip
    expected, expected_state = ops.conv1d(x, state, weight, bias)
    assert_bits(expected, y)
    assert_bits(expected_state, new)


@pytest.mark.parametrize("architecture", RUN)
@pytest.mark.parametrize(("lanes", "channels", "warps"), [(1, 32, 1), (4, 16, 2)])
@pytest.mark.parametrize("decays", [True, False])
def test_the_scan_and_its_gate_have_their_bits(decays: bool, lanes: int, channels: int, warps: int, architecture: str) -> None:
    e, n, lengths = 48, 16, (9, 3)
    rows = sum(lengths)

    def normal(*shape: int) -> F32Array:
        return RNG.standard_normal(shape).astype(np.float32)

    u, z, bc, D, h = normal(rows, e), normal(rows, e), normal(rows, 2 * n), normal(e), normal(2, e, n)
    delta, A = np.abs(normal(rows, e)) * np.float32(2), -np.exp(normal(e, n) * 2)
    A[0, :3] = -0.0, -3e38, -100
    y, new = np.empty_like(u), np.empty_like(h)
    run(layers.scan_kernel, (-(-e // channels), 2), warps, architecture, u_ptr=u, delta_ptr=delta, B_ptr=bc[:, :n].copy(),
        C_ptr=bc[:, n:].copy(), bc_stride=n, z_ptr=z, z_stride=e, A_ptr=A, D_ptr=D, h_ptr=h, new_h_ptr=new, h_stride=e * n,
        start_ptr=np.array([0, 9], np.int32), length_ptr=np.array(lengths, np.int32),
        y_ptr=y, channels=e, DECAYS=decays, STATES=n, N=n,
        LANES=lanes, BE=channels)  # fmt: skip
    for b, now in enumerate((slice(0, 9), slice(9, 12))):
        with np.errstate(over="ignore"):
            expected, state = ops.selective_scan(u[now], delta[now], A, bc[now, :n], bc[now, n:], D, h[b])
        assert_bits(ops.gate(expected, z[now]), y[now])
        assert_bits(state, new[b])


@pytest.mark.parametrize("architecture", RUN)
def test_a_sum_has_its_bits(architecture: str) -> None:
    x, y = RNG.standard_normal((6, 100)).astype(np.float32), np.empty(6, np.float32)
    run(alone.tree_sum_kernel, (2,), 4, architecture, x_ptr=x, y_ptr=y, rows=6, K=100, M=4, WIDTH=128)
    assert_bits(arith.tree_sum(x), y)


def test_one_kernel_of_each_kind_is_exact_on_every_architecture() -> None:
    kinds: dict[tuple[Any, ...], Configuration] = {}
    for configuration in configurations([2560], ["fp32", "int8"]):
        constants = dict(configuration.constants)
        kind = [constants.get(name) for name in ("SOURCE", "OP", "CODER", "DIGITS", "PLANES", "PACKED", "LANES")]
        kinds.setdefault((configuration.kernel.__name__, *kind), configuration)
    for i, configuration in enumerate(kinds.values()):  # every configuration on each of them: make gpu-proof
        ptx = compiled(configuration, ARCHITECTURES[i % len(ARCHITECTURES)]).asm["ptx"]
        assert faults(ptx) == [], configuration.name


class Fault(NamedTuple):
    """An edit of a module of kernels, the kernel that shows it, and its arguments beside x and y."""

    module: str
    old: str
    new: str
    kernel: str
    arguments: dict[str, Any]


ELEMENTWISE: dict[str, Any] = {"z_ptr": None, "n": 600, "largest": 0.0, "BLOCK": 1024}
NORM: dict[str, Any] = {"weight_ptr": torch.ones(100), "eps": 1e-5, "rows": 6, "K": 100, "M": 4, "WIDTH": 128}
# A fault in the text of the PTX, by what is found there.
PLANTED = {
    "div.full": Fault("arithmetic", "tl.div_rn(x, tl.broadcast_to(y, x.shape))", "x / y", "elementwise_kernel",
                      ELEMENTWISE | {"OP": "silu"}),
    "sqrt.approx": Fault("layers", "tl.sqrt_rn(mean + eps)", "tl.sqrt(mean + eps)", "rms_norm_kernel", NORM),
    "ex2.approx": Fault("arithmetic", "divide(x, 1.0 + exp(-x))", "divide(x, 1.0 + tl.exp(-x))", "elementwise_kernel",
                        ELEMENTWISE | {"OP": "silu"}),
    "max.f32": Fault("arithmetic", "tl.where(x < 0.0, 0.0, x) + log1p", "tl.maximum(x, 0.0) + log1p", "elementwise_kernel",
                     ELEMENTWISE | {"OP": "softplus"}),
    "max": Fault("alone", "shifted = x - m", "shifted = x - tl.max(x, 0)", "log_softmax_kernel", {"N": 100, "WIDTH": 128}),
}  # fmt: skip


def planted(folder: Path, fault: Fault) -> Any:
    """The kernel in a copy of the kernels with one edit."""
    package = folder / f"planted_{uuid.uuid4().hex}"
    package.mkdir()
    for file in Path(str(alone.__file__)).parent.glob("*.py"):
        text = file.read_text("utf-8").replace("refmamba.backends.triton.kernels", package.name)
        if file.stem == fault.module:
            assert text.count(fault.old) == 1
            text = text.replace(fault.old, fault.new)
        (package / file.name).write_text(text, "utf-8")
    sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(f"{package.name}.alone"), fault.kernel)
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("instruction", PLANTED)
def test_a_fault_is_found_in_the_text(instruction: str, tmp_path: Path) -> None:
    fault, x = PLANTED[instruction], torch.zeros(6, 100)
    arguments = fault.arguments | {"x_ptr": x, "y_ptr": x}
    right = specialized(getattr(alone, fault.kernel), 4, 2, arguments)
    wrong = specialized(planted(tmp_path, fault), 4, 2, arguments)
    assert faults(compiled(right, "sm_90").asm["ptx"]) == []
    found = faults(compiled(wrong, "sm_90").asm["ptx"])
    assert any(line.startswith(instruction) for line in found), found


def test_a_fault_is_found_when_it_runs(tmp_path: Path) -> None:
    fault = Fault("arithmetic", "first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, half]), (0, 2, 1)))",
                  "first, second = tl.split(tl.reshape(x, [ROWS, half, 2]))", "tree_sum_kernel", {})  # fmt: skip
    x = RNG.standard_normal((6, 100)).astype(np.float32)
    for kernel, edit in (
        ("tree", fault),
        ("sum", fault._replace(module="alone", old="tree(x, M, WIDTH), mask", new="tl.sum(x, 1), mask")),
    ):
        y = np.empty(6, np.float32)
        ptx = run(planted(tmp_path, edit), (2,), 4, "sm_90", x_ptr=x, y_ptr=y, rows=6, K=100, M=4, WIDTH=128)
        assert faults(ptx) == [], kernel  # the text is as good as before
        assert np.any(arith.tree_sum(x) != y), kernel


def test_fusion_is_found() -> None:
    x = torch.zeros(600)
    configuration = specialized(alone.elementwise_kernel, 4, 2, {"x_ptr": x, "z_ptr": None, "y_ptr": x, "n": 600,
                                "largest": 0.0, "OP": "exp", "BLOCK": 1024})  # fmt: skip
    assert faults(compiled(configuration, "sm_90").asm["ptx"]) == []
    fused = compiled(configuration, "sm_90", enable_fp_fusion=True).asm["ptx"]
    assert any("fused" in fault for fault in faults(fused))
