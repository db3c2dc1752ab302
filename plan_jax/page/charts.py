"""Charts of the page: curves of training, ROC and calibration curves, as SVG and as PNG.

An SVG stands inside the page and takes its ink from the text around it, so that it fits light and
dark pages; it names no other document.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plan_jax.metrics import Catalogue, entries, is_number
from plan_jax.page.figures import import_matplotlib
from plan_jax.types import Curve

INK = "#010203"  # near black in a PNG; in an SVG it becomes the text colour of the page
LINE_COLOURS = ("#c2410c", "#0e7490", "#7c3aed", "#4d7c0f", "#be185d", "#64748b")
LINE_STYLES = ("-", "--", "-.")
LEVEL_STYLES = (":", "--", "-.")
MAX_LINES = 6  # lines in the panel of losses, and panels of further keys
BOOKKEEPING = ("step", "time", "wall_s", "epoch")
AXIS_LABELS = {
    "roc": ("false positive rate", "true positive rate"),
    "calibration": ("predicted probability", "share of positives"),
}
CURVE_TITLES = {"roc": "ROC", "calibration": "Calibration"}


@dataclass(frozen=True)
class Panel:
    """A pair of axes: `lines` maps labels to keys of the history, `levels` labels to constants."""

    title: str
    lines: Mapping[str, str]
    levels: Mapping[str, float] = field(default_factory=dict)


def training_panels(
    history: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    catalogue: Catalogue,
    titles: Mapping[str, str],
) -> list[Panel]:
    """Returns the panels of a training history: losses, headline metrics, then other keys.

    A headline metric is drawn with its strongest baseline, taken from the final `metrics`. Keys
    with fewer than two values are not drawn.
    """
    counts: dict[str, int] = {}
    for row in history:
        for key, value in row.items():
            counts[key] = counts.get(key, 0) + is_number(value)
    keys = [key for key, count in counts.items() if count > 1 and key not in BOOKKEEPING]
    losses = [key for key in keys if key.split("/")[-1].startswith("loss") or key.endswith("_loss")]
    panels = [Panel("Loss", {key: key for key in losses[:MAX_LINES]})] if losses else []

    final = {entry.key: entry for entry in entries(catalogue, metrics)}
    for task, task_metrics in catalogue.items():
        for pattern, metric in task_metrics.items():
            name = f"{task}/{pattern}"
            # A validation during training may log its metrics under a prefix, as `val/`.
            lines = {key: key for key in keys if key == name or key.endswith(f"/{name}")}
            if metric.headline and lines:
                baseline = final[name].strongest_baseline() if name in final else None
                levels = dict([baseline]) if baseline else {}
                panels.append(Panel(f"{titles.get(task, task)}: {metric.label}", lines, levels))

    # Of a task's metrics only headlines are drawn: there may be hundreds.
    further = [
        key
        for key in keys
        if key not in losses and key.count("/") < 2 and not set(key.split("/")) & set(catalogue)
    ]
    return panels + [Panel(key, {key: key}) for key in further[:MAX_LINES]]


def training_chart(
    history: Sequence[Mapping[str, Any]], panels: Sequence[Panel], num_columns: int = 3
) -> tuple[str, bytes]:
    """Returns panels over the steps of a history, as inline SVG and as the bytes of a PNG.

    Each row of the history holds its `step` and any of the keys.
    """
    num_rows = -(-len(panels) // num_columns)

    def draw_panels(figure: Any) -> None:
        for i, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(num_rows, num_columns, i + 1), history, panel)

    return render_figure((3.6 * num_columns, 2.5 * num_rows), draw_panels)


def classifier_chart(curves: Sequence[Curve]) -> tuple[str, bytes]:
    """Returns ROC and calibration curves next to each other, as inline SVG and as a PNG's bytes."""
    kinds = [kind for kind in AXIS_LABELS if any(curve.kind == kind for curve in curves)]

    def draw_kinds(figure: Any) -> None:
        for i, kind in enumerate(kinds):
            axes = figure.add_subplot(1, len(kinds), i + 1)
            _draw_curves(axes, kind, [curve for curve in curves if curve.kind == kind])

    return render_figure((4.4 * len(kinds), 4.0), draw_kinds)


def render_figure(size: tuple[float, float], draw: Callable[[Any], None]) -> tuple[str, bytes]:
    """Returns a matplotlib figure of `size` inches (width, height) as inline SVG and as PNG bytes.

    `draw` is called with the empty figure.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    # Text stays text, ids do not vary between runs, and a `$` in a name does not start a formula.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "plan",
        "text.parse_math": False,
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    svg_stream, png_stream = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(png_stream, format="png", dpi=110)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg_stream, format="svg", transparent=True, metadata=no_metadata)
    svg = svg_stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Inside HTML the namespaces are implied; as addresses they would look like other documents.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"|<metadata>.*?</metadata>', "", svg, flags=re.DOTALL)
    return svg, png_stream.getvalue()


def _draw_panel(axes: Any, history: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    for i, ((label, key), colour) in enumerate(
        zip(panel.lines.items(), LINE_COLOURS, strict=False)
    ):
        points = [(row["step"], row[key]) for row in history if key in row]
        marker = "o" if len(points) < 30 else ""
        steps, values = np.array(points).reshape(-1, 2).T
        # Not by colour alone.
        style = LINE_STYLES[i % len(LINE_STYLES)]
        # matplotlib leaves a label that begins with an underscore out of the legend.
        label = f" {label}" if label.startswith("_") else label
        axes.plot(steps, values, color=colour, ls=style, label=label, lw=1.4, marker=marker, ms=3)
    for (label, level), style in zip(panel.levels.items(), LEVEL_STYLES, strict=False):
        axes.axhline(level, color=INK, lw=0.9, ls=style, alpha=0.6, label=label)
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    if len(panel.lines) + len(panel.levels) > 1:
        axes.legend(fontsize=7, frameon=False)


def _draw_curves(axes: Any, kind: str, curves: Sequence[Curve]) -> None:
    # The diagonal: chance of a ROC curve, perfect calibration of the other kind.
    axes.plot([0, 1], [0, 1], color=INK, lw=0.9, ls=":", alpha=0.6)
    marker = "o" if kind == "calibration" else ""
    for i, curve in enumerate(curves):
        cycle, index = divmod(i, len(LINE_COLOURS))
        colour, style = LINE_COLOURS[index], LINE_STYLES[cycle % len(LINE_STYLES)]
        axes.plot(
            curve.x, curve.y, color=colour, ls=style, lw=1.4, marker=marker, ms=3, label=curve.name
        )
    xlabel, ylabel = AXIS_LABELS[kind]
    # A margin, so that a curve along the border of the square can be seen.
    limits = (-0.01, 1.01)
    axes.set(xlim=limits, ylim=limits, xlabel=xlabel, ylabel=ylabel, aspect="equal")
    axes.set_title(CURVE_TITLES[kind], fontsize=10, loc="left", fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
