"""SmoothQuant's alpha for a model: what gives the fewest bits per byte on the text that it is calibrated on."""

from collections.abc import Callable, Iterator, Mapping

from refmamba.spec.scheme import LINEAR_LAYERS

GRID = (None, *(k / 10 for k in range(11)))  # None: not smoothed
Alphas = Mapping[str, float]  # linear layer (`in_proj`) -> alpha


def most_tries(per_site: bool) -> int:
    """How many choices `search` may try."""
    return len(GRID) * (1 + per_site * len(LINEAR_LAYERS))


def search(bits: Callable[[Alphas], float], per_site: bool) -> Iterator[tuple[dict[str, float], float]]:
    """No smoothing and every alpha of the grid, for all linear layers alike; then, from the best, for one after the other.

    Yields each choice with its bits; a layer that is not in it is not smoothed. The best is the smallest, the first of equals.
    """
    best: tuple[float, dict[str, float]] | None = None
    for layers in [LINEAR_LAYERS, *([(layer,) for layer in LINEAR_LAYERS] if per_site else [])]:
        start = best[1] if best else None
        for alpha in GRID:
            others = {layer: chosen for layer, chosen in (start or {}).items() if layer not in layers}
            tried = others if alpha is None else others | dict.fromkeys(layers, alpha)
            if tried == start:
                continue
            value = bits(tried)
            yield tried, value
            if best is None or value < best[0]:
                best = value, tried


def describe(alphas: Alphas) -> str:
    """`in_proj 0.5, x_proj off, ...`."""
    return ", ".join(f"{layer} {alphas[layer]:g}" if layer in alphas else f"{layer} off" for layer in LINEAR_LAYERS)
