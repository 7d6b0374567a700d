"""Intermediates by name: the one hook through which a forward shows its values while it runs.

A hook is called as hook(site, value), in the order of computation, for one sequence. A site is "embedding", "norm_f",
"lm_head.*" or "layers.{i}.*" and one of the names below; the value is float32 unless the table says otherwise.
"""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

Hook = Callable[[str, NDArray[Any]], None]

PRODUCT_SITES = {
    "in": "the activation, (L, K)",
    "in_codes": "its codes, integers (L, K): eq. (8) or (10)",
    "acc": "the integer product, in float64 (L, rows): eq. (11, 12)",
    "result": "its value in float32, (L, rows): eq. (13)",
    "out_codes": "codes of the result where the scheme quantizes it, integers (L, rows): eq. (8)",
    "out": "what the next operation reads, (L, rows): eq. (9)",
}
LAYER_SITES = {
    "residual_in": "the block's input (L, d_model)",
    "norm": "eq. (16), (L, d_model)",
    "in_proj": PRODUCT_SITES,
    "conv1d": "eq. (17), (L, d_inner)",
    "u": "eq. (5), silu of the convolution (L, d_inner)",
    "x_proj": PRODUCT_SITES,
    "dt_proj": PRODUCT_SITES,
    "delta": "eq. (18), (L, d_inner)",
    "scan": "eq. (20, 21, 22), (L, d_inner)",
    "conv_state": "after the last token (d_inner, d_conv - 1)",
    "ssm_state": "after the last token (d_inner, d_state)",
    "gate": "eq. (23), (L, d_inner)",
    "out_proj": PRODUCT_SITES,
    "residual_out": "eq. (24), the block's output (L, d_model)",
}
MODEL_SITES = {
    "embedding": "eq. (15), (L, d_model)",
    "layers.{i}": LAYER_SITES,
    "norm_f": "eq. (16), (L, d_model) for the positions whose logits are asked for",
    "lm_head": PRODUCT_SITES,
}


def last_site(name: str) -> str:
    """The site without its layer: "layers.3.in_proj.out" -> "in_proj.out"."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name
