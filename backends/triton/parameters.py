"""The parameters of a model on a device: the codes of its matrices, and how each linear layer codes what it reads."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refmamba.backends.adapter import tensor
from refmamba.spec import coders, linear, transforms
from refmamba.spec import codes as spec
from refmamba.spec.arith import F32Array

KNOWN = frozenset({
    coders.ParameterPerTensor, coders.ParameterPerChannel, coders.ParameterGrouped, coders.PerToken, coders.PerTensor,
    coders.Static, coders.Flattened, coders.PerTokenOutliers, transforms.Smooth, transforms.Hadamard,
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Coding:
    """How the kernels code one part of one side of a linear layer: CODER and PART, and what they need."""

    coder: str
    largest: float = 0.0
    static: Tensor | None = None  # (2,): the factor of the codes, and the scale
    part: str = "all"
    threshold: float = 0.0

    @property
    def digits(self) -> int:
        """Eight-bit digits of a code."""
        return 4 if self.coder in ("fixed_point", "flattened") else 1

    @property
    def of_a_step(self) -> str:
        """CODER where a sequence is one token."""
        return "per_token" if self.coder == "per_sequence" else self.coder


def codings_of(coder: coders.Coder, device: torch.device) -> list[Coding]:
    """This backend's form of one of the specification's coders: a Coding for each part."""

    def largest(bits: int) -> float:
        return float(2 ** (bits - 1) - 1)

    def static(absmax: F32Array, bits: int) -> Tensor:
        zero = absmax < spec.ABSMAX_ZERO
        scale = spec.scale_of(np.where(zero, np.float32(0), absmax), bits)
        return tensor(np.array([0 if zero else scale, scale], np.float32), device)

    match coder:
        case coders.PerToken(bits=bits):
            return [Coding("per_token", largest(bits))]
        case coders.PerTensor(bits=bits):
            return [Coding("per_sequence", largest(bits))]
        case coders.Static(bits=bits, absmax=absmax):
            return [Coding("static", largest(bits), static(absmax, bits))]
        case coders.Flattened(bits=bits, absmax=absmax):
            return [Coding("flattened", static=static(absmax, bits))]
        case coders.PerTokenOutliers(bits=bits, threshold=threshold):
            limit = float(np.float32(threshold))
            below = Coding("per_token", largest(bits), part="below", threshold=limit)
            return [below, Coding("fixed_point", part="outliers", threshold=limit)]
        case _:
            return [Coding("fixed_point")]


@dataclass(frozen=True, eq=False)
class Weight:
    """The codes of a matrix: digits int8 (planes, rows, columns), or eq. (14)'s bytes; a scale or exponent for each row."""

    digits: Tensor
    scale: Tensor
    rows: int
    columns: int
    packed: bool = False
    steps: Tensor | None = None  # uint8 (rows, ceil(columns / group)), eq. (30)
    group: int = 0

    @property
    def planes(self) -> int:
        """Eight-bit digits of a code."""
        return 1 if self.packed else len(self.digits)


def weight_of(codes: spec.Codes | spec.FixedPoint, device: torch.device) -> Weight:
    """A matrix's codes on the device."""
    rows, columns = codes.q.shape
    if isinstance(codes, spec.FixedPoint):
        shifted = tensor(codes.q, device) + 0x8080  # the balanced digits, the two low ones each 128 too large
        digits = torch.stack([*(((shifted >> at) & 255) - 128 for at in (0, 8)), shifted >> 16]).to(torch.int8)
        return Weight(digits, tensor(codes.exponent, device), rows, columns)
    scale = tensor(np.broadcast_to(codes.scale.reshape(-1), rows), device)
    steps = None if codes.steps is None else tensor(codes.steps, device)
    q = spec.pack4(codes.q) if codes.bits <= 4 else codes.q[None]
    return Weight(tensor(q, device), scale, rows, columns, codes.bits <= 4, steps, codes.group)


@dataclass(frozen=True, eq=False)
class Table:
    """An embedding that stays float32, (rows, columns), as a Weight of which only rows are read."""

    digits: Tensor
    scale: None = None
    packed: bool = False
    steps: None = None
    group: int = 0


def table_of(embedding: spec.Param, device: torch.device) -> Weight | Table:
    """The embedding on the device."""
    if isinstance(embedding, spec.Codes | spec.FixedPoint):
        return weight_of(embedding, device)
    return Table(tensor(embedding, device))


@dataclass(frozen=True, eq=False)
class Linear:
    """linear.Linear on the device. number: of its `in` side among all sites that make codes; its `out` side has the next."""

    site: str
    number: int
    weight: Weight
    transforms: list[Tensor | None]  # exponents of a division, eq. (29); None: a rotation, eq. (31)
    input: list[Coding]
    output: Coding | None
    bias: Tensor | None

    @property
    def plain(self) -> bool:
        """Nothing but the codes of one part: what scan_step_kernel takes."""
        return not self.transforms and len(self.input) == 1 and self.output is None


def linear_of(layer: linear.Linear, number: int, device: torch.device) -> Linear:
    """A linear layer on the device."""
    changes = [tensor(t.exponents, device) if isinstance(t, transforms.Smooth) else None for t in layer.transforms]
    (output,) = [None] if layer.output is None else codings_of(layer.output, device)
    bias = None if layer.bias is None else tensor(layer.bias, device)
    return Linear(layer.site, number, weight_of(layer.weight, device), changes, codings_of(layer.input, device), output, bias)
