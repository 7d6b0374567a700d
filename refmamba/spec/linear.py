"""A linear layer under a scheme, resolved: all that a backend has to know of it (docs/SPEC.md, sections 2 and 3)."""

from dataclasses import dataclass

from refmamba.spec.arith import F32Array
from refmamba.spec.coders import Coder, Factor
from refmamba.spec.codes import dequantize, integer_product, rescale
from refmamba.spec.ops import add
from refmamba.spec.trace import Tracer
from refmamba.spec.transforms import Transform


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer, as `QuantizedModel.linear` resolves it.

    site: `layers.3.in_proj`, or `lm_head`. weight: the codes of the matrix (rows, K). transforms: of the input, in order,
    before it is coded. input: codes the factor of the product. output: codes the result, which is read back at once; None
    where the scheme does not. bias: float32 (rows,); None where there is none, or where it is not added here (dt_proj's
    belongs to eq. 18).
    """

    site: str
    weight: Factor
    transforms: tuple[Transform, ...]
    input: Coder
    output: Coder | None
    bias: F32Array | None

    def __call__(self, x: F32Array, do: Tracer) -> F32Array:
        """The layer's output, eq. (7) to (13).

        # SHAPES   x (L, K) -> (L, rows)
        # COMPUTE  transform and code the input, multiply integers, rescale, code and read back the output, add the bias
        # OUTPUT   float32
        """
        site = self.site
        do.see(f"{site}.in", x)
        for n, transform in enumerate(self.transforms):
            operation, arguments = transform.call(x, f"{site}.in")
            x = do(numbered(f"{site}.transformed", n), operation, *arguments)
        y: F32Array | None = None
        for n, (operation, arguments) in enumerate(self.input.calls(x, f"{site}.in")):
            codes = do(numbered(f"{site}.in_codes", n), operation, *arguments)
            acc = do(numbered(f"{site}.acc", n), integer_product, codes, self.weight)
            value: F32Array = do(numbered(f"{site}.result", n), rescale, acc, codes, self.weight)
            y = value if y is None else do(numbered(f"{site}.sum", n - 1), add, y, value)
        assert y is not None
        if self.output is not None:
            [(operation, arguments)] = self.output.calls(y, f"{site}.result")
            y = do(f"{site}.out_value", dequantize, do(f"{site}.out_codes", operation, *arguments))
        if self.bias is None:
            do.see(f"{site}.out", y)
            return y
        biased: F32Array = do(f"{site}.out", add, y, self.bias)
        return biased


def numbered(site: str, n: int) -> str:
    """The first of several has no number, the second is _2."""
    return f"{site}_{n + 1}" if n else site
