"""The paper's figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refmamba.errors import DataError
from refmamba.formats.writing import write_file
from refmamba.paper.outliers import Report
from refmamba.paper.tables import ModelTables, paired_difference
from refmamba.spec.scheme import LINEAR_LAYERS

NAMED_CHANNELS = 24  # outliers named in a panel of figure 1, those furthest above their threshold
CROWDED = 0.35  # of a layer's width: outliers nearer than that to each other have no room for two names side by side


def check_plot(file: Path) -> None:
    """Raise DataError where the name is not that of a PNG or SVG, or matplotlib is missing: before the work that is plotted."""
    if file.suffix not in (".png", ".svg"):
        raise DataError(f"--plot {file}: the name must end in .png or .svg")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DataError("a plot needs matplotlib; install it with: pip install 'refmamba[plot]'") from error


def plot(report: Report, title: str, file: Path) -> None:
    """Figure 1: a panel for each kind of site, every channel's m over the layers, the outliers named. PNG or SVG.

    The axis of m is logarithmic, since one channel may be a hundred times larger than the rest. Raises DataError as
    `check_plot` does.
    """
    check_plot(file)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for axes, layer in zip(panels, LINEAR_LAYERS, strict=True):
        sites = {name: report.sites[name] for name in report.of(layer)}
        thresholds = [site.threshold(report.sigma, report.over) for site in sites.values()]
        heights = [m for site in sites.values() for m in site.maxima.tolist() if m > 0]
        bottom, top = min(heights, default=1.0) / 1.3, 2 * max([*heights, *thresholds], default=1.0)
        points: list[tuple[float, float, float, int]] = []  # m over the threshold, x, m, channel
        for i, ((name, outliers), threshold) in enumerate(zip(report.of(layer).items(), thresholds, strict=True)):
            maxima, edges = sites[name].maxima, [i - 0.5, i + 0.5]
            x = i - 0.5 + (np.arange(len(maxima)) + 0.5) / len(maxima)
            band = axes.fill_between(edges, bottom, max(threshold, bottom), color="0.88", lw=0)
            (mean,) = axes.plot(edges, [maxima.mean()] * 2, color="black", lw=1.2, zorder=3)
            (other,) = axes.plot(x, maxima, ".", ms=2.5, mew=0, color="tab:blue", rasterized=True)
            (outlier,) = axes.plot(x[outliers], maxima[outliers], "o", ms=4, color="tab:red")
            handles = [outlier, other, mean, band]
            points += [(maxima[c] / threshold, x[c], maxima[c], int(c)) for c in outliers]
        lift, last = 0.0, -1.0
        for _, across, up, channel in sorted(sorted(points, reverse=True)[:NAMED_CHANNELS], key=lambda point: point[1]):
            lift = lift + 7 if across - last < CROWDED else 4  # points: the names of neighbours stand above each other
            axes.annotate(str(channel), (across, up), (0, lift), textcoords="offset points", fontsize=7, ha="center")
            last = across
        recurring = [f"channel {c} in {n} of {len(report.of(layer))} layers" for c, n in report.recurring(layer).items()]
        count = f"{len(points) or 'no'} outlier channel{'s' * (len(points) != 1)}"
        axes.set_title(f"input of {layer}: " + ", ".join([count, *recurring[:1]]), fontsize=9)
        axes.set(xlabel="layer (in each, its channels from left to right)", ylabel="largest magnitude over the text")
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if top < 30 * bottom else (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
    over = "it" if report.over == "channels" else "that of all values"
    labels = ["outlier channel, with its number", "other channel", "mean of the layer's channels",
              f"up to {report.sigma:g} standard deviations above {over}"]  # fmt: skip
    figure.suptitle(title)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, markerscale=1.5, fontsize=9)
    write_file(file, lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=100))


def figure_2(models: Sequence[ModelTables], guess: float, file: Path) -> None:
    """Figure 2: what each scheme changes against the first (fp32), in average accuracy and in bits per byte.

    The schemes stand along the x axis; in each, a marker for every model, the smallest to the left. Differences of accuracy
    are paired, document by document, with their standard error. guess: average accuracy of guessing, per cent. PNG or SVG.
    Raises DataError as `check_plot` does.
    """
    check_plot(file)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6 + 0.25 * len(models)), layout="constrained")
    accuracy, text = figure.subplots(1, 2)
    models = sorted(models, key=lambda model: model.parameters)
    baseline, *schemes = models[0].table_1
    for i, model in enumerate(models):
        shift = (i + 0.5) / len(models) - 0.5
        x = np.arange(len(schemes)) + 0.6 * shift
        color = colormaps["viridis"](0.15 + 0.7 * (i + 0.5) / len(models))
        rows, bits = model.table_1, {scheme: row.bits_per_byte for scheme, row in model.text.items()}
        average = rows[baseline]["average"].value
        label = f"{model.model}; under {baseline} {average:.1f} % are right, {bits[baseline]:.4f} bits per byte"
        style = {"marker": "osD^vP*X"[i % 8], "ms": 5, "ls": "", "color": color, "label": label}
        differences = [paired_difference(rows[scheme], rows[baseline]) for scheme in schemes]
        values, errors = [value for value, _ in differences], [error for _, error in differences]
        accuracy.errorbar(x, values, errors, capsize=3, lw=1, **style)
        text.plot(x, [bits[scheme] - bits[baseline] for scheme in schemes], **style)
    accuracy.set(title=f"average accuracy (guessing: {guess:.1f} %)", ylabel=f"points over {baseline}, ± paired standard error")
    text.set(
        title="bits per byte of the text (fewer is better)", ylabel=f"bits per byte over {baseline} (linear within ±0.001)"
    )
    text.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
    text.yaxis.set_major_formatter("{x:g}")
    for axes in (accuracy, text):
        axes.axhline(0, color="0.5", lw=1, zorder=0)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_xticks(
            range(len(schemes)), [Path(scheme).name for scheme in schemes], rotation=40, ha="right", rotation_mode="anchor"
        )
        axes.set_xlim(-0.5, max(1, len(schemes)) - 0.5)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    write_file(file, lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=110))
