"""Follow one number: what an operation of a recorded forward did to make one element, beside the same forward under `fp32`.

What the element is comes from the record. An operation's own error is against the same in float64 on the same inputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmamba.errors import DataError
from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.config import kind_of
from refmamba.spec.ops import discretize
from refmamba.spec.trace import Step, Trace

LARGEST = 8  # products of a sum that are shown
WITHIN = ("in_codes", "transformed", "acc", "result")  # values within a linear layer, where they have terms of their own


@dataclass(frozen=True)
class Rounding:
    """A number before and after it was rounded to a whole number of units."""

    before: float
    after: float
    unit: float

    @property
    def to_the_tie(self) -> float:
        """How far it was from being rounded the other way, in units: 0 to 1/2."""
        return 0.5 - abs(self.before - self.after) / self.unit


@dataclass(frozen=True)
class Story:
    """What an operation did for one element.

    equation: of docs/SPEC.md. formula, numbers: the same line with letters and with this element's numbers. exact: the result
    in float64; None where it is exact. code: the code and its bits. notes: what else there is. rows: a table, its head first.
    """

    equation: str
    formula: str
    numbers: str
    exact: float | None = None
    code: tuple[int, int] | None = None
    rounding: Rounding | None = None
    notes: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class Element:
    """One element of a forward, and what there is to tell. so_far: the error beside fp32; None without a counterpart."""

    site: str
    operation: str
    token: int
    channel: int
    value: float | int
    stands_for: float
    added: float
    plain: float | None
    so_far: float | None
    story: Story


def written(x: float | np.floating[Any]) -> str:
    """A number in 9 digits, which tell two float32 values apart; a whole one in all of its digits."""
    return str(int(x)) if float(x).is_integer() and abs(float(x)) < 1e16 else f"{x:.9g}"


def binary(code: int, bits: int) -> str:
    """A code in two's complement."""
    return f"{code & ((1 << bits) - 1):0{bits}b}"


class Follower:
    """A forward under a scheme beside the same under fp32: looks at their elements.

    smoothing: the exponents of each linear layer's input channels, where the scheme smooths; see `payload.exponents_of`.
    rotated: the linear layers whose input is rotated.
    """

    def __init__(self, trace: Trace, plain: Trace, smoothing: Mapping[str, Sequence[int]], rotated: Sequence[str] = ()) -> None:
        self.trace, self.plain, self._smoothing, self._rotated = trace, plain, smoothing, rotated
        # A state belongs to the last token alone; the scan's own story shows it.
        self.sites = [site for site in trace.sites if not site.endswith("_state")]

    def shape(self, site: str) -> tuple[int, int]:
        """Number of tokens and of channels of a value."""
        rows, columns = numbers(self.trace[site]).shape
        return int(rows), int(columns)

    def at(self, site: str, token: int, channel: int) -> Element:
        """One element. Raises DataError for a token or a channel that is not there."""
        rows, columns = self.shape(site)
        for what, index, count in (("token", token, rows), ("channel", channel, columns)):
            if not 0 <= index < count:
                raise DataError(f"{site} has no {what} {index}; there are 0 to {count - 1}")
        step, value = self.trace.step(site), numbers(self.trace[site])[token, channel]
        story = STORIES[step.operation](step, site, token, channel)
        meant, other = self._stands_for(self.trace, site, token, channel), self._counterpart(site)
        plain = None if other is None else self._stands_for(self.plain, other, token, channel)
        unscaled = math.ldexp(meant, -self._exponent(site, channel))
        added = 0.0 if story.exact is None else unscaled - story.exact
        number = int(value) if value.dtype.kind in "iu" or step.operation == "integer_product" else float(value)
        so_far = None if plain is None else meant - plain
        return Element(site, step.operation, token, channel, number, meant, added, plain, so_far, story)

    def _stands_for(self, trace: Trace, site: str, t: int, c: int) -> float:
        """The real number that an element stands for, without smoothing's factor."""
        step, value = trace.step(site), trace[site]
        x = float(numbers(value)[t, c])
        if isinstance(value, Codes):
            x /= scale_at(value, t)
        elif isinstance(value, FixedPoint):
            x = math.ldexp(x, -int(value.exponent[t]))
        elif step.operation == "integer_product":
            x = real_product(x, step.arguments[0], step.arguments[1], t, c)
        return math.ldexp(x, self._exponent(site, c)) if trace is self.trace else x

    def _exponent(self, site: str, c: int) -> int:
        """By which power of two smoothing has divided a value."""
        if not self._smoothing or not site.startswith("layers."):
            return 0
        at, (layer, _, side) = ".".join(site.split(".")[:2]), kind_of(site).partition(".")
        inside = side.startswith(("in_codes", "transformed"))
        into = {"norm": "in_proj", "x_proj": "x_proj" if inside else "dt_proj"}.get(layer, layer if inside else "")
        exponents = self._smoothing.get(f"{at}.{into}", ())
        return int(exponents[c]) if c < len(exponents) else 0

    def _terms(self, trace: Trace, site: str) -> str | None:
        """What a value within a linear layer is measured in: it may be rotated, or one part of a sum; None elsewhere."""
        layer, _, side = site.rpartition(".")
        side = side.rstrip("0123456789").rstrip("_")
        if side not in WITHIN or not layer:
            return None
        if f"{layer}.sum" in trace.sites and side != "transformed":
            return "part"
        turned = trace is self.trace and kind_of(layer) in self._rotated and side in ("in_codes", "transformed")
        return "rotated" if turned else None

    def _counterpart(self, site: str) -> str | None:
        """The value of the plain forward that this one can be compared with."""
        layer, _, side = site.rpartition(".")
        other: str | None = site
        if site not in self.plain.sites:
            ends = {"transformed": "in_codes", "sum": "result", "out_codes": "result", "out_value": "result"}
            other = f"{layer}.{ends[side]}" if side in ends else None
        return other if other and self._terms(self.plain, other) == self._terms(self.trace, site) else None


def numbers(value: Any) -> Any:
    """The array of a value of a trace: the codes, where it is codes."""
    return getattr(value, "q", value)


def scale_at(codes: Codes, row: int) -> float:
    """The scale of a row."""
    return float(codes.scale if codes.scale.ndim == 0 else codes.scale[row, 0])


def real_product(acc: float, x: Any, w: Any, t: int, c: int) -> float:
    """What an integer sum stands for, in float64: eq. (13) without its roundings."""
    for factor, row in ((x, t), (w, c)):
        if isinstance(factor, FixedPoint):
            acc = math.ldexp(acc, -int(factor.exponent[row]))
    return acc / math.prod(scale_at(factor, row) for factor, row in ((x, t), (w, c)) if isinstance(factor, Codes))


def _embed(step: Step, site: str, t: int, c: int) -> Story:
    tokens, embedding = step.arguments
    if not isinstance(embedding, Codes):
        return Story("15", "x = row of the token", f"{written(step.result[t, c])} = row {tokens[t]}", float(step.result[t, c]))
    q, s = int(embedding.integers()[tokens[t], c]), np.float32(scale_at(embedding, tokens[t]))
    return Story("15, 9", "x = q / s", f"{written(step.result[t, c])} = {q} / {s!s}", q / float(s))


def _rms_norm(step: Step, site: str, t: int, c: int) -> Story:
    x, w, eps = step.arguments
    exact = float(x[t, c]) / math.sqrt(float(np.mean(x[t].astype(np.float64) ** 2)) + eps) * float(w[c])
    numbers = f"{step.result[t, c]!s} = {x[t, c]!s} / sqrt(mean(x²) + {eps:g}) · {w[c]!s}"
    return Story("16", "y = x / sqrt(mean(x²) + eps) · w", numbers, exact)


def _code(step: Step, site: str, t: int, c: int) -> Story:
    x, bits, _, granularity = step.arguments
    at = np.unravel_index(np.argmax(np.abs(x)), x.shape) if granularity == "per_tensor" else (t, np.argmax(np.abs(x[t])))
    token, channel = (int(i) for i in at)
    mine = (token, channel) == (t, c)
    widest = "this very value" if mine else f"token {token}, channel {channel}: {x[token, channel]!s}"
    return _coded(x, step.result, bits, t, c, f"the scale is taken by {widest}")


def _coded(x: Any, codes: Codes, bits: int, t: int, c: int, note: str) -> Story:
    q, s, largest = int(codes.q[t, c]), np.float32(scale_at(codes, t)), 2 ** (bits - 1) - 1
    before = x[t, c] * s
    saturates = (f"{before!s} is beyond the largest code: it saturates",) if abs(before) > largest + 0.5 else ()
    return Story(
        "7, 8", "q = rint(clamp(x · s, −Q, Q))", f"{q} = rint(clamp({x[t, c]!s} · {s!s}, −{largest}, {largest}))",
        float(x[t, c]), (q, bits), None if saturates else Rounding(float(before), q, 1.0), (note, *saturates),
    )  # fmt: skip


def _code_static(step: Step, site: str, t: int, c: int) -> Story:
    x, absmax, bits, _ = step.arguments
    return _coded(x, step.result, bits, t, c, f"the scale is of the calibrated largest magnitude {absmax!s}")


def _code_flattened(step: Step, site: str, t: int, c: int) -> Story:
    x, threshold, _, _ = step.arguments
    q, s = int(step.result.q[t, c]), np.float32(scale_at(step.result, t))
    return Story(
        "33", "q = rint(x · s)", f"{q} = rint({x[t, c]!s} · {s!s})", float(x[t, c]), (q, 32),
        Rounding(float(x[t, c] * s), q, 1.0), (f"the scale is of the calibrated threshold {threshold!s}",),
    )  # fmt: skip


def _fixed_point(step: Step, site: str, t: int, c: int) -> Story:
    x, _, _ = step.arguments
    q, e = int(step.result.q[t, c]), int(step.result.exponent[t])
    rounding = Rounding(math.ldexp(float(x[t, c]), e), q, 1.0)
    return Story("10", "q = rint(x · 2^e)", f"{q} = rint({x[t, c]!s} · 2^{e})", float(x[t, c]), (q, 32), rounding)


def _integer_product(step: Step, site: str, t: int, c: int) -> Story:
    x, w = step.arguments
    q, p = ((f.integers() if isinstance(f, Codes) else f.q)[row].astype(object) for f, row in ((x, t), (w, c)))
    products, sums = q * p, np.cumsum(q * p)
    order = np.argsort(-np.abs(products.astype(np.float64)), kind="stable")[:LARGEST]
    rows = tuple((int(k), q[k], p[k], products[k], sums[k]) for k in order)
    first = " + ".join(f"{a} · {b}" for a, b in zip(q[:2], p[:2], strict=True))
    wide = isinstance(x, FixedPoint) and isinstance(w, FixedPoint)
    return Story(
        "12" if wide else "11", "acc = q₀ · w₀ + q₁ · w₁ + …",
        f"{int(step.result[t, c])} = {first} + …, {len(q)} products",
        notes=("two sums, joined with one rounding in float64" if wide else "whole numbers: exact in any order",),
        rows=(("channel", "input", "weight", "product", "sum until here"), *rows),
    )  # fmt: skip


def _rescale(step: Step, site: str, t: int, c: int) -> Story:
    acc, x, w = step.arguments
    value, letters, digits = float(acc[t, c]), "acc", written(acc[t, c])
    for name, factor, row in (("x", x, t), ("w", w, c)):
        if isinstance(factor, FixedPoint):
            value = math.ldexp(value, -int(factor.exponent[row]))
            letters, digits = f"{letters} · 2^−e_{name}", f"{digits} · 2^{-int(factor.exponent[row])}"
    scales = [(name, np.float32(scale_at(f, row))) for name, f, row in (("x", x, t), ("w", w, c)) if isinstance(f, Codes)]
    below = (" / (" + " · ".join(f"s_{name}" for name, _ in scales) + ")") if scales else ""
    numbers = (" / (" + " · ".join(str(s) for _, s in scales) + ")") if scales else ""
    single = np.float32(value)
    return Story(
        "13", f"y = fl32({letters}){below}", f"{step.result[t, c]!s} = fl32({digits}){numbers}",
        real_product(float(acc[t, c]), x, w, t, c), rounding=Rounding(value, float(single), float(np.spacing(abs(single)))),
    )  # fmt: skip


def _dequantize(step: Step, site: str, t: int, c: int) -> Story:
    (codes,) = step.arguments
    q, s = int(codes.integers()[t, c]), np.float32(scale_at(codes, t))
    return Story("9", "y = q / s", f"{step.result[t, c]!s} = {q} / {s!s}", q / float(s))


def _divide_channels(step: Step, site: str, t: int, c: int) -> Story:
    x, k = step.arguments
    exact = math.ldexp(float(x[t, c]), -int(k[c]))
    return Story("29", "x′ = x · 2^−k", f"{step.result[t, c]!s} = {x[t, c]!s} · 2^{-int(k[c])}", exact)


def _rotate(step: Step, site: str, t: int, c: int) -> Story:
    x, _ = step.arguments
    block = x.shape[1] & -x.shape[1]
    first = c - c % block
    signs = np.array([1 - 2 * ((j & (c - first)).bit_count() % 2) for j in range(block)])
    part = x[t, first : first + block].astype(np.float64)
    numbers = f"{step.result[t, c]!s} = sum of {block} channels, each with its sign"
    return Story("31", "x′ = ±x₀ ± x₁ ± …", numbers, float(signs @ part))


def _conv1d(step: Step, site: str, t: int, c: int) -> Story:
    x, state, w, bias = step.arguments
    taps = w.shape[1]
    inputs = np.concatenate([state[c], x[:, c]])[t : t + taps]
    exact = float(inputs.astype(np.float64) @ w[c].astype(np.float64)) + (0.0 if bias is None else float(bias[c]))
    letters = " + ".join(f"x_{t - taps + 1 + i} · w_{i}" for i in range(taps)) + ("" if bias is None else " + b")
    digits = " + ".join(f"{a!s} · {b!s}" for a, b in zip(inputs, w[c], strict=True)) + (
        "" if bias is None else f" + {bias[c]!s}"
    )
    return Story("17", f"y = {letters}", f"{step.result[0][t, c]!s} = {digits}", exact)


def _silu(step: Step, site: str, t: int, c: int) -> Story:
    x = step.arguments[0][t, c]
    return Story(
        "5",
        "u = x / (1 + exp(−x))",
        f"{step.result[t, c]!s} = {x!s} / (1 + exp(−({x!s})))",
        float(x) / (1 + math.exp(-float(x))),
    )


def _step_size(step: Step, site: str, t: int, c: int) -> Story:
    dt, bias = step.arguments
    x = float(dt[t, c]) + float(bias[c])
    exact = x if x > 20 else max(x, 0.0) + math.log1p(math.exp(-abs(x)))
    return Story("18, 4", "delta = softplus(dt + b)", f"{step.result[t, c]!s} = softplus({dt[t, c]} + {bias[c]!s})", exact)


def _selective_scan(step: Step, site: str, t: int, c: int) -> Story:
    u, delta, A, B, C, D, state = step.arguments
    h, now = state[c], slice(c, c + 1)
    for i in range(t + 1):
        A_bar, B_bar_u = (part[0, 0] for part in discretize(delta[i : i + 1, now], A[now], B[i : i + 1], u[i : i + 1, now]))
        before, h = h, A_bar * h + B_bar_u
    step_size, fades = float(delta[t, c]), np.exp(delta[t, c].astype(np.float64) * A[c])
    exact = float(C[t].astype(np.float64) @ (fades * before + step_size * float(u[t, c]) * B[t].astype(np.float64)))
    rows = tuple((n, *(str(x[n]) for x in (A_bar, before, B_bar_u, h, C[t], C[t] * h))) for n in range(len(h)))
    y = step.result[0][t, c]
    return Story(
        "20, 21, 22", "h ← Ā · h + B̄u,  y = tree(C · h) + D · u", f"{y!s} = tree(C · h) + {D[c]!s} · {u[t, c]!s}",
        exact + float(D[c]) * float(u[t, c]), rows=(("state", "Ā", "h before", "B̄u", "h", "C", "C · h"), *rows),
    )  # fmt: skip


def _gate(step: Step, site: str, t: int, c: int) -> Story:
    y, z = (x[t, c] for x in step.arguments)
    exact = float(y) * float(z) / (1 + math.exp(-float(z)))
    return Story("23", "y · silu(z)", f"{step.result[t, c]!s} = {y!s} · silu({z!s})", exact)


def _add(step: Step, site: str, t: int, c: int) -> Story:
    x, y = step.arguments
    a, b = x[t, c], y[t, c] if y.ndim > 1 else y[c]
    return Story("24", "x + y", f"{step.result[t, c]!s} = {a!s} + {b!s}", float(a) + float(b))


STORIES: dict[str, Callable[[Step, str, int, int], Story]] = {
    "embed": _embed, "rms_norm": _rms_norm, "code": _code, "code_static": _code_static, "code_flattened": _code_flattened,
    "fixed_point": _fixed_point, "integer_product": _integer_product, "rescale": _rescale, "dequantize": _dequantize,
    "divide_channels": _divide_channels, "rotate": _rotate, "conv1d": _conv1d, "silu": _silu, "step_size": _step_size,
    "selective_scan": _selective_scan, "gate": _gate, "add": _add,
}  # fmt: skip


def as_text(element: Element, place: int, count: int) -> str:
    """An element as plain text. place: of its operation among so many, from 1."""
    e, story = element, element.story
    lines = [
        f"{e.site} [token {e.token}, channel {e.channel}]",
        f"  operation {place} of {count}: {e.operation}, equation ({story.equation})",
        f"  {story.formula}",
        f"  {story.numbers}",
    ]
    facts = [("value", str(e.value if isinstance(e.value, int) else np.float32(e.value)))]
    if story.code is not None:
        facts = [("code", f"{e.value}, in {story.code[1]} bits {binary(*story.code)}")]
    if story.code is not None or e.operation == "integer_product":
        facts.append(("it stands for", written(e.stands_for)))
    if story.rounding is not None:
        r = story.rounding
        facts.append(("rounding", f"{written(r.before)} to {written(r.after)}, {r.to_the_tie:.3g} of a step from the tie"))
    facts += [("note", note) for note in story.notes]
    facts.append(("error added", written(e.added)))
    compared = (
        "it has no counterpart under fp32" if e.so_far is None else f"{written(e.so_far)}, beside {written(e.plain or 0.0)}"
    )
    facts.append(("error so far", compared))
    lines += [f"  {name:<13} {value}" for name, value in facts]
    if story.rows:
        cells = [[str(cell) for cell in row] for row in story.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["    " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def as_values(element: Element) -> dict[str, Any]:
    """An element as JSON values."""
    e, story = element, element.story
    rounding = story.rounding and {"before": story.rounding.before, "after": story.rounding.after, "unit": story.rounding.unit,
                                   "to_the_tie": story.rounding.to_the_tie}  # fmt: skip
    return {
        "site": e.site, "operation": e.operation, "equation": story.equation, "token": e.token, "channel": e.channel,
        "formula": story.formula, "numbers": story.numbers, "value": e.value,
        "bits": story.code and binary(*story.code), "stands_for": e.stands_for, "rounding": rounding,
        "notes": list(story.notes), "error_added": e.added, "fp32": e.plain, "error_so_far": e.so_far,
        "rows": [list(row) for row in story.rows],
    }  # fmt: skip
