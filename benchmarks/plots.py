"""Bars of the snapshot comparison as PNG. Needs matplotlib (`pip install recess[bench]`); without it there are no plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import quantile

PANELS = (("standstill", "standstill, ms", 1e3), ("durable", "durable, ms", 1e3), ("stored", "stored, MB", 1e-6),
          ("restore", "restore to the guest's answer, ms", 1e3))  # fmt: skip


def plot_snapshots(sides: Mapping[str, Mapping[str, Sequence[float]]], target: Path) -> str:
    """Write one panel for each metric, p50 as a bar and p95 as its whisker; return what became of it in a line."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no plots: matplotlib is not installed (pip install 'recess[bench]')"
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6), constrained_layout=True)
    for axis, (key, title, factor) in zip(axes.flat, PANELS, strict=True):
        shown = {name: [s * factor for s in samples[key]] for name, samples in sides.items() if samples.get(key)}
        names = list(shown)
        p50 = [quantile(shown[name], 0.5) for name in names]
        over = [max(0.0, quantile(shown[name], 0.95) - low) for name, low in zip(names, p50, strict=True)]
        bars = axis.barh(names, p50, xerr=[[0.0] * len(names), over], color="#5b7fa6", ecolor="#333333", capsize=3)
        axis.bar_label(bars, fmt="%.3g", padding=4)
        axis.set_xlim(0, 1.25 * max(low + more for low, more in zip(p50, over, strict=True)))
        axis.set_title(title)
        axis.invert_yaxis()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return f"plots: {target}"
