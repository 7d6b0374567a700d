"""Why numbers from elsewhere differ: the common causes, each computed by the reference and compared with the numbers.

A cause is told only where it explains them: with it the error, as a root mean square, becomes half or less of what it was. A
cause that is not there adds an error of its own, so no wrong one does that by chance.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refmamba.conformance.dumps import Arrays, reference_values
from refmamba.errors import NonFiniteError, TokenizerError
from refmamba.run.session import Opened
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.coders import Call
from refmamba.spec.codes import WEIGHT_BITS, FixedPoint, dequantize, fixed_point
from refmamba.spec.config import MambaConfig, ParameterSource
from refmamba.spec.linear import Linear
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.trace import Tracer

EXPLAINED = 0.5  # of the error may remain
SIXTEEN_BITS_NOISE = 4  # times what the reference loses in 16 bits a dump may be off and be called computed in them
EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)
STATES = ("conv_state", "ssm_state")  # sites without an axis of tokens


def bfloat16(x: F32Array) -> F32Array:
    """float32 rounded to bfloat16, half to even, as float32."""
    return _shorter(x, 16)


def float16(x: F32Array) -> F32Array:
    """float32 rounded to float16, half to even, as float32."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def tf32(x: F32Array) -> F32Array:
    """float32 rounded to the 10 bits of TF32's fraction, half to even."""
    return _shorter(x, 13)


def tf32_truncated(x: F32Array) -> F32Array:
    """float32 cut to the 10 bits of TF32's fraction."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _shorter(x: F32Array, drop: int) -> F32Array:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    bits = (bits + np.uint64((1 << (drop - 1)) - 1) + ((bits >> np.uint64(drop)) & np.uint64(1))) >> np.uint64(drop)
    rounded = (bits << np.uint64(drop)).astype(np.uint32).view(np.float32).reshape(x.shape)
    return np.where(np.isfinite(x), rounded, x)


SHORT: Mapping[str, Callable[[F32Array], F32Array]] = {"bfloat16": bfloat16, "float16": float16}


@dataclass(frozen=True, eq=False)
class RoundedSource:
    """A checkpoint whose tensors are rounded."""

    source: ParameterSource
    rounded: Callable[[F32Array], F32Array]

    @property
    def config(self) -> MambaConfig:
        """The model's sizes."""
        return self.source.config

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""
        return self.rounded(self.source.read(name))


def rounding_tracer(rounded: Callable[[F32Array], F32Array]) -> type[Tracer]:
    """A Tracer that rounds every float32 result, as a program does that computes in a shorter type."""

    def short(value: Any) -> Any:
        return rounded(value) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value

    class Rounding(Tracer):
        def __call__(self, sites: str, operation: Callable[..., Any], *arguments: Any) -> Any:
            def operation_rounded(*operands: Any) -> Any:
                result = operation(*operands)
                return tuple(map(short, result)) if isinstance(result, tuple) else short(result)

            operation_rounded.__name__ = operation.__name__
            return super().__call__(sites, operation_rounded, *arguments)

    return Rounding


@dataclass(frozen=True, eq=False)
class RoundedInput:
    """A `Transform` that rounds a product's input."""

    rounded: Callable[[F32Array], F32Array]

    def call(self, x: F32Array, site: str) -> Call:
        """See `refmamba.spec.transforms.Transform`."""
        return self.rounded, (np.ascontiguousarray(x),)


def rounded_products(reference: Mamba, rounded: Callable[[F32Array], F32Array]) -> Mamba:
    """The reference with both factors of every unquantized product rounded."""

    def changed(linear: Linear) -> Linear:
        if not isinstance(linear.weight, FixedPoint):
            return linear
        factor = fixed_point(rounded(dequantize(linear.weight)), WEIGHT_BITS, linear.site)
        return replace(linear, weight=factor, transforms=(*linear.transforms, RoundedInput(rounded)))

    other = Mamba(reference.model)
    other.linear = {site: changed(linear) for site, linear in reference.linear.items()}
    return other


def biased(model: QuantizedModel, times: float) -> QuantizedModel:
    """A model whose dt_proj has its bias so many times."""
    names = [f"layers.{i}.dt_proj.bias" for i in range(model.config.n_layer)]
    return replace(model, params={**model.params, **{name: model.value(name) * np.float32(times) for name in names}})


class Cause(NamedTuple):
    """A hypothesis. expected: what the reference computes under it; arrays: the dump's, as far as they are comparable then."""

    text: str
    expected: Arrays
    arrays: Arrays


def distance(expected: Mapping[str, NDArray[Any]], arrays: Mapping[str, NDArray[Any]]) -> float:
    """The largest error of all float arrays that both have: of each the root mean square of its errors over that of its values;
    infinite where shapes differ, or nothing is comparable."""
    largest, shared = 0.0, [name for name in arrays if name in expected and arrays[name].dtype.kind == "f"]
    for name in shared:
        e, a = expected[name].astype(np.float64), arrays[name].astype(np.float64)
        if e.shape != a.shape or not np.all(np.isfinite(a)):
            return np.inf
        largest = max(largest, float(np.linalg.norm(e - a)) / (float(np.linalg.norm(e)) or 1.0))
    return largest if shared else np.inf


def explain(
    opened: Opened,
    reference: Mamba,
    tokens: IntArray,
    expected: Arrays,
    arrays: Arrays,
    fit: Callable[[Arrays, Arrays], Arrays],
) -> str | None:
    """The cause that explains a dump best, in a sentence; None where none does.

    expected: the reference's values. arrays: the dump's. fit: cuts expected values to the rows and tokens that a dump's arrays
    have.
    """
    at_first = distance(fit(expected, arrays), arrays)
    if text := _computed_in_16_bits(opened, reference, tokens, expected, arrays, fit, at_first):
        return text
    best, rest = None, at_first
    for cause in _causes(opened, reference, tokens, expected, arrays):
        remains = distance(fit(cause.expected, cause.arrays), cause.arrays)
        if remains < rest and remains <= EXPLAINED * min(at_first, 1.0):
            best, rest = cause, remains
        if rest == 0:
            break
    if best is None:
        return None
    before = "the shapes do not fit" if at_first == np.inf else f"the relative error is {at_first:.1e}"
    return f"{best.text}: then it is {rest:.1e}, as it stands {before}"


def _computed_in_16_bits(
    opened: Opened, reference: Mamba, tokens: IntArray, expected: Arrays, arrays: Arrays,
    fit: Callable[[Arrays, Arrays], Arrays], at_first: float,
) -> str | None:  # fmt: skip
    """Rounding everywhere is a noise that no other program repeats: it is known by its size, and by the values themselves."""
    floats = [arrays["logits"]] if "logits" in arrays else [x for x in arrays.values() if x.dtype.kind == "f"]
    for name, rounded in SHORT.items():
        if not floats or not all(np.array_equal(rounded(x.astype(np.float32)), x) for x in floats):
            continue
        rounds = rounding_tracer(rounded)
        try:
            short = reference_values(Mamba(_rounded_weights(opened, reference, rounded)), tokens, rounds)
        except NonFiniteError:
            continue
        noise = distance(fit(short, arrays), {k: v for k, v in fit(expected, arrays).items() if k in arrays})
        if at_first <= SIXTEEN_BITS_NOISE * noise:
            return (f"computed in {name}: every value is such a 16-bit number, and the reference with weights and results "
                    f"rounded to it is as far off, {noise:.1e} (the dump: {at_first:.1e}); load it as float32")  # fmt: skip
    return None


def _rounded_weights(opened: Opened, reference: Mamba, rounded: Callable[[F32Array], F32Array]) -> QuantizedModel:
    """The model from rounded weights; as it is where it was saved quantized."""
    if isinstance(opened.checkpoint, QuantizedModel):
        return reference.model
    scheme = reference.scheme
    calibration = opened.calibration if scheme.needs_calibration else None
    return quantize_model(RoundedSource(opened.checkpoint, rounded), scheme, calibration)


def _causes(opened: Opened, reference: Mamba, tokens: IntArray, expected: Arrays, arrays: Arrays) -> Iterator[Cause]:
    model, length = reference.model, len(tokens)
    for text, ours, theirs in (
        ("shifted by one token: each row is the next position's", slice(1, None), slice(None, -1)),
        ("shifted by one token: each row is the position's before", slice(None, -1), slice(1, None)),
    ):
        if length > 1:
            yield Cause(text, _rows(expected, ours, length), _rows(arrays, theirs, length))
    variants: list[tuple[str, Callable[[], Mamba]]] = [
        ("the bias of dt_proj is added twice", lambda: Mamba(biased(model, 2))),
        ("the bias of dt_proj is missing", lambda: Mamba(biased(model, 0))),
    ]
    for epsilon in EPSILONS:
        if epsilon != model.config.norm_eps:
            config = replace(model.config, norm_eps=epsilon)
            text = f"the norms' epsilon is near {epsilon:g}, not {model.config.norm_eps:g}"
            variants.append((text, lambda config=config: Mamba(replace(model, config=config))))  # type: ignore[misc]
    if not isinstance(opened.checkpoint, QuantizedModel):
        for name, rounded in SHORT.items():
            text = f"the weights were rounded to 16 bits, {name}: load the model as float32"
            variants.append((text, lambda rounded=rounded: Mamba(_rounded_weights(opened, reference, rounded))))  # type: ignore[misc]
    variants.append(("the products are computed in TF32", lambda: rounded_products(reference, tf32)))
    variants.append(("the products are computed in TF32, cut off", lambda: rounded_products(reference, tf32_truncated)))
    for text, variant in variants:
        try:
            yield Cause(text, reference_values(variant(), tokens), arrays)
        except NonFiniteError:
            continue
    yield from _begun_otherwise(opened, reference, tokens, arrays)


def _begun_otherwise(opened: Opened, reference: Mamba, tokens: IntArray, arrays: Arrays) -> Iterator[Cause]:
    try:
        prefix = opened.tokenizer.prefix_token_id
    except TokenizerError:
        prefix = None
    length, prefix = len(tokens), 0 if prefix is None else prefix
    rows = len(np.atleast_1d(arrays["logits"])) if "logits" in arrays else length
    longer = reference_values(reference, np.concatenate([[prefix], tokens]))
    text = f"shifted by one token: a begin token, {prefix}, was put before the sequence"
    if rows == length + 1:
        yield Cause(text, longer, arrays)
    else:
        yield Cause(text, _rows(longer, slice(1, None), length + 1, states=True), arrays)
    if length > 1:
        text = "shifted by one token: the first token was left out"
        shorter = reference_values(reference, tokens[1:])
        yield Cause(text, shorter, arrays if rows == length - 1 else _rows(arrays, slice(1, None), length, states=True))


def _rows(arrays: Arrays, rows: slice, length: int, *, states: bool = False) -> Arrays:
    """These rows of the arrays that have one for each token. states: also the states after the last token."""
    kept = {}
    for name, array in arrays.items():
        if name.rsplit(".", 1)[-1] in STATES:
            if states:
                kept[name] = array
        elif array.ndim and len(array) == length:
            kept[name] = array[rows]
    return kept
