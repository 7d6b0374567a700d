"""Schemes: for every tensor and every activation, which bits and which scale (docs/SPEC.md, section 4).

A linear layer has two sites. On its `in` side the activation becomes the codes of the integer product; on its `out` side
the result becomes codes that are read back to float32 at once. The Mamba-PTQ paper does not define 'mlp' and 'all', nor
where its scales come from: the readings below are ours. `Scheme.table` prints them, and a JSON file of the same
entries changes them (`--scheme FILE`).
"""

import re
import textwrap
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refmamba.errors import SchemeError, printable
from refmamba.spec.coders import CODERS, INPUT_CODERS, options_of
from refmamba.spec.transforms import Hadamard, Smooth

LINEAR_LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj")
LONGEST_NAME = 100  # characters
LARGEST = 2.0**127 * (2 - 2.0**-23)  # float32
WIDTH = 80  # columns of a table
ALPHA = 0.5  # SmoothQuant's migration strength where a scheme does not say another
LINEAR_WEIGHTS = tuple(f"{layer}.weight" for layer in LINEAR_LAYERS)
HEAD_WEIGHTS = ("embedding.weight", "lm_head.weight")  # one tensor where the head is tied
OTHER_PARAMETERS = (
    "norm.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_proj.bias", "A_log", "D", "out_proj.bias",
    "norm_f.weight",
)  # fmt: skip
PRODUCTS = (*LINEAR_LAYERS, "lm_head")
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {  # a coder's options: what they may be
    "group": (lambda x: type(x) is int and x in (16, 32, 64, 128, 256), "a power of two from 16 to 256"),
    "threshold": (lambda x: type(x) in (int, float) and 0 < x <= LARGEST, "a number above zero that float32 holds"),
    "quantile": (lambda x: type(x) in (int, float) and 0 < x <= 1, "a number above zero, at most 1"),
}
BITS = {"weights": (2, 8), "inputs": (2, 8), "outputs": (2, 16)}
SITES = {"weights": (*HEAD_WEIGHTS, *LINEAR_WEIGHTS, *OTHER_PARAMETERS), "inputs": PRODUCTS, "outputs": LINEAR_LAYERS}


@dataclass(frozen=True)
class Quantizer:
    """How one tensor or site is coded.

    scale: the name of a class in `coders`. Of parameters: per_tensor; per_channel (one a row); grouped (one a row, and a whole
    step for each `group` of columns). Of activations, from the values themselves: per_tensor, per_token, per_token_outliers
    (values from `threshold` on by themselves); from calibration: static, flattened (the `quantile` of the channels' maxima).
    None: the class's default.
    """

    bits: int
    scale: str
    group: int | None = None
    threshold: float | None = None
    quantile: float | None = None

    @property
    def options(self) -> dict[str, float]:
        """What is chosen beside bits and scale, by its name."""
        chosen = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}

    def build(self, coder: type[Any], *arguments: Any) -> Any:
        """One of the classes of `coders`, made as this says. arguments: after the bits."""
        return coder(self.bits, *arguments, **options_of(coder, self.options))

    def to_json(self) -> dict[str, Any]:
        """What is chosen, as JSON values."""
        return {"bits": self.bits, "scale": self.scale} | self.options

    def __str__(self) -> str:
        options = "".join(f", {name} {value:g}" for name, value in self.options.items())
        return f"{self.bits} bits, {self.scale.replace('_', ' ')}{options}"


@dataclass(frozen=True)
class Scheme:
    """Which parameters (`weights`), `in` sides (`inputs`) and `out` sides (`outputs`) are quantized, and how.

    What is not named is not quantized. smooth: SmoothQuant's alpha, 0 to 1, of each linear layer whose input it divides
    before quantizing (section 5). rotate: the linear layers whose input is rotated (eq. 31). Raises SchemeError for an unknown
    site, width, scale, option or alpha.
    """

    name: str
    weights: Mapping[str, Quantizer] = field(default_factory=dict)
    inputs: Mapping[str, Quantizer] = field(default_factory=dict)
    outputs: Mapping[str, Quantizer] = field(default_factory=dict)
    smooth: Mapping[str, float] = field(default_factory=dict)
    rotate: Collection[str] = ()

    def __post_init__(self) -> None:
        for part, sites in SITES.items():
            for site, quantizer in getattr(self, part).items():
                if site not in sites:
                    raise SchemeError(f"scheme {self.name}: {part} has no site '{site}'; there are {', '.join(sites)}")
                if quantizer.scale not in CODERS[part]:
                    choices = ", ".join(CODERS[part])
                    raise SchemeError(f"scheme {self.name}: {site} has the scale '{quantizer.scale}'; {part} take {choices}")
                self._check(part, site, quantizer)
        for site in self.rotate:
            if site not in LINEAR_LAYERS:
                raise SchemeError(f"scheme {self.name}: rotate has no site '{site}'; there are {', '.join(LINEAR_LAYERS)}")
            if site in self.smooth:
                raise SchemeError(f"scheme {self.name}: {site} is smoothed and rotated; choose one")
        for site, alpha in self.smooth.items():
            if site not in LINEAR_LAYERS:
                raise SchemeError(f"scheme {self.name}: smooth has no site '{site}'; there are {', '.join(LINEAR_LAYERS)}")
            if type(alpha) not in (int, float) or not 0 <= alpha <= 1:
                raise SchemeError(f"scheme {self.name}: smooth has the alpha {alpha!r} for {site}; it is 0 to 1")
            if site not in self.inputs or not INPUT_CODERS[self.inputs[site].scale].calibrated:
                raise SchemeError(f"scheme {self.name}: smooth needs a static scale on the input of {site}")
        if self.weights.get("embedding.weight") and self.weights["embedding.weight"] != self.weights.get("lm_head.weight"):
            raise SchemeError(f"scheme {self.name}: embedding.weight and lm_head.weight can be one tensor: code both alike")

    def _check(self, part: str, site: str, quantizer: Quantizer) -> None:
        coder = CODERS[part][quantizer.scale]
        low, high = getattr(coder, "bits_range", BITS[part])
        if type(quantizer.bits) is not int or not low <= quantizer.bits <= high:
            raise SchemeError(f"scheme {self.name}: {site} has {quantizer.bits!r} bits; {part} take {low} to {high}")
        if getattr(coder, "matrices_only", False) and site not in (*HEAD_WEIGHTS, *LINEAR_WEIGHTS):
            raise SchemeError(f"scheme {self.name}: {site} is no matrix of a product; {quantizer.scale} is for those")
        if getattr(coder, "coded_weight", False) and f"{site}.weight" not in self.weights:
            raise SchemeError(f"scheme {self.name}: {site} is {quantizer.scale}, for which its weight must be in codes")
        for name, value in quantizer.options.items():
            if name not in options_of(coder, {}):
                raise SchemeError(f"scheme {self.name}: {site} has the option {name}, which {quantizer.scale} does not take")
            allowed, what = OPTIONS[name]
            if not allowed(value):
                raise SchemeError(f"scheme {self.name}: {site} has the {name} {value!r}; it is {what}")

    @property
    def whole_sequence(self) -> bool:
        """A scale is taken over all tokens of a call, so a later token changes an earlier one's bits."""
        coders = [CODERS[part][q.scale] for part in ("inputs", "outputs") for q in getattr(self, part).values()]
        return any(coder.whole_sequence for coder in coders)

    @property
    def calibrated(self) -> frozenset[str]:
        """The linear layers whose input's scale comes from calibration."""
        return frozenset(layer for layer, quantizer in self.inputs.items() if INPUT_CODERS[quantizer.scale].calibrated)

    @property
    def needs_calibration(self) -> bool:
        """Some scale comes from calibration."""
        return bool(self.calibrated)

    def unknown_to(self, known: Container[type]) -> str | None:
        """What of this scheme a backend that knows these classes of coders and transforms does not know; None: nothing."""
        for part, title in (("weights", "scale"), ("inputs", "input scale"), ("outputs", "output scale")):
            for site, quantizer in getattr(self, part).items():
                if CODERS[part][quantizer.scale] not in known:
                    return f"the {title} {quantizer.scale} of {site}"
        for sites, title, transform in ((self.smooth, "smoothing", Smooth), (self.rotate, "rotation", Hadamard)):
            if sites and transform not in known:
                return f"the {title} of {next(iter(sites))}"
        return None

    def static_absmax(self, layer: str, maxima: Any) -> Any:
        """The absolute maximum from which a calibrated layer's input takes its scale. maxima: of its channels, (K,) float32."""
        quantizer = self.inputs[layer]
        coder = INPUT_CODERS[quantizer.scale]
        return coder.reduce(maxima, **options_of(coder, quantizer.options))

    def table(self) -> str:
        """What is quantized how, one line a site; the unquantized ones together."""
        lines = [f"scheme {self.name}"]
        lines += [f"  {'SmoothQuant for ' + site:<28} alpha {alpha:g}" for site, alpha in self.smooth.items()]
        lines += [f"  {'Hadamard rotation for ' + site}" for site in self.rotate]
        titles = {"weights": "weight", "inputs": "input of", "outputs": "output of"}
        for part, title in titles.items():
            chosen: Mapping[str, Quantizer] = getattr(self, part)
            lines += [f"  {title + ' ' + site:<28} {quantizer}" for site, quantizer in chosen.items()]
            rest = [site for site in SITES[part] if site not in chosen]
            line = f"  not quantized, {part}: {', '.join(rest)}"
            lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False) if rest else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The scheme as JSON values; `scheme_from_json` reads them."""
        parts = {part: {site: q.to_json() for site, q in getattr(self, part).items()} for part in SITES}
        more = {"rotate": list(self.rotate)} if self.rotate else {}
        return {"name": self.name, **parts, "smooth": dict(self.smooth)} | more


def _weights(bits: int, sites: str) -> dict[str, Quantizer]:
    names = LINEAR_WEIGHTS if sites == "mlp" else SITES["weights"]
    return dict.fromkeys(names, Quantizer(bits, "per_tensor"))


def _int8(name: str, scale: str) -> Scheme:
    weights = dict.fromkeys((*HEAD_WEIGHTS, *LINEAR_WEIGHTS), Quantizer(8, "per_channel"))
    smooth = dict.fromkeys(LINEAR_LAYERS, ALPHA) if name == "int8-smooth" else {}
    return Scheme(name, weights, dict.fromkeys(PRODUCTS, Quantizer(8, scale)), smooth=smooth)


def _hadamard(name: str) -> Scheme:
    return replace(_int8(name, "static"), rotate=("in_proj", "out_proj"))


def _int4(name: str) -> Scheme:
    """`int8` with the linear layers' weights in groups; -all: the embedding and the head too."""
    grouped = Quantizer(4, "grouped", group=64)
    sites = (*HEAD_WEIGHTS, *LINEAR_WEIGHTS) if name == "int4-all" else LINEAR_WEIGHTS
    int8 = _int8(name, "per_token")
    return replace(int8, weights={**int8.weights, **dict.fromkeys(sites, grouped)})


# Every built-in scheme without a number in its name.
NAMED: dict[str, Callable[[str], Scheme]] = {
    "fp32": Scheme, "int8": lambda name: _int8(name, "per_token"), "int8-static": lambda name: _int8(name, "static"),
    "int8-smooth": lambda name: _int8(name, "static"), "int4": _int4, "int4-all": _int4, "int8-hadamard": _hadamard,
    "llm-int8": lambda name: _int8(name, "per_token_outliers"), "flatten-int8": lambda name: _int8(name, "flattened"),
}  # fmt: skip


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name (`wN-mlp`, `wN-all`, `wNaM-mlp`, `wNaM-all`, or one of NAMED.

    Raises SchemeError.
    """
    if name in NAMED:
        return NAMED[name](name)
    if match := re.fullmatch(r"w([0-9]{1,2})(?:a([0-9]{1,2}))?-(mlp|all)", name):
        outputs = dict.fromkeys(LINEAR_LAYERS, Quantizer(int(match[2]), "per_tensor")) if match[2] else {}
        return Scheme(name, _weights(int(match[1]), match[3]), outputs=outputs)
    raise SchemeError(
        f"unknown scheme '{name}'; there are wN-mlp, wN-all (N 2 to 8), wNaM-mlp, wNaM-all (M 2 to 16), "
        f"{', '.join(NAMED)}, and FILE.json"
    )


def scheme_from_json(values: Any) -> Scheme:
    """The scheme that `Scheme.to_json` gave. Raises SchemeError, which names the entry that is wrong and what it may be."""
    values = _object(values, "the scheme", ("name", *SITES, "smooth", "rotate"), required=("name",))
    name = values["name"]
    if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME):
        raise SchemeError(f"scheme: name is a text of 1 to {LONGEST_NAME} printable characters")
    parts = {}
    for part, sites in SITES.items():
        entries = _object(values.get(part, {}), part, sites)
        parts[part] = {site: _quantizer(entry, f"{part}.{site}", part) for site, entry in entries.items()}
    rotate = values.get("rotate", [])
    if not isinstance(rotate, list) or not all(isinstance(site, str) for site in rotate):
        raise SchemeError(f"scheme: rotate is a list of {', '.join(LINEAR_LAYERS)}")
    smooth = _object(values.get("smooth", {}), "smooth", LINEAR_LAYERS)
    return Scheme(name, smooth=smooth, rotate=tuple(rotate), **parts)


def _object(values: Any, what: str, keys: Collection[str], required: Collection[str] = ()) -> dict[str, Any]:
    """A JSON object of these keys. Raises SchemeError for anything else."""
    if not isinstance(values, dict):
        raise SchemeError(f"scheme: {what} is no JSON object; its entries may be {', '.join(keys)}")
    if unknown := sorted(set(values) - set(keys)):
        raise SchemeError(
            f"scheme: {what} has the unknown entry {printable(repr(unknown[0]), 60)}; there are {', '.join(keys)}"
        )
    if missing := [key for key in required if key not in values]:
        raise SchemeError(f"scheme: {what} has no {missing[0]}; it must have {', '.join(required)}")
    return values


def _quantizer(values: Any, what: str, part: str) -> Quantizer:
    """One entry of a part. Raises SchemeError."""
    entry = _object(values, what, ("bits", "scale", *OPTIONS), required=("bits", "scale"))
    if not isinstance(entry["scale"], str):
        raise SchemeError(f"scheme: {what} has a scale that is no text; it may be {', '.join(CODERS[part])}")
    return Quantizer(**entry)
