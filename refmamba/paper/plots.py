"""The paper's figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refmamba.errors import DataError
from refmamba.formats.files import write_file
from refmamba.paper.outliers import Report
from refmamba.paper.tables import ModelTables
from refmamba.spec.scheme import LINEAR_LAYERS


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


def figure_2(found: Sequence["ModelTables"], guess: float, file: Path) -> None:
    """Average accuracy, and bits per byte, over parameters, a line a scheme. Raises DataError."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError as error:
        raise DataError("a plot needs matplotlib; install it with: pip install 'refmamba[plot]'") from error
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    accuracy, text = figure.subplots(1, 2)
    found, schemes = sorted(found, key=lambda one: one.parameters), list(found[0].table_1)
    for i, scheme in enumerate(schemes):
        # each scheme a little to the right of the last, so that equal figures do not hide each other
        x = [one.parameters * 1.02 ** (i - (len(schemes) - 1) / 2) for one in found]
        style = {"marker": "osD^v"[i % 5], "ms": 5, "lw": 1.2, "ls": "--" if scheme.endswith("-mlp") else "-", "label": scheme}
        averages = [one.table_1[scheme]["average"] for one in found]
        accuracy.errorbar(x, [cell.value for cell in averages], [cell.stderr for cell in averages], capsize=2, **style)
        text.plot(x, [one.bits_per_byte[scheme] for one in found], **style)
    accuracy.axhline(guess, color="0.5", ls=":", label="guessing")
    accuracy.set(title="average accuracy, ± standard error", ylabel="per cent")
    text.set(title="bits per byte of the text (fewer is better)", ylabel="bits per byte")
    sizes = [one.parameters for one in found]
    for axes in (accuracy, text):
        axes.set(xlabel="parameters", xscale="log", xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
        axes.set_xticks(sizes, [f"{size / 1e6:.3g} M" if size < 1e9 else f"{size / 1e9:.2f} B" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", frameon=False)
    write_file(file, lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=110))
