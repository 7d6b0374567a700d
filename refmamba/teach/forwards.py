"""The two forwards that are looked at side by side: one under a scheme, one under `fp32`."""

from refmamba.errors import DataError
from refmamba.run.session import Opened
from refmamba.spec.arith import IntArray
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.scheme import Scheme, parse_scheme
from refmamba.teach.follow import Follower
from refmamba.teach.payload import exponents_of


def follow(opened: Opened, scheme: Scheme, tokens: IntArray) -> Follower:
    """The forward of some tokens (L,) under a scheme, beside the same under fp32. Raises RefmambaError."""
    trace, plain = (Mamba(opened.quantized(each)).trace(tokens) for each in (scheme, parse_scheme("fp32")))
    smoothing = exponents_of(opened.float_checkpoint(), opened.calibration, scheme) if scheme.smooth else {}
    return Follower(trace, plain, smoothing, tuple(scheme.rotate))


def named_sites(follower: Follower, layer: int, op: str | None) -> list[str]:
    """The values of a layer that `op` names, in order: one, all of a linear layer, or all (None).

    What belongs to no layer (embedding, norm_f, lm_head) is named alike. Raises DataError, which lists what there is.
    """
    at = f"layers.{layer}."
    inside = [site for site in follower.sites if site.startswith(at)]
    outside = [site for site in follower.sites if not site.startswith("layers.")]
    if not inside:
        layers = 1 + max(int(site.split(".")[1]) for site in follower.sites if site.startswith("layers."))
        raise DataError(f"the model has no layer {layer}; there are 0 to {layers - 1}")
    if op is None:
        return inside
    names = {site.removeprefix(at): site for site in (*inside, *outside)}
    chosen = [site for name, site in names.items() if name == op or name.startswith(f"{op}.")]
    if not chosen:
        raise DataError(f"--op {op}: no operation has this name; there are {', '.join(names)}")
    return chosen
