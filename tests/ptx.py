"""Runs the PTX of a Triton kernel on NumPy: what the compiler made of it, without a GPU.

Every register of a block is an array over its threads. Only what IEEE 754 and the PTX manual define in one way is known: a
fused multiply-add, an approximation, a flush to zero or any other instruction is an error. Branches must be taken by all
threads of a block or by none, which is how Triton compiles loops over whole tiles. No tensor cores, no asynchronous copies.
"""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
LANES = 32  # threads of a warp
TYPES: dict[str, Any] = {
    "f32": np.float32, "f64": np.float64, "s8": np.int8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32,
    "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "pred": np.bool_,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add.rn.f32": operator.add, "sub.rn.f32": operator.sub, "mul.rn.f32": operator.mul, "div.rn.f32": operator.truediv,
    "add.s32": operator.add, "sub.s32": operator.sub, "add.s64": operator.add, "sub.s64": operator.sub,
    "mul.lo.s16": operator.mul, "mul.lo.s32": operator.mul, "mul.lo.s64": operator.mul,
    "min.s32": np.minimum, "max.s32": np.maximum, "min.s64": np.minimum,
}  # fmt: skip
LOGIC: dict[str, Callable[[Any, Any], Any]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip


class Statement(NamedTuple):
    """An instruction: its predicate (`!%p1`, `%p1` or nothing), its name, its operands, and its text."""

    predicate: str
    operation: str
    operands: list[str]
    text: str


def parse(ptx: str, name: str) -> tuple[list[Statement], dict[str, int]]:
    """The instructions of a kernel, and where its labels are."""
    body = ptx[ptx.index(f".entry {name}(") :]
    body = re.sub(r"//.*", "", body[body.index("{\n") + 2 : body.index("\n}")])
    body = re.sub(r"^\s*\.(?:loc|reg|shared|file|pragma)\b.*$", "", body, flags=re.M)
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for part in re.split(r";|(?<=:)\n", body):
        text = " ".join(part.split())
        while label := re.match(r"(\$\w+):\s*", text):
            labels[label[1]] = len(statements)
            text = text[label.end() :]
        text = text.removeprefix("{ ").removeprefix("} ").strip() if not re.match(r"[{}]?\s*$", text) else ""
        if match := re.match(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", text):
            operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", match[3]) if x.strip()]
            statements.append(Statement(match[1] or "", match[2], operands, text))
    return statements, labels


class Block:
    """The threads of one block."""

    def __init__(self, threads: int, at: tuple[int, int], parameters: Sequence[Any], memory: NDArray[np.uint8]) -> None:
        self.threads, self.parameters, self.memory = threads, parameters, memory
        self.shared = np.zeros(1 << 17, np.uint8)
        self.registers: dict[str, Values] = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ctaid.x": np.full(threads, at[0], np.uint32),
            "%ctaid.y": np.full(threads, at[1], np.uint32),
            "global_smem": np.zeros(threads, np.uint32),
        }

    def read(self, operand: str, kind: str) -> Values:
        """An operand's values as a type of PTX."""
        dtype = np.dtype(TYPES[kind])
        if operand in self.registers:
            values = self.registers[operand]
        elif operand.startswith("0f"):
            values = np.full(self.threads, int(operand[2:], 16), np.uint32)
        else:
            values = np.full(self.threads, int(operand.removesuffix("U"), 0), np.int64)
        if kind == "pred":
            return values.astype(bool)
        if values.dtype.itemsize > dtype.itemsize:
            values = values.astype(f"u{values.dtype.itemsize}").astype(f"u{dtype.itemsize}")
        elif values.dtype.itemsize < dtype.itemsize:
            raise NotImplementedError(f"{operand} is narrower than {kind}")
        return values.view(dtype)

    def write(self, register: str, values: Values, active: NDArray[np.bool_] | None = None) -> None:
        """Set a register, for the active threads only."""
        values = np.ascontiguousarray(values)
        values = values if values.dtype == np.bool_ else values.view(f"u{values.dtype.itemsize}")
        if active is not None and register in self.registers:
            values = np.where(active, values, self.registers[register])
        self.registers[register] = values

    def addresses(self, operand: str) -> NDArray[np.int64]:
        """The bytes that `[register + offset]` names."""
        match = re.match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match, operand
        base = self.registers[match[1]]
        return base.astype(np.int64) + int(match[2] or 0)

    def move(self, s: Statement, active: NDArray[np.bool_] | None) -> None:
        """ld and st, of one register or several."""
        load = s.operation.startswith("ld")
        where = self.memory if ".global" in s.operation else self.shared
        registers, address = s.operands if load else s.operands[::-1]
        width = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}[s.operation.rpartition(".")[2]]
        lanes = np.ones(self.threads, bool) if active is None else active
        start = self.addresses(address)[lanes]
        for i, register in enumerate(registers.strip("{} ").split(",")):
            bytes_at = start[:, None] + i * width + np.arange(width)
            if load:
                values = np.zeros((self.threads, width), np.uint8)
                values[lanes] = where[bytes_at]
                self.write(register.strip(), values.view(f"u{width}")[:, 0], active)
            else:
                kind = {1: "s8", 2: "b16", 4: "b32", 8: "b64"}[width]
                where[bytes_at] = self.read(register.strip(), kind)[lanes].view(np.uint8).reshape(-1, width)

    def matrices(self, s: Statement) -> None:
        """ldmatrix and stmatrix: eight rows of 16 bytes a matrix, whose addresses eight threads give; a thread has two halves
        of a word of row t / 4."""
        load, count = s.operation.startswith("ld"), int(s.operation.split(".x")[1][0])
        assert ".trans" not in s.operation, s.text
        registers, address = s.operands if load else s.operands[::-1]
        lane, warp = np.arange(self.threads) % LANES, np.arange(self.threads) // LANES * LANES
        addresses = self.addresses(address)
        for i, register in enumerate(registers.strip("{} ").split(",")[:count]):
            row = addresses[warp + 8 * i + lane // 4]
            bytes_at = row[:, None] + (4 * (lane % 4))[:, None] + np.arange(4)
            if load:
                self.write(register.strip(), np.ascontiguousarray(self.shared[bytes_at]).view(np.uint32)[:, 0])
            else:
                self.shared[bytes_at] = self.read(register.strip(), "b32").view(np.uint8).reshape(-1, 4)

    def compute(self, s: Statement) -> Values:
        """The value of every other instruction. Raises NotImplementedError."""
        name, _, kind = s.operation.partition(".")
        last = s.operation.rpartition(".")[2]

        def get(i: int, of: str = last) -> Values:
            return self.read(s.operands[i], of)

        if s.operation in ARITHMETIC:
            return np.asarray(ARITHMETIC[s.operation](get(1), get(2)))
        if name in LOGIC:
            return np.asarray(LOGIC[name](get(1), get(2)))
        if name == "mov":
            return get(1)
        if name == "setp":
            return np.asarray(COMPARISONS[kind.split(".")[0]](get(1), get(2)))
        if name == "selp":
            return np.where(get(3, "pred"), get(1), get(2))
        if name in ("mul", "mad") and kind.startswith("wide"):
            wide = np.int64 if last == "s32" else np.uint64
            product = get(1).astype(wide) * get(2).astype(wide)
            return np.asarray(
                product + self.read(s.operands[3], "s64" if last == "s32" else "u64") if name == "mad" else product
            )
        if s.operation in ("mad.lo.s32", "mad.lo.s64"):
            return np.asarray(get(1) * get(2) + get(3))
        if name in ("shl", "shr"):
            return np.asarray((np.left_shift if name == "shl" else np.right_shift)(get(1), get(2, "u32").astype(get(1).dtype)))
        if name == "bfe":
            field = (get(1, "u32") >> get(2, "u32")) & ((np.uint32(1) << get(3, "u32")) - np.uint32(1))
            top = np.uint32(1) << (get(3, "u32") - np.uint32(1))
            return np.asarray(field if last == "u32" else (field ^ top) - top)
        if s.operation == "prmt.b32":
            chosen = get(3, "u32")
            assert not np.any(chosen & 0x8888), s.text  # no byte's sign
            high = get(2, "u32").astype(np.uint64) if np.any(chosen & 0x4444) else np.uint64(0)  # else it may be undefined
            both = get(1, "u32") | high << np.uint64(32)
            places = ((chosen[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 7).astype(np.intp)
            return np.take_along_axis(both.view(np.uint8).reshape(-1, 8), places, 1).view(np.uint32)[:, 0]
        if name == "shfl":
            return self.shuffled(s)
        if s.operation in ("redux.sync.min.s32", "redux.sync.max.s32"):  # of whole warps
            assert np.all(get(2, "u32") == 0xFFFFFFFF), s.text
            of_a_warp = get(1).reshape(-1, LANES)
            return np.repeat(of_a_warp.min(1) if ".min" in s.operation else of_a_warp.max(1), LANES)
        unary: dict[str, Callable[[], Any]] = {
            "neg.f32": lambda: get(1, "u32") ^ np.uint32(1 << 31),
            "abs.f32": lambda: get(1, "u32") & np.uint32(0x7FFFFFFF),
            "sqrt.rn.f32": lambda: np.sqrt(get(1)),
            "neg.s32": lambda: -get(1),
            "not.pred": lambda: ~get(1),
            "cvt.rn.f32.s32": lambda: get(1).astype(np.float32),
            "cvt.rzi.s32.f32": lambda: truncated(get(1)),
            "cvt.s64.s32": lambda: get(1).astype(np.int64),
            "cvt.u64.u32": lambda: get(1).astype(np.uint64),
            "cvt.u32.u64": lambda: get(1).astype(np.uint32),
            "cvt.u16.u32": lambda: get(1).astype(np.uint16),
            "cvt.u32.u16": lambda: get(1).astype(np.uint32),
            "cvt.s16.s8": lambda: get(1).astype(np.int16),
        }
        if s.operation in unary:
            return np.asarray(unary[s.operation]())
        raise NotImplementedError(s.text)

    def shuffled(self, s: Statement) -> Values:
        """shfl.sync, of whole warps."""
        assert s.operands[3:] == ["31", "-1"], s.text
        lane, by = np.arange(self.threads), self.read(s.operands[2], "u32").astype(np.int64)
        source = {"bfly": lane ^ by, "idx": lane // LANES * LANES + by}[s.operation.split(".")[2]]
        return np.asarray(self.read(s.operands[1], "b32")[source])

    def run(self, statements: Sequence[Statement], labels: dict[str, int]) -> None:
        """All threads, one instruction after the other."""
        at = 0
        while at < len(statements):
            s = statements[at]
            at += 1
            active = None
            if s.predicate:
                active = self.registers[s.predicate.removeprefix("!")] ^ s.predicate.startswith("!")
            name = s.operation.partition(".")[0]
            if name == "bra":
                if active is None or active.all():
                    at = labels[s.operands[0]]
                elif active.any():
                    raise NotImplementedError(f"threads part: {s.text}")
            elif name == "ret":
                return
            elif s.operation.startswith("ld.param"):
                value = self.parameters[int(s.operands[1].rpartition("_")[2].strip("[] "))]
                wide = s.operands[0].startswith("%rd")  # ld.param.s32 may fill a 64-bit register
                self.write(s.operands[0], np.full(self.threads, np.int64(value) if wide else value))
            elif name in ("ldmatrix", "stmatrix"):
                self.matrices(s)
            elif name in ("ld", "st"):
                self.move(s, active)
            elif name == "atom":  # a failure is kept so; none is expected here
                if active is None or active.any():
                    raise NotImplementedError(s.text)
            elif name == "mov" and s.operands[0].startswith("{"):  # into parts, the low ones first; `_` is read by nobody
                parts, whole = s.operands[0].strip("{} ").split(","), self.read(s.operands[1], s.operation.rpartition(".")[2])
                halves = whole.view(f"u{whole.itemsize // len(parts)}").reshape(-1, len(parts))
                for register, values in zip(parts, halves.T, strict=True):
                    self.write(register.strip(), values, active)
            elif name not in ("bar", "membar", "fence"):  # in step anyway
                self.write(s.operands[0], self.compute(s), active)


def truncated(x: Values) -> Values:
    """cvt.rzi.s32.f32: toward zero, held within the integers, 0 for NaN."""
    wide = np.where(np.isnan(x), 0, x).astype(np.float64)
    return np.clip(np.trunc(wide), -(2**31), 2**31 - 1).astype(np.int32)


def launch(ptx: str, name: str, grid: tuple[int, ...], warps: int, arguments: Sequence[Any]) -> None:
    """Run a kernel. arguments: those that are no constants, in order; arrays are memory, and are changed in place."""
    at, places = 256, list[tuple[int, Values]]()
    parameters: list[Any] = []
    for value in arguments:
        if isinstance(value, np.ndarray):
            places.append((at, value))
            parameters.append(np.int64(at))
            at += -(-value.nbytes // 256) * 256 + 256  # each apart, and aligned as PyTorch's are
        else:
            parameters.append(np.float32(value) if isinstance(value, float) else np.int32(value))
    memory = np.zeros(at, np.uint8)
    for place, array in places:
        memory[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
    statements, labels = parse(ptx, name)
    scratch = [np.int64(0)] * 2  # Triton's own pointers, unused
    with np.errstate(all="ignore"):
        for y in range(grid[1] if len(grid) > 1 else 1):
            for x in range(grid[0]):
                Block(warps * LANES, (x, y), [*parameters, *scratch], memory).run(statements, labels)
    for place, array in places:
        array.reshape(-1).view(np.uint8)[:] = memory[place : place + array.nbytes]
