"""The codes of a weight as the kernels read them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backends.cpu.kernels.bound import WEIGHT_NORM_ROOM
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.tables import BYTES_OFFSET, FIXED_OFFSET, PACKED_OFFSET, Kind
from refmamba.backends.cpu.memory import Arena, strips_of
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.codes import Codes, FixedPoint, Param

PACK_ROWS = 4096  # rows of a weight packed at a time, to bound memory
OFFSET = {Kind.PACKED: PACKED_OFFSET, Kind.GROUPED: PACKED_OFFSET, Kind.BYTES: BYTES_OFFSET, Kind.FIXED: FIXED_OFFSET}
HALVES = (Kind.PACKED, Kind.GROUPED)  # two codes a byte


def padded_rows(*parts: int) -> IntArray:
    """Which row of a weight stands where, -1 for a row of zeros: each part begins a strip, and the strips are paired."""
    rows: list[IntArray] = []
    start = 0
    for part in parts:
        rows.append(np.r_[start : start + part, np.full(-part % LANES, -1)])
        start += part
    order = np.concatenate(rows)
    return np.concatenate([order, np.full(-len(order) % (2 * LANES), -1)]).astype(np.int64)


def kind_of(w: Codes | FixedPoint) -> int:
    """How a weight's codes are stored."""
    if isinstance(w, FixedPoint):
        return int(Kind.FIXED)
    if w.steps is not None:
        return int(Kind.GROUPED)
    return int(Kind.PACKED if w.bits <= 4 else Kind.BYTES)


def packed_bytes(w: Codes | FixedPoint, rows: int) -> int:
    """Bytes of a weight's digits, for so many rows."""
    k, kind = strips_of(w.q.shape[1]) * LANES, kind_of(w)
    return rows * k // 2 if kind in HALVES else rows * k * (3 if kind == Kind.FIXED else 1)


def pack(w: Codes | FixedPoint, order: IntArray, out: NDArray[np.uint8]) -> None:
    """Write a weight's digits in the layout of `kernels.tiles.tile`: (strips, planes, groups of columns, 16, 4)."""
    kind, columns = kind_of(w), w.q.shape[1]
    k = strips_of(columns) * LANES
    done = 0
    for start in range(0, len(order), PACK_ROWS):
        rows = order[start : start + PACK_ROWS]
        q = np.zeros((len(rows), k), np.uint32 if kind == Kind.FIXED else np.uint8)
        q[rows >= 0, :columns] = w.q[rows[rows >= 0]].astype(q.dtype)
        q += q.dtype.type(OFFSET[Kind(kind)])
        strips = len(rows) // LANES
        if kind in HALVES:
            groups = q.reshape(strips, LANES, k // 8, 2, 4)
            digits = (groups[:, :, :, 0] | groups[:, :, :, 1] << 4).transpose(0, 2, 1, 3)
        elif kind == Kind.BYTES:
            digits = q.reshape(strips, LANES, k // 4, 4).transpose(0, 2, 1, 3)
        else:
            planes = q.astype("<u4").view(np.uint8).reshape(strips, LANES, k // 4, 4, 4)
            digits = planes[..., :3].transpose(0, 4, 2, 1, 3)
        out[done : done + digits.size].reshape(digits.shape)[...] = digits
        done += digits.size


def pack_steps(steps: NDArray[np.uint8], order: IntArray, arena: Arena) -> NDArray[np.uint8]:
    """The steps (rows, groups) of a weight in groups as the kernels read them: (strips, groups, 16), 1 for a row of zeros."""
    packed = arena.empty((len(order) // LANES, steps.shape[1], LANES), np.uint8)
    packed.swapaxes(1, 2)[...] = np.where(order[:, None] >= 0, steps[order], 1).reshape(-1, LANES, steps.shape[1])
    return packed


def unpack(kind: int, k: int, digits: NDArray[np.uint8], places: IntArray) -> IntArray:
    """The codes that `pack` wrote at some places of its order, padding included: (len(places), k)."""
    planes = 1 if kind != Kind.FIXED else 3
    groups = digits.reshape(-1, planes, k // (8 if kind in HALVES else 4), LANES, 4)
    chosen = groups[places // LANES, :, :, places % LANES]
    if kind == Kind.FIXED:
        values = chosen.astype(np.int32) << np.array([0, 8, 16], np.int32)[:, None, None]
        fixed: IntArray = values.sum(axis=1, dtype=np.int32).reshape(len(places), k) - np.int32(OFFSET[Kind.FIXED])
        return fixed
    q = np.stack([chosen & 15, chosen >> 4], axis=3) if kind in HALVES else chosen
    codes: IntArray = (q.reshape(len(places), k) - np.uint8(OFFSET[Kind(kind)])).view(np.int8)
    return codes


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight whose codes lie packed in a runner's memory. scale: the weight's, or its exponents in fixed point."""

    digits: NDArray[np.uint8]
    places: IntArray  # of each row in the order of packing
    kind: int
    columns: int
    bits: int  # 0 in fixed point
    scale: NDArray[Any]
    norms: F32Array  # of the rows in fixed point, none too small; else 0: their products need no bound of an error
    steps: NDArray[np.uint8] | None = None  # of a weight in groups: `pack_steps`
    group: int = 0

    @classmethod
    def of(cls, w: Codes | FixedPoint, order: IntArray, arena: Arena) -> "Packed":
        """Pack a weight."""
        digits = arena.empty((packed_bytes(w, len(order)),), np.uint8)
        pack(w, order, digits)
        places = np.flatnonzero(order >= 0)  # the order keeps the rows' own
        columns = w.q.shape[1]
        if isinstance(w, FixedPoint):
            squares = np.einsum("ij,ij->i", w.q, w.q, dtype=np.float64)
            norms = (np.sqrt(squares) * WEIGHT_NORM_ROOM).astype(np.float32)
            return cls(digits, places, kind_of(w), columns, 0, w.exponent, norms)
        steps, no_norms = None if w.steps is None else pack_steps(w.steps, order, arena), np.zeros((), np.float32)
        return cls(digits, places, kind_of(w), columns, w.bits, w.scale, no_norms, steps, w.group)

    def rows(self, rows: IntArray) -> Codes | FixedPoint:
        """Some rows of the weight."""
        places = self.places[rows]
        q = unpack(self.kind, strips_of(self.columns) * LANES, self.digits, places)[:, : self.columns]
        scale = self.scale[rows] if self.scale.ndim else self.scale
        if self.kind == Kind.FIXED:
            return FixedPoint(q, scale)
        steps = None if self.steps is None else self.steps[places // LANES, :, places % LANES]
        return Codes(q, scale, self.bits, steps, self.group)

    def param(self) -> Codes | FixedPoint:
        """The weight again."""
        return self.rows(np.arange(len(self.places)))


class Params(Mapping[str, Param]):
    """A loaded model's parameters: the weights of products are unpacked when they are asked for, as they are held once."""

    def __init__(self, rest: Mapping[str, Param], packed: Mapping[str, Packed]) -> None:
        self._rest, self._packed = rest, packed

    def __getitem__(self, name: str) -> Param:
        return self._packed[name].param() if name in self._packed else self._rest[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._rest, *self._packed])

    def __len__(self) -> int:
        return len(self._rest) + len(self._packed)
