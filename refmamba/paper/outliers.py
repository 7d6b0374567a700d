"""Outlier channels at the inputs of the linear layers (Mamba-PTQ, figure 1 and section 3).

For one layer and site let m[c] be the largest magnitude of channel c over all tokens of a text. Channel c is an outlier
where m[c] > mean + sigma * deviation. The paper says 'six standard deviations of the layer's mean' and not of what, so
there are two readings:

channels   mean and deviation of m over the layer's channels. The default: it compares each channel with its neighbours,
           which is what a scale for the whole tensor makes them share, and it does not depend on the text's length.
           No m is further from its mean than sqrt(K - 1) deviations of K values: with K <= 37 channels, as at dt_proj
           of a small model, nothing can lie beyond six.
values     mean and deviation of all the layer's values, over channels and tokens. The longer the text, the more of the
           channels pass it.

Deviations are those of the whole population (divided by K, not K - 1).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from refmamba.backend import Runner
from refmamba.run.perplexity import CALL
from refmamba.run.progress import bar
from refmamba.run.session import Session
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.mamba1 import Mamba, Positions
from refmamba.spec.scheme import LINEAR_LAYERS

SIGMA = 6.0
HEAD = "lm_head"  # a linear layer whose input the paper's figure leaves out
Over = Literal["channels", "values"]


@dataclass
class SiteStatistics:
    """What a text showed at one linear layer's input: m (K,) float32, and the count, sum and squares of all values."""

    maxima: F32Array
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, x: F32Array) -> None:
        """Take in the activations of more tokens, (L, K) float32."""
        self.maxima = np.maximum(self.maxima, np.max(np.abs(x), axis=0))
        wide = x.astype(np.float64)
        self.count += x.size
        self.total += float(wide.sum())
        self.squares += float((wide * wide).sum())

    def threshold(self, sigma: float = SIGMA, over: Over = "channels") -> float:
        """The magnitude beyond which a channel is an outlier."""
        if over == "channels":
            wide = self.maxima.astype(np.float64)
            return float(wide.mean() + sigma * wide.std())
        mean = self.total / self.count
        return float(abs(mean) + sigma * np.sqrt(max(0.0, self.squares / self.count - mean * mean)))

    def outliers(self, sigma: float = SIGMA, over: Over = "channels") -> IntArray:
        """The outlier channels, in order: (n,) int64."""
        return np.flatnonzero(self.maxima > self.threshold(sigma, over))


def observe(runner: Runner, tokens: IntArray, head: bool = False) -> dict[str, SiteStatistics]:
    """Every linear layer's input over the tokens (L,), the state carried: `layers.{i}.in_proj` and so on, in order.

    head: run the head too, and show its input as `lm_head`, last.
    The reference runs the runner's model: it shows every input, and where a backend is exact its values are the same.
    """
    sites: dict[str, SiteStatistics] = {}

    def look(name: str, value: F32Array) -> None:
        site = name.removesuffix(".in")
        if site != name:
            sites.setdefault(site, SiteStatistics(np.zeros(value.shape[1], np.float32))).add(value)

    logits: Positions = "all" if head else "none"
    model, state = Mamba(runner.model), None
    with bar(len(tokens), "looking for outliers", "token") as seen:
        for start in range(0, len(tokens), CALL):
            part = tokens[start : start + CALL]
            _, state = model.prefill([part], state, logits=logits, hook=look)
            seen.update(len(part))
    return sites


@dataclass(frozen=True)
class Report:
    """The outliers of a model over a text, at one sigma."""

    sites: Mapping[str, SiteStatistics]
    sigma: float
    over: Over
    channels: Mapping[str, IntArray] = field(init=False)  # site -> outlier channels

    def __post_init__(self) -> None:
        channels = {name: site.outliers(self.sigma, self.over) for name, site in self.sites.items()}
        object.__setattr__(self, "channels", channels)

    def of(self, layer: str) -> dict[str, IntArray]:
        """The outliers of every layer at one kind of site: in_proj and so on."""
        return {name: channels for name, channels in self.channels.items() if name.endswith("." + layer)}

    def recurring(self, layer: str) -> dict[int, int]:
        """Channels that are outliers in more than one layer, and in how many; the most frequent first."""
        counts = Counter(int(c) for channels in self.of(layer).values() for c in channels)
        return {c: n for c, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n > 1}

    def to_json(self) -> dict[str, Any]:
        """For each site its channels, outliers, share and threshold; then the channels that recur over the layers."""
        return {
            "sigma": self.sigma,
            "over": self.over,
            "sites": {
                name: {"channels": len(site.maxima), "outliers": self.channels[name].tolist(),
                       "share": len(self.channels[name]) / len(site.maxima),
                       "threshold": site.threshold(self.sigma, self.over), "absmax": float(site.maxima.max()),
                       "median": float(np.median(site.maxima))}
                for name, site in self.sites.items()
            },
            "recurring": {layer: {str(c): n for c, n in self.recurring(layer).items()} for layer in LINEAR_LAYERS},
        }  # fmt: skip

    def table(self) -> str:
        """The counts as text: a line for each site, then one for each kind of site."""
        lines = [f"{'site':<22}{'channels':>9}{'outliers':>9}{'share':>8}{'threshold':>11}{'largest':>9}{'median':>9}"]
        for name, site in self.sites.items():
            n, k = len(self.channels[name]), len(site.maxima)
            lines.append(
                f"{name:<22}{k:>9}{n:>9}{n / k:>8.2%}{site.threshold(self.sigma, self.over):>11.3f}"
                f"{site.maxima.max():>9.3f}{np.median(site.maxima):>9.3f}"
            )
        for layer in LINEAR_LAYERS:
            outliers = self.of(layer)
            channels = sum(len(self.sites[name].maxima) for name in outliers)
            count, recurring = sum(map(len, outliers.values())), self.recurring(layer)
            named = ", ".join(f"{c} ({n} layers)" for c, n in list(recurring.items())[:8]) or "none"
            lines.append(f"{layer}: {count} of {channels} channels ({count / channels:.2%}); recurring: {named}")
        return "\n".join(lines)


def report_on(session: Session, text: str, sigma: float = SIGMA, over: Over = "channels") -> Report:
    """The outliers of a model over a text. Raises DataError, NonFiniteError."""
    return Report(observe(session.runner, session.tokenizer.encode_array(text)), sigma, over)
