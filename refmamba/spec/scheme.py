"""Schemes: for every tensor and every activation, which bits and which scale (docs/SPEC.md, section 4).

A linear layer has two sites. On its `in` side the activation becomes the codes of the integer product; on its `out` side
the result becomes codes that are read back to float32 at once. The Mamba-PTQ paper does not define 'mlp' and 'all', nor
where its scales come from: the readings below are ours. `Scheme.table` prints them, and a JSON file of the same
entries changes them (`--scheme FILE`).
"""

import re
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from refmamba.errors import SchemeError
from refmamba.spec.coders import CODERS, INPUT_CODERS, Smooth

LINEAR_LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj")
LONGEST_NAME = 100  # characters
ALPHA = 0.5  # SmoothQuant's migration strength where a scheme does not say another
LINEAR_WEIGHTS = tuple(f"{layer}.weight" for layer in LINEAR_LAYERS)
HEAD_WEIGHTS = ("embedding.weight", "lm_head.weight")  # one tensor where the head is tied
OTHER_PARAMETERS = (
    "norm.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_proj.bias", "A_log", "D", "out_proj.bias",
    "norm_f.weight",
)  # fmt: skip
PRODUCTS = (*LINEAR_LAYERS, "lm_head")
BITS = {"weights": (2, 8), "inputs": (2, 8), "outputs": (2, 16)}
SITES = {"weights": (*HEAD_WEIGHTS, *LINEAR_WEIGHTS, *OTHER_PARAMETERS), "inputs": PRODUCTS, "outputs": LINEAR_LAYERS}


@dataclass(frozen=True)
class Quantizer:
    """How one tensor or site is coded.

    scale: per_tensor; per_channel (one a row of a weight); per_token (one a row of an activation); static (one for the
    site, from calibration). For activations all but static are taken from the values themselves.
    """

    bits: int
    scale: str

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.scale.replace('_', ' ')}"


@dataclass(frozen=True)
class Scheme:
    """Which parameters (`weights`), `in` sides (`inputs`) and `out` sides (`outputs`) are quantized, and how.

    What is not named is not quantized. smooth: SmoothQuant's alpha, 0 to 1, of each linear layer whose input it divides
    before quantizing (section 5). Raises SchemeError for an unknown site, width, scale or alpha.
    """

    name: str
    weights: Mapping[str, Quantizer] = field(default_factory=dict)
    inputs: Mapping[str, Quantizer] = field(default_factory=dict)
    outputs: Mapping[str, Quantizer] = field(default_factory=dict)
    smooth: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, sites in SITES.items():
            low, high = BITS[part]
            for site, quantizer in getattr(self, part).items():
                if site not in sites:
                    raise SchemeError(f"scheme {self.name}: {part} has no site '{site}'; there are {', '.join(sites)}")
                if type(quantizer.bits) is not int or not low <= quantizer.bits <= high:
                    raise SchemeError(f"scheme {self.name}: {site} has {quantizer.bits} bits; {part} take {low} to {high}")
                if quantizer.scale not in CODERS[part]:
                    choices = ", ".join(CODERS[part])
                    raise SchemeError(f"scheme {self.name}: {site} has the scale '{quantizer.scale}'; {part} take {choices}")
        for site, alpha in self.smooth.items():
            if site not in LINEAR_LAYERS:
                raise SchemeError(f"scheme {self.name}: smooth has no site '{site}'; there are {', '.join(LINEAR_LAYERS)}")
            if type(alpha) not in (int, float) or not 0 <= alpha <= 1:
                raise SchemeError(f"scheme {self.name}: smooth has the alpha {alpha!r} for {site}; it is 0 to 1")
            if site not in self.inputs or not INPUT_CODERS[self.inputs[site].scale].calibrated:
                raise SchemeError(f"scheme {self.name}: smooth needs a static scale on the input of {site}")
        if self.weights.get("embedding.weight") and self.weights["embedding.weight"] != self.weights.get("lm_head.weight"):
            raise SchemeError(f"scheme {self.name}: embedding.weight and lm_head.weight can be one tensor: code both alike")

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
        return f"smoothing of {next(iter(self.smooth))}" if self.smooth and Smooth not in known else None

    def table(self) -> str:
        """What is quantized how, one line a site; the unquantized ones together."""
        lines = [f"scheme {self.name}"]
        lines += [f"  {'SmoothQuant for ' + site:<28} alpha {alpha:g}" for site, alpha in self.smooth.items()]
        titles = {"weights": "weight", "inputs": "input of", "outputs": "output of"}
        for part, title in titles.items():
            chosen: Mapping[str, Quantizer] = getattr(self, part)
            lines += [f"  {title + ' ' + site:<28} {quantizer}" for site, quantizer in chosen.items()]
            rest = [site for site in SITES[part] if site not in chosen]
            lines += [f"  not quantized, {part}: {', '.join(rest)}"] if rest else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The scheme as JSON values; `scheme_from_json` reads them."""
        return asdict(self)


def _weights(bits: int, sites: str) -> dict[str, Quantizer]:
    names = LINEAR_WEIGHTS if sites == "mlp" else SITES["weights"]
    return dict.fromkeys(names, Quantizer(bits, "per_tensor"))


def _int8(name: str, scale: str) -> Scheme:
    weights = dict.fromkeys((*HEAD_WEIGHTS, *LINEAR_WEIGHTS), Quantizer(8, "per_channel"))
    smooth = dict.fromkeys(LINEAR_LAYERS, ALPHA) if name == "int8-smooth" else {}
    return Scheme(name, weights, dict.fromkeys(PRODUCTS, Quantizer(8, scale)), smooth=smooth)


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name: `fp32`, `wN-mlp`, `wN-all`, `wNaM-mlp`, `wNaM-all`, `int8`, `int8-static`, `int8-smooth`.

    Raises SchemeError.
    """
    if name == "fp32":
        return Scheme(name)
    if name in ("int8", "int8-static", "int8-smooth"):
        return _int8(name, "per_token" if name == "int8" else "static")
    if match := re.fullmatch(r"w([0-9]{1,2})(?:a([0-9]{1,2}))?-(mlp|all)", name):
        outputs = dict.fromkeys(LINEAR_LAYERS, Quantizer(int(match[2]), "per_tensor")) if match[2] else {}
        return Scheme(name, _weights(int(match[1]), match[3]), outputs=outputs)
    raise SchemeError(
        f"unknown scheme '{name}'; there are fp32, wN-mlp, wN-all (N 2 to 8), wNaM-mlp, wNaM-all (M 2 to 16), "
        "int8, int8-static, int8-smooth, and FILE.json"
    )


def scheme_from_json(values: Any) -> Scheme:
    """The scheme that `Scheme.to_json` gave. Raises SchemeError."""
    try:
        parts = {part: {k: Quantizer(**q) for k, q in values.get(part, {}).items()} for part in SITES}
        if unknown := sorted(set(values) - {"name", "smooth", *SITES}):
            raise SchemeError(f"scheme: unknown entry {unknown[0]!r}; there are name, smooth, {', '.join(SITES)}")
        name = values["name"]
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME):
            raise SchemeError(f"scheme: the name is a text of 1 to {LONGEST_NAME} printable characters")
        return Scheme(name, smooth=dict(values.get("smooth", {})), **parts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SchemeError(f"scheme: not in the form of Scheme.to_json ({error!r})") from error
