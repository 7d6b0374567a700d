"""Parameters under a scheme: what every backend loads (docs/SPEC.md, sections 2, 4 and 5)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refmamba.errors import DataError, SchemeError
from refmamba.spec.arith import F32Array
from refmamba.spec.coders import (
    INPUT_CODERS,
    OUTPUT_CODERS,
    PARAMETER_CODERS,
    Coder,
    ParameterCoder,
    Unquantized,
    UnquantizedMatrix,
)
from refmamba.spec.codes import LONGEST_ROW, Codes, FixedPoint, Param, dequantize
from refmamba.spec.config import MambaConfig, ParameterSource, kind_of
from refmamba.spec.linear import Linear
from refmamba.spec.ops import state_matrix
from refmamba.spec.scheme import LINEAR_LAYERS, LINEAR_WEIGHTS, Scheme
from refmamba.spec.transforms import FOLDED, Hadamard, Smooth, Transform, rotated, smoothed


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A model under a scheme: what every backend loads.

    params, by name: Codes where the scheme quantizes the parameter; FixedPoint for any other matrix of a product; else
    float32. `lm_head.weight` is always there (the embedding's Codes where `shares_codes`). A static input has
    `{site}.absmax` (float32, shape ()), a smoothed one `{site}.smooth` (int32 exponents, one an input channel), where
    site is `layers.{i}.in_proj` and so on. `layers.{i}.A` is there where the checkpoint states it and A_log is not in
    codes. The mapping may make a parameter each time it is asked for: see `held`.
    """

    config: MambaConfig
    scheme: Scheme
    params: Mapping[str, Param]

    def __post_init__(self) -> None:
        """Raises SchemeError where a product with N-bit codes would have rows too long to be exact: eq. (11)."""
        c = self.config
        columns = {"in_proj": c.d_model, "x_proj": c.d_inner, "dt_proj": c.dt_rank, "out_proj": c.d_inner, "lm_head": c.d_model}
        for site, length in columns.items():
            coded = site in self.scheme.inputs or f"{site}.weight" in self.scheme.weights
            if coded and length > LONGEST_ROW:
                raise SchemeError(
                    f"scheme {self.scheme.name}: {site} has rows of {length}, and a product with codes is exact up to "
                    f"{LONGEST_ROW}: leave its weight and its input unquantized"
                )

    def value(self, name: str) -> F32Array:
        """A parameter that is not a matrix of a product, read back to float32: eq. (9)."""
        param = self.params[name]
        assert not isinstance(param, FixedPoint)
        return dequantize(param) if isinstance(param, Codes) else param

    def state_matrix(self, layer: int) -> F32Array:
        """A of a layer, (d_inner, d_state): as the checkpoint states it, else eq. (19)."""
        name = f"layers.{layer}.A"
        return self.value(name) if name in self.params else state_matrix(self.value(f"{name}_log"))

    def linear(self, site: str) -> Linear:
        """A linear layer by its site, `layers.{i}.in_proj` and so on, or `lm_head`."""
        layer = site.rsplit(".", 1)[-1]
        weight = self.params[f"{site}.weight"]
        assert isinstance(weight, Codes | FixedPoint)
        transforms: list[Transform] = [Smooth(self._exponents(site))] if f"{site}.smooth" in self.params else []
        transforms += [Hadamard()] if layer in self.scheme.rotate else []
        into: Coder = Unquantized()
        if quantizer := self.scheme.inputs.get(layer):
            coder = INPUT_CODERS[quantizer.scale]
            into = quantizer.build(coder, *([self.value(f"{site}.absmax")] if coder.calibrated else []))
        quantizer = self.scheme.outputs.get(layer)
        output: Coder | None = quantizer.build(OUTPUT_CODERS[quantizer.scale]) if quantizer else None
        has_bias = f"{site}.bias" in self.params and layer != "dt_proj"  # dt_proj's belongs to eq. (18)
        return Linear(site, weight, tuple(transforms), into, output, self.value(f"{site}.bias") if has_bias else None)

    def _exponents(self, site: str) -> NDArray[np.int32]:
        exponents = self.params[f"{site}.smooth"]
        assert isinstance(exponents, np.ndarray)
        return exponents.view(np.int32)

    @property
    def shares_codes(self) -> bool:
        """Whether the head's codes are the embedding's."""
        return self.config.tie_embeddings and "embedding.weight" in self.scheme.weights

    def held(self) -> "QuantizedModel":
        """The same model with every parameter in memory, for whoever reads them more than once."""
        params = {name: self.params[name] for name in self.params if not (self.shares_codes and name == "lm_head.weight")}
        if self.shares_codes:
            params["lm_head.weight"] = params["embedding.weight"]
        return QuantizedModel(self.config, self.scheme, params)


def linear_sites(config: MambaConfig) -> list[str]:
    """The sites of all linear layers in the order of the forward, the head last."""
    return [*(f"layers.{i}.{layer}" for i in range(config.n_layer) for layer in LINEAR_LAYERS), "lm_head"]


def parameter_coder(kind: str, scheme: Scheme) -> ParameterCoder | None:
    """How a scheme codes the parameters of a kind; None where they stay float32."""
    if quantizer := scheme.weights.get(kind):
        coder: ParameterCoder = quantizer.build(PARAMETER_CODERS[quantizer.scale])
        return coder
    return UnquantizedMatrix() if kind in LINEAR_WEIGHTS or kind == "lm_head.weight" else None


def site_values(config: MambaConfig, scheme: Scheme) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """What a model under a scheme holds beside its parameters, by name: shape and dtype (see `QuantizedModel.params`)."""
    shapes, values = config.shapes(), dict[str, tuple[tuple[int, ...], type[np.generic]]]()
    for site in linear_sites(config):
        layer = kind_of(site)
        if layer in scheme.calibrated:
            values[f"{site}.absmax"] = ((), np.float32)
        if layer in scheme.smooth and layer not in FOLDED:
            values[f"{site}.smooth"] = (shapes[f"{site}.weight"][1:], np.int32)
    return values


def quantize_parameter(x: F32Array, kind: str, name: str, scheme: Scheme) -> Param:
    """One parameter under a scheme: eq. (7, 8), eq. (10), or as it is. name: for an error."""
    coder = parameter_coder(kind, scheme)
    return x if coder is None else coder.code(x, name)


class _OnDemand(Mapping[str, Param]):
    """The parameters of a checkpoint under a scheme: each is quantized when it is asked for, and not kept."""

    def __init__(self, source: ParameterSource, scheme: Scheme, sites: Mapping[str, Param]) -> None:
        self._source, self._scheme, self._sites = source, scheme, sites
        self._names = dict.fromkeys([*sites, *source.config.shapes(), "lm_head.weight"])

    def __getitem__(self, name: str) -> Param:
        if name in self._sites:
            return self._sites[name]
        if name not in self._names:
            raise KeyError(name)
        kind = kind_of(name)
        if name == "lm_head.weight" and self._source.config.tie_embeddings:
            name = "embedding.weight"
            kind = name if name in self._scheme.weights else kind
        return quantize_parameter(self._source.read(name), kind, name, self._scheme)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def quantize_model(
    source: ParameterSource, scheme: Scheme, calibration: Mapping[str, F32Array] | None = None
) -> QuantizedModel:
    """A checkpoint under a scheme. Its `params` are quantized one by one as a backend takes them, and none is kept.

    calibration: for each site the absolute maximum of each input channel, (K,) float32, as `refmamba.spec.calibrate` gives
    it; needed where `scheme.needs_calibration`. Raises DataError where calibration lacks a site, or has other channels for it;
    reading a parameter raises NonFiniteError.
    """
    sites: dict[str, Param] = (
        {} if "A_log" in scheme.weights else {name: source.read(name) for name in source.config.state_matrices()}
    )
    if scheme.needs_calibration:
        absmax = _site_absmax(source.config, scheme, calibration or {})
        if scheme.smooth:
            source, absmax, exponents = smoothed(source, absmax, scheme.smooth)
            sites.update(exponents)
        sites.update({f"{site}.absmax": scheme.static_absmax(kind_of(site), m) for site, m in absmax.items()})
    return QuantizedModel(source.config, scheme, _OnDemand(rotated(source, scheme.rotate), scheme, sites))


def _site_absmax(config: MambaConfig, scheme: Scheme, calibration: Mapping[str, F32Array]) -> dict[str, F32Array]:
    """The maxima that the scheme needs: of a rotated input those after the rotation."""
    sites = [site for site in linear_sites(config) if kind_of(site) in scheme.calibrated]
    names = {site: f"{site}.rotated" if kind_of(site) in scheme.rotate else site for site in sites}
    maxima = {site: calibration.get(name, np.empty(0, np.float32)) for site, name in names.items()}
    shapes = config.shapes()
    for site, m in maxima.items():
        columns = config.d_model if site == "lm_head" else shapes[f"{site}.weight"][1]
        if m.shape != (columns,):
            raise DataError(
                f"scheme {scheme.name} needs {columns} maxima for {names[site]}, not {m.size}: calibrate on this model"
            )
    return maxima
