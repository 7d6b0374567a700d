"""A recorded forward for the page: every operation's arguments and results, where the model is too large to be carried."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.trace import Step, Trace

INT32_MAX = 2**31 - 1
DTYPES = {"float32": "<f4", "float64": "<f8", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "uint8": "u1"}


class Blob:
    """Arrays one after the other, each of them once. A reference to an array is its dtype, its shape and its place in bytes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._places: dict[tuple[str, bytes], int] = {}

    def put(self, array: NDArray[Any]) -> dict[str, Any]:
        """The array's reference. Whole numbers are kept as int32 where those hold all of them: a sum is written as float64."""
        if array.dtype in (np.float64, np.int64) and np.all(array == np.rint(array)) and np.all(np.abs(array) <= INT32_MAX):
            array = array.astype(np.int32)
        dtype = DTYPES[array.dtype.name]
        content = np.ascontiguousarray(array, dtype).tobytes()
        if (dtype, content) not in self._places:
            self.data += bytes(-len(self.data) % 8)  # typed arrays start at multiples of their width
            self._places[dtype, content] = len(self.data)
            self.data += content
        return {"array": [array.dtype.name, list(array.shape), self._places[dtype, content]]}

    def value(self, value: Any, *, matrix: bool = False) -> Any:
        """A value of a trace as JSON values. matrix: a weight, of which only scales and exponents are kept."""
        if isinstance(value, Codes):
            q = None if matrix else self.put(value.integers())
            return {"q": q, "scale": self.put(value.scale), "bits": value.bits}
        if isinstance(value, FixedPoint):
            return {"q": None if matrix else self.put(value.q), "exponent": self.put(value.exponent)}
        if isinstance(value, np.ndarray | np.generic):
            return self.put(np.asarray(value))
        return [self.value(part) for part in value] if isinstance(value, tuple) else value

    def step(self, step: Step) -> dict[str, Any]:
        """A step of a trace. Of the embedding only the rows that were looked up."""
        arguments = [
            self.value(argument, matrix=(step.operation, place) in (("integer_product", 1), ("rescale", 2)))
            for place, argument in enumerate(step.arguments)
            if step.operation != "embed"
        ]
        if step.operation == "embed":
            tokens, embedding = step.arguments
            looked_up = embedding.rows(tokens) if isinstance(embedding, Codes) else embedding[tokens]
            arguments = [list(range(len(tokens))), self.value(looked_up)]
        return {
            "operation": step.operation, "arguments": arguments, "sites": step.sites, "result": self.value(step.result),
        }  # fmt: skip

    def trace(self, trace: Trace) -> list[dict[str, Any]]:
        """All steps."""
        return [self.step(step) for step in trace]
