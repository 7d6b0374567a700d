"""Vectors of 16 lanes as numba types, and how one LLVM instruction on them becomes a function that kernels can call.

numba's own vectorizer decides anew for every loop; here each vector operation is one LLVM instruction on <16 x T>, which
LLVM cuts to whatever registers the machine has. No operation carries a fast-math flag, so none is fused or reordered.
Memory is named by address (int64): the kernels see no arrays, so nothing is bounds-checked, aliased or counted.
"""

import operator
import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16
X86 = platform.machine().lower() in ("x86_64", "amd64")
# What numba compiles for: the host's features unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise.
FEATURES = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
i8, i16, i32, i64, f32, f64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):  # type: ignore[misc]
    """16 lanes of one LLVM type."""

    def __init__(self, name: str, lane: ir.Type) -> None:
        super().__init__(name)
        self.lane, self.llvm = lane, ir.VectorType(lane, LANES)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is an LLVM value."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


F, D = Vector("F", f32), Vector("D", f64)  # float32, float64
I, L = Vector("I", i32), Vector("L", i64)  # int32, int64  # noqa: E741
M = Vector("M", ir.IntType(1))  # the result of a comparison


def operation(symbol: Any, instructions: dict[Vector, str], result: Vector | None = None) -> None:
    @type_callable(symbol)
    def typing(context: Any) -> Callable[..., Any]:
        return lambda a, b: (result or a) if isinstance(a, Vector) and a == b and a in instructions else None

    @lower_builtin(symbol, Vector, Vector)
    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, *comparison = instructions[signature.args[0]].split()
        return getattr(builder, name)(*comparison, *arguments)


operation(operator.add, {F: "fadd", D: "fadd", I: "add", L: "add"})
operation(operator.sub, {F: "fsub", D: "fsub", I: "sub", L: "sub"})
operation(operator.mul, {F: "fmul", D: "fmul", I: "mul", L: "mul"})
operation(operator.truediv, {F: "fdiv"})
operation(operator.and_, {I: "and_", L: "and_", M: "and_"})
operation(operator.xor, {I: "xor"})
operation(operator.lshift, {I: "shl", L: "shl"})
operation(operator.rshift, {I: "ashr", L: "ashr"})
operation(operator.gt, {F: "fcmp_ordered >", I: "icmp_signed >"}, M)
operation(operator.ge, {F: "fcmp_ordered >="}, M)
operation(operator.le, {F: "fcmp_ordered <="}, M)
operation(operator.lt, {F: "fcmp_ordered <"}, M)


def machine(result: types.Type, *parameters: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """An intrinsic of fixed types from a function (builder, *values) -> value."""

    def wrap(build: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = build(builder, *arguments)
            return context.get_dummy_value() if result is types.void else value

        names = [f"a{i}" for i in range(len(parameters))]
        scope = {"signature": result(*parameters), "codegen": codegen}
        # numba wants an intrinsic's parameters by name.
        exec(f"def {build.__name__}(typingctx, {', '.join(names)}): return signature, codegen", scope)
        return intrinsic(scope[build.__name__])

    return wrap


def to_pointer(builder: Any, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def load(builder: Any, address: Any, of: ir.Type, align: int) -> Any:
    return builder.load(to_pointer(builder, address, of), align=align)


def call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments)


def splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(i32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))


def pick(builder: Any, vector: Any, lanes: range) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, len(lanes)), list(lanes)))
