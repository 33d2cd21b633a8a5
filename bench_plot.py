"""Pictures of a record of bench.py: speedups, shares of the hardware's limits, the roofline. Needs matplotlib.

The same record gives the same bytes. Each picture carries the digest of its record.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_report as report
from bench_report import DIRECTIONS, LOSS, PICTURES

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter
except ImportError as error:
    raise RuntimeError(
        f"pictures need matplotlib, which cannot be imported ({error}): pip install matplotlib"
    ) from error

# Of the palette of Okabe and Ito, which the colour-blind can tell apart.
DTYPE_COLOURS = {"float32": "#0072B2", "float16": "#D55E00", "bfloat16": "#009E73"}
DIRECTION_COLOURS = {"forward": "#0072B2", "grad_input": "#E69F00", "grad_weight": "#CC79A7"}
LAYOUT_MARKERS = {"nchw": "o", "nhwc": "D"}
LAYOUT_NAMES = {"nchw": "NCHW", "nhwc": "channels_last"}
STYLE = {"font.size": 8, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "svg.hashsalt": "bench"}
WIDTH = 9.0  # inches; shown at the README's width


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draws every picture of a record into the folder; returns their paths."""
    if not report.rows_of(record["rows"]):
        raise RuntimeError("there is no row to draw: the record holds no measured case")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Description": f"record {report.digest(record)}"}
    paths, shown = [], {**record, "rows": report.rows_of(record["rows"])}
    for name, figure_of in zip(PICTURES, (speedup, share, roofline), strict=True):
        paths.append(report.picture_path(record, name, folder))
        with matplotlib.rc_context(STYLE):
            figure_of(shown).savefig(paths[-1], metadata=metadata)
    return paths


def speedup(record: dict[str, Any]) -> Figure:
    figure, panels = _by_case(record, "speedup", lambda row: row["pytorch_ms"] / row["ours_ms"])
    for direction, axes in panels.items():
        values = report.speedups(record["rows"], direction)
        slower = sum(value < LOSS for value in values)
        axes.set(xscale="log", xlabel=f"times PyTorch's speed; {slower} of {len(values)} below 1x")
        axes.axvline(LOSS, color="black", linewidth=1.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    left = min(0.8, 0.9 * min(report.speedups(record["rows"])))
    for axes in panels.values():
        axes.set_xlim(left=left)
        axes.axvspan(left, LOSS, color="0.92", zorder=0)
    return figure


def share(record: dict[str, Any]) -> Figure:
    figure, panels = _by_case(record, "share", lambda row: max(report.limits_ms(row, record)) / row["ours_ms"])
    for axes in panels.values():
        axes.set(xlabel="share of the limit")
        axes.set_xlim(left=0, right=max(1.05, axes.get_xlim()[1]))
        axes.axvline(1, color="black", linewidth=1.2)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def roofline(record: dict[str, Any]) -> Figure:
    rows = record["rows"]
    dtypes = [name for name in DTYPE_COLOURS if any(row["dtype"] == name for row in rows)]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        for direction, colour in DIRECTION_COLOURS.items():
            for layout, marker in LAYOUT_MARKERS.items():
                points = [
                    (row["flops"] / row["bytes"], row["flops"] / row["ours_ms"] / 1e9)
                    for row in rows
                    if (row["dtype"], row["direction"], row["layout"]) == (dtype, direction, layout)
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3.5)
        intensities = [row["flops"] / row["bytes"] for row in rows]
        bandwidth, peak = record["copy_tbps"], record["matmul_tflops"][dtype]
        corners = sorted([min(intensities) / 2, peak / bandwidth, max(*intensities, peak / bandwidth) * 2])
        axes.plot(corners, [min(bandwidth * x, peak) for x in corners], color="black", linewidth=1.2)
        axes.set(
            xscale="log", yscale="log", title=f"{dtype}: {bandwidth:.2f} TB/s, {peak:.0f} TFLOP/s", xlabel="FLOP a byte"
        )
    panels[0].set_ylabel("TFLOP/s")
    _legend(figure, record, "roofline", DIRECTION_COLOURS)
    return figure


def _by_case(
    record: dict[str, Any], name: str, value: Callable[[dict[str, Any]], float]
) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each direction, a line for each case, a point for each row."""
    rows = record["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    directions = [direction for direction in DIRECTIONS if any(row["direction"] == direction for row in rows)]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * len(cases)), layout="constrained")
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions, strict=True):
        for (dtype, colour), offset in zip(DTYPE_COLOURS.items(), (-0.25, 0, 0.25), strict=True):
            for layout, marker in LAYOUT_MARKERS.items():
                points = [
                    (value(row), cases.index(row["case"]) + offset)
                    for row in rows
                    if (row["dtype"], row["direction"], row["layout"]) == (dtype, direction, layout)
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3.5)
        axes.set(title=direction, yticks=range(len(cases)), yticklabels=cases, ylim=(len(cases) - 0.4, -0.6))
    _legend(figure, record, name, DTYPE_COLOURS)
    return figure, dict(zip(directions, panels, strict=True))


def _legend(figure: Figure, record: dict[str, Any], name: str, colours: dict[str, str]) -> None:
    figure.suptitle(f"{PICTURES[name]}\n{record['gpu']}, torch {record['torch']}, {record['date'][:10]}")
    axes = figure.axes[0]
    handles = [axes.plot([], [], "s", color=colour, label=label)[0] for label, colour in colours.items()]
    handles += [
        axes.plot([], [], marker, color="0.4", label=LAYOUT_NAMES[layout])[0]
        for layout, marker in LAYOUT_MARKERS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
