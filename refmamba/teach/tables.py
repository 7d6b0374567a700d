"""Small tables of what the specification holds: a scheme, a model's sizes, codes, a step of a trace, a trace.

`print(table_of(value))` anywhere; in a notebook they appear by themselves (`refmamba.teach.ipython`).
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.config import MambaConfig
from refmamba.spec.scheme import SITES, Scheme
from refmamba.spec.trace import Step, Trace

ROWS = 12  # that are shown of tokens, or of a weight's rows
STEPS = 32  # that are shown of a trace
VALUES = 8  # of a row
TITLES = {"weights": "weight", "inputs": "input", "outputs": "output"}


@dataclass(frozen=True)
class Table:
    """A title, column heads, rows of cells, and what is left out, in words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rest: str = ""

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (self.head, *self.rows)]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in lines), *([f"  {self.rest}"] if self.rest else [])])

    def html(self) -> str:
        """The same as an HTML table."""

        def line(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        caption, rest = html.escape(self.title), f"<p>{html.escape(self.rest)}</p>" if self.rest else ""
        body = "".join(line("td", row) for row in self.rows)
        return f"<table><caption>{caption}</caption><thead>{line('th', self.head)}</thead><tbody>{body}</tbody></table>{rest}"


@singledispatch
def table_of(value: object) -> Table:
    """The table of a Scheme, MambaConfig, Codes, FixedPoint, Step or Trace. Raises TypeError for anything else."""
    raise TypeError(f"there is no table of a {type(value).__name__}")


def _left_out(shown: int, count: int, what: str) -> str:
    return f"and {count - shown} more {what}" if count > shown else ""


def _first_values(values: NDArray[Any]) -> str:
    """The first values of a row."""
    first = [f"{value:d}" if values.dtype.kind in "iu" else f"{value:.4g}" for value in values[:VALUES]]
    return " ".join([*first, *(["…"] if len(values) > VALUES else [])])


def _scale(codes: Codes, row: int) -> np.float32:
    scales = codes.scale.ravel()
    return np.float32(scales[row if len(scales) > 1 else 0])


def _relative_error(read: NDArray[Any], x: NDArray[Any]) -> str:
    """The relative error of values that were read back."""
    size = float(np.sum(x.astype(np.float64) ** 2))
    return f"{100 * np.sqrt(float(np.sum((read - x.astype(np.float64)) ** 2)) / size):.3g} %" if size else "0"


@table_of.register
def _(value: Scheme) -> Table:
    rows = [(TITLES[part], site, *_quantizer(q)) for part in SITES for site, q in getattr(value, part).items()]
    rows += [("smoothed", site, "", f"alpha {alpha:g}") for site, alpha in value.smooth.items()]
    rows += [("rotated", site, "", "Hadamard") for site in value.rotate]
    title = f"scheme {value.name}" + ("" if rows else ": nothing is quantized")
    return Table(title, ("what", "where", "bits", "scale"), tuple(rows))


def _quantizer(quantizer: Any) -> tuple[str, str]:
    bits, _, rest = str(quantizer).partition(" bits, ")
    return bits, rest


@table_of.register
def _(value: MambaConfig) -> Table:
    sizes = [(field.name, str(getattr(value, field.name))) for field in fields(value)] + [("d_inner", str(value.d_inner))]
    count = sum(int(np.prod(shape)) for shape in value.shapes().values())
    return Table(f"Mamba, {count:,} parameters", ("size", "value"), tuple(sizes))


@table_of.register
def _(value: Codes) -> Table:
    q, codes = (np.atleast_2d(each) for each in (value.integers(), value.q))  # a norm's weight is one row
    (rows, columns) = q.shape
    largest = 2 ** (value.bits - 1) - 1
    lines = [
        (str(i), str(_scale(value, i)), str(len(np.unique(codes[i]))), f"{100 * np.mean(q[i] == 0):.1f} %", _first_values(q[i]))
        for i in range(min(rows, ROWS))
    ]
    per = "one scale" if value.scale.size == 1 else "a scale for each row"
    steps = "" if value.steps is None else f", a whole step for each {value.group} columns"
    title = f"{rows} x {columns} codes of {value.bits} bits, −{largest} to {largest}, {per}{steps}"
    head = ("row", "scale", "different", "zero", "code" if value.steps is None else "code · step")
    return Table(title, head, tuple(lines), _left_out(ROWS, rows, "rows"))


@table_of.register
def _(value: FixedPoint) -> Table:
    rows, columns = value.q.shape
    lines = [(str(i), str(value.exponent[i]), _first_values(value.q[i])) for i in range(min(rows, ROWS))]
    title = f"{rows} x {columns} numbers in fixed point, a power of two for each row"
    return Table(title, ("row", "exponent", "code"), tuple(lines), _left_out(ROWS, rows, "rows"))


@table_of.register
def _(value: Step) -> Table:
    result = value.values()[0][1]
    q = getattr(result, "q", result)
    lines = []
    for i in range(min(len(q), ROWS)):
        row = q[i].astype(np.int64) if value.operation == "integer_product" else q[i]
        lines.append((str(i), *_coding(value, i), f"{row.min():.6g}", f"{row.max():.6g}", _first_values(row)))
    title = f"{value.operation} gives {', '.join(value.sites)}"
    return Table(
        title, ("token", "scale", "error", "smallest", "largest", "values"), tuple(lines), _left_out(ROWS, len(q), "rows")
    )


def _coding(step: Step, row: int | slice) -> tuple[str, str]:
    """The scale of a token, or of all, and the relative error, where a step makes codes."""
    codes, x = step.result, step.arguments[0]
    rows = slice(row, row + 1) if isinstance(row, int) else row
    if isinstance(codes, Codes):
        scales = sorted({_scale(codes, i) for i in range(*rows.indices(len(x)))})
        scale = str(scales[0]) if len(scales) == 1 else f"{scales[0]!s} to {scales[-1]!s}"
        read = codes.integers()[rows] / (codes.scale if codes.scale.ndim == 0 else codes.scale[rows]).astype(np.float64)
        return scale, _relative_error(read, x[rows])
    if isinstance(codes, FixedPoint):
        exponents = sorted({int(e) for e in codes.exponent[rows]})
        scale = f"2^{exponents[0]}" if len(exponents) == 1 else f"2^{exponents[0]} to 2^{exponents[-1]}"
        return scale, _relative_error(np.ldexp(codes.q[rows].astype(np.float64), -codes.exponent[rows, None]), x[rows])
    return "", ""


@table_of.register
def _(value: Trace) -> Table:
    lines = []
    for number, step in enumerate(value[:STEPS]):
        result = step.values()[0][1]
        shape = " x ".join(str(size) for size in getattr(result, "q", result).shape)
        lines.append((str(number), step.operation, step.sites[0], shape, *_coding(step, slice(None))))
    head = ("step", "operation", "gives", "shape", "scale", "error")
    rest = _left_out(STEPS, len(value), "steps: trace.layer(3) has those of a layer")
    return Table(f"{len(value)} operations", head, tuple(lines), rest)
