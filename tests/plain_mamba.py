"""A Mamba-1 forward in float64 NumPy, from the Mamba paper alone, with the faults that numbers from elsewhere have."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def same(x: Array) -> Array:
    return x


def forward(
    weights: Mapping[str, Array],
    tokens: Array,
    *,
    epsilon: float = 1e-5,
    bias: float = 1.0,
    factor: Callable[[Array], Array] = same,
) -> dict[str, Array]:
    """Logits and some sites. bias: times that dt_proj's is added; factor: what both factors of a product go through."""
    w = {name.removeprefix("backbone.").replace(".mixer.", "."): x.astype(np.float64) for name, x in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))

    def norm(x: Array, name: str) -> Array:
        y: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * w[name]
        return y

    def product(x: Array, matrix: Array) -> Array:
        y: Array = factor(x) @ factor(matrix).T
        return y

    def silu(x: Array) -> Array:
        y: Array = x / (1 + np.exp(-x))
        return y

    sites = {}
    x = sites["embedding"] = w["embeddings.weight"][tokens]
    for i in range(layers):
        p = {name.removeprefix(f"layers.{i}."): value for name, value in w.items() if name.startswith(f"layers.{i}.")}
        rank, taps = p["dt_proj.weight"].shape[1], p["conv1d.weight"].shape[-1]
        u, z = np.split(product(norm(x, f"layers.{i}.norm.weight"), p["in_proj.weight"]), 2, axis=1)
        padded = np.concatenate([np.zeros((taps - 1, u.shape[1])), u])
        u = sum(padded[t : t + len(u)] * p["conv1d.weight"][:, 0, t] for t in range(taps)) + p["conv1d.bias"]
        u = silu(u)
        dt, B, C = np.split(product(u, p["x_proj.weight"]), [rank, rank + p["A_log"].shape[1]], axis=1)
        delta = np.log1p(np.exp(product(dt, p["dt_proj.weight"]) + bias * p["dt_proj.bias"]))
        A, h, y = -np.exp(p["A_log"]), np.zeros_like(p["A_log"]), np.empty_like(u)
        for t in range(len(u)):
            h = np.exp(delta[t][:, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
            y[t] = h @ C[t] + p["D"] * u[t]
        x = x + product(y * silu(z), p["out_proj.weight"])
        sites[f"layers.{i}.delta"], sites[f"layers.{i}.ssm_state"], sites[f"layers.{i}.residual_out"] = delta, h, x
    return sites | {"logits": product(norm(x, "norm_f.weight"), w["embeddings.weight"])}
