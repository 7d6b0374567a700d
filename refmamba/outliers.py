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

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import click
import numpy as np

from refmamba.arith import F32Array, IntArray
from refmamba.backend import Runner
from refmamba.calibrate import SUFFIX, passage, read_text, save_calibration
from refmamba.errors import DataError
from refmamba.files import write_file
from refmamba.load import Loaded
from refmamba.model import Mamba, Positions
from refmamba.options import model_options
from refmamba.perplexity import CALL
from refmamba.scheme import LINEAR_LAYERS

SIGMA = 6.0
HEAD = "lm_head"  # a linear layer whose input the paper's figure leaves out
Over = Literal["channels", "values"]


@dataclass
class Site:
    """What a text did at one linear layer's input: m (K,) float32, and the count, sum and squares of all values."""

    maxima: F32Array
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def see(self, x: F32Array) -> None:
        """Take in the activations of more tokens, (L, K)."""
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


def observe(runner: Runner, tokens: IntArray, head: bool = False) -> dict[str, Site]:
    """Every linear layer's input over the tokens (L,), the state carried: `layers.{i}.in_proj` and so on, in order.

    head: run the head too, and show its input as `lm_head`, last.
    The reference runs the runner's model: it shows every input, and where a backend is exact its values are the same.
    """
    sites: dict[str, Site] = {}

    def look(name: str, value: F32Array) -> None:
        site = name.removesuffix(".in")
        if site != name:
            sites.setdefault(site, Site(np.zeros(value.shape[1], np.float32))).see(value)

    logits: Positions = "all" if head else "none"
    model, state = Mamba(runner.model), None
    for start in range(0, len(tokens), CALL):
        _, state = model.prefill([tokens[start : start + CALL]], state, logits=logits, hook=look)
    return sites


@dataclass(frozen=True)
class Report:
    """The outliers of a model over a text, at one sigma."""

    sites: Mapping[str, Site]
    sigma: float
    over: Over
    channels: Mapping[str, IntArray] = field(init=False)  # site -> outlier channels

    def __post_init__(self) -> None:
        found = {name: site.outliers(self.sigma, self.over) for name, site in self.sites.items()}
        object.__setattr__(self, "channels", found)

    def of(self, layer: str) -> dict[str, IntArray]:
        """The outliers of every layer at one kind of site: in_proj and so on."""
        return {name: found for name, found in self.channels.items() if name.endswith("." + layer)}

    def recurring(self, layer: str) -> dict[int, int]:
        """Channels that are outliers in more than one layer, and in how many; the most frequent first."""
        counts = Counter(int(c) for found in self.of(layer).values() for c in found)
        return {c: n for c, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n > 1}

    def to_json(self) -> dict[str, Any]:
        """Counts, shares, thresholds and channels a layer and site; which recur."""
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
        """The same for a reader."""
        lines = [f"{'site':<22}{'channels':>9}{'outliers':>9}{'share':>8}{'threshold':>11}{'largest':>9}{'median':>9}"]
        for name, site in self.sites.items():
            n, k = len(self.channels[name]), len(site.maxima)
            lines.append(
                f"{name:<22}{k:>9}{n:>9}{n / k:>8.2%}{site.threshold(self.sigma, self.over):>11.3f}"
                f"{site.maxima.max():>9.3f}{np.median(site.maxima):>9.3f}"
            )
        for layer in LINEAR_LAYERS:
            found = self.of(layer)
            channels = sum(len(self.sites[name].maxima) for name in found)
            total, again = sum(map(len, found.values())), self.recurring(layer)
            named = ", ".join(f"{c} ({n} layers)" for c, n in list(again.items())[:8]) or "none"
            lines.append(f"{layer}: {total} of {channels} channels ({total / channels:.2%}); recurring: {named}")
        return "\n".join(lines)


def report_on(loaded: Loaded, text: str, sigma: float = SIGMA, over: Over = "channels") -> Report:
    """The outliers of a loaded model over a text. Raises DataError, NonFiniteError."""
    return Report(observe(loaded.runner, loaded.tokenizer.encode_array(text)), sigma, over)


def plot(report: Report, title: str, file: Path) -> None:
    """Figure 1: a panel a site, every channel's m over the layers, the band within the threshold shaded. PNG or SVG.

    Raises DataError where the file's name ends otherwise, or where matplotlib is missing.
    """
    if file.suffix not in (".png", ".svg"):
        raise DataError(f"--plot {file}: the name must end in .png or .svg")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise DataError("a plot needs matplotlib; install it with: pip install 'refmamba[plot]'") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for axes, layer in zip(panels, LINEAR_LAYERS, strict=True):
        for i, name in enumerate(report.of(layer)):
            site, outliers = report.sites[name], report.channels[name]
            edges = [i - 0.5, i + 0.5]
            x = i - 0.5 + (np.arange(len(site.maxima)) + 0.5) / len(site.maxima)
            band = axes.fill_between(edges, 0, site.threshold(report.sigma, report.over), color="0.86", lw=0)
            (mean,) = axes.plot(edges, [site.maxima.mean()] * 2, color="black", lw=1.2, zorder=3)
            (rest,) = axes.plot(x, site.maxima, ".", ms=2.5, mew=0, color="tab:blue", rasterized=True)
            (found,) = axes.plot(x[outliers], site.maxima[outliers], "o", ms=4, color="tab:red")
            handles = [found, rest, mean, band]
        count, again = sum(map(len, report.of(layer).values())), report.recurring(layer)
        named = [f"channel {c} in {n} of {len(report.of(layer))} layers" for c, n in list(again.items())[:1]]
        outliers_in = f"{count or 'no'} outlier channel{'s' * (count != 1)}"
        axes.set_title(f"input of {layer}: " + ", ".join([outliers_in, *named]), fontsize=10)
        axes.set(xlabel="layer (in each, its channels from left to right)", ylabel="absolute maximum over the text")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
    over = "it" if report.over == "channels" else "that of all values"
    labels = ["outlier channel", "other channel", "mean of the layer's channels",
              f"up to {report.sigma:g} standard deviations above {over}"]  # fmt: skip
    figure.suptitle(title)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, markerscale=1.5)
    write_file(file, lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=100))


@click.command("outliers")
@model_options
@click.option("--text", "file", type=click.Path(path_type=Path), help="A UTF-8 text file.  [default: the package's passage]")
@click.option("--sigma", default=SIGMA, show_default=True, type=click.FloatRange(0), help="Standard deviations.")
@click.option("--over", default="channels", show_default=True, type=click.Choice(get_args(Over)),
              help="Mean and deviation of the channels' maxima, or of all values.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="F.png or F.svg.")
@click.option("--save-calibration", "saved", type=click.Path(path_type=Path, dir_okay=False),
              help="Write every channel's maximum to this .json, for --calibrate.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(
    choose: Callable[[str], Loaded], file: Path | None, sigma: float, over: Over, plot_file: Path | None, saved: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Where the outlier channels sit (figure 1); fp32 unless a scheme is named."""
    text = passage() if file is None else read_text(file)
    if saved is not None and saved.suffix != SUFFIX:
        raise DataError(f"--save-calibration {saved}: the name must end in {SUFFIX}")
    loaded = choose("fp32")
    sites = observe(loaded.runner, loaded.tokenizer.encode_array(text), head=saved is not None)
    if saved is not None:
        save_calibration({name: site.maxima for name, site in sites.items()}, saved)
    sites.pop(HEAD, None)
    report = Report(sites, sigma, over)
    if plot_file is not None:
        plot(report, f"{loaded.choice.model}, {loaded.runner.scheme.name}", plot_file)
    if as_json:
        click.echo(json.dumps(loaded.describe() | {"text": str(file or "the package's passage")} | report.to_json()))
    else:
        click.echo(report.table())
