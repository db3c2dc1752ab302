"""Tables of the page: every metric of the catalogue beside its null baselines.

No metric or task is named here: labels, meanings, digits and baselines are the catalogue's.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from plan_jax.metrics import (
    Catalogue,
    Entry,
    entries,
    headlines,
    is_number,
    undefined_sentences,
)

CARDS_PER_TASK = 2
STRIP_WIDTH = 240
STRIP_MARGIN = 8  # space for the radius of a mark
BAR = r"\|"  # a bar inside a cell of a Markdown table


class Mark(NamedTuple):
    """A point on the strip of a value: its x coordinate, and its label."""

    x: float
    label: str
    is_model: bool = False


class Note(NamedTuple):
    """A remark below a number, with its CSS class."""

    text: str
    css: str = ""


class Cell(NamedTuple):
    """A table cell: text, its CSS classes, remarks below it, and marks of a strip."""

    text: str
    css: str = ""
    notes: tuple[Note, ...] = ()
    marks: tuple[Mark, ...] = ()


class Table(NamedTuple):
    """A table whose first `num_labels` columns hold text and the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_labels: int = 1


@dataclass(frozen=True)
class Card:
    """A headline metric in large type, with its interval, strip and verdict."""

    title: str
    value: str
    interval: str
    marks: tuple[Mark, ...]
    verdict: str
    meaning: str


def format_number(value: Any, digits: int | None = None) -> str:
    """Returns a number as text, by default with about three digits that count.

    >>> format_number(1.2345), format_number(0.01234), format_number(153.2), format_number(None)
    ('1.23', '0.012', '153', '–')
    """
    if not is_number(value):
        return "–"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 2 if abs(value) >= 0.1 or not value else 3
    return f"{value:.{digits}f}"


def format_interval(entry: Entry) -> str:
    """Returns the bootstrap interval of a metric as text, "" if it has none."""
    low, high = entry.interval
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{format_number(low)} to {format_number(high)}"


def verdict(entry: Entry) -> str:
    """Returns a sentence that names the nearest baseline on either side of a value.

    >>> from plan_jax.types import Metric
    >>> baselines = {"chance": 0.5, "lung prior": 0.6, "mean mask": 0.8}
    >>> verdict(Entry("", "", "", (), Metric("", ""), 0.7, baselines, (0.6, 0.8)))
    'Better than lung prior (0.60), not better than mean mask (0.80)'
    """
    if math.isnan(entry.value):
        return f"Undefined: {entry.reason()}" if entry.reason() else ""
    finite = {label: x for label, x in entry.baselines.items() if math.isfinite(x)}
    beaten = [label for label, x in finite.items() if entry.beats(x)]
    unbeaten = [label for label in finite if label not in beaten]
    parts = []
    for relation, labels in (("better than", beaten), ("not better than", unbeaten)):
        if labels:
            label = min(labels, key=lambda label: abs(finite[label] - entry.value))
            parts.append(f"{relation} {label} ({format_number(finite[label])})")
    sentence = ", ".join(parts)
    # Not `capitalize`, which would turn the rest into lower case.
    return sentence[:1].upper() + sentence[1:]


def strip_marks(value: float, baselines: Mapping[str, float]) -> tuple[Mark, ...]:
    """Returns the places of a value and its baselines on one axis; () if there is none to compare.

    The axis includes 0, so that a small difference between large values looks small.
    """
    finite = {label: x for label, x in baselines.items() if math.isfinite(x)}
    if not finite or not math.isfinite(value):
        return ()
    low, high = min(0.0, value, *finite.values()), max(value, *finite.values())
    # All values may be 0.
    scale = (STRIP_WIDTH - 2 * STRIP_MARGIN) / ((high - low) or 1)

    def place(label: str, x: float, is_model: bool = False) -> Mark:
        return Mark(
            round(STRIP_MARGIN + scale * (x - low), 1), f"{label} {format_number(x)}", is_model
        )

    # The model comes last: SVG paints later marks over earlier ones.
    return (*(place(label, x) for label, x in finite.items()), place("model", value, True))


def headline_cards(
    catalogue: Catalogue, titles: Mapping[str, str], metrics: Mapping[str, Any]
) -> list[Card]:
    """Returns a card for each of a task's first headline metrics."""
    cards = []
    for task in catalogue:
        measured = [entry for entry in headlines(catalogue, metrics) if entry.task == task]
        for entry in measured[:CARDS_PER_TASK]:
            cards.append(
                Card(
                    title=f"{titles.get(task, task)}: {entry.metric.label}",
                    value=format_number(entry.value, entry.metric.digits),
                    interval=format_interval(entry),
                    marks=strip_marks(entry.value, entry.baselines),
                    verdict=verdict(entry),
                    meaning=entry.metric.meaning,
                )
            )
    return cards


def summary_table(
    catalogue: Catalogue, titles: Mapping[str, str], metrics: Mapping[str, Any]
) -> Table | None:
    """Returns one table of the headline metrics of all tasks, or None for fewer than two tasks."""
    measured = headlines(catalogue, metrics)
    if len({entry.task for entry in measured}) < 2:
        return None
    rows, last_task = [], ""
    for entry in measured:
        # The name of a task stands only in its first row.
        task = titles.get(entry.task, entry.task) if entry.task != last_task else ""
        last_task = entry.task
        label, baselines = Cell(entry.metric.label), Cell(format_baselines(entry), "muted")
        rows.append((Cell(task), label, baselines, _value_cell(entry)))
    return Table("", ("task", "metric", "baselines", "model"), tuple(rows), num_labels=3)


def task_tables(catalogue: Catalogue, task: str, metrics: Mapping[str, Any]) -> list[Table]:
    """Returns all measured metrics of a task that the catalogue knows, as tables.

    The first table has one row for each metric without placeholders. Then comes a pivot table for
    each kind of group, as `{finding}` or `round{t}`: its rows are the values of the placeholders
    and its columns the metrics.
    """
    plain: list[Entry] = []
    grouped: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries({task: catalogue[task]}, metrics):
        names = tuple(_group_name(part) for part in entry.pattern.split("/") if "{" in part)
        (grouped.setdefault(names, []) if names else plain).append(entry)
    tables = [_metric_table(plain)] if plain else []
    return tables + [
        _pivot_table(names, members, catalogue[task]) for names, members in grouped.items()
    ]


def markdown(metrics: Mapping[str, Any], catalogue: Catalogue, titles: Mapping[str, str]) -> str:
    """Returns the headline metrics of all tasks as a Markdown table.

    >>> from plan_jax.types import Metric
    >>> catalogue = {"detection": {"map": Metric("mAP", "", baselines={"prior": "prior/map"},
    ...                                          headline=True)}}
    >>> values = {"detection/map": 0.5, "detection/prior/map": 0.25}
    >>> print(markdown(values, catalogue, {"detection": "Detection"}))
    | task | metric | model | 95 % interval | baselines |
    |---|---|---|---|---|
    | Detection | mAP | 0.500 |  | prior 0.250 |
    <BLANKLINE>
    """
    lines = ["| task | metric | model | 95 % interval | baselines |", "|---|---|---|---|---|"]
    for entry in headlines(catalogue, metrics):
        cells = (
            titles.get(entry.task, entry.task),
            entry.metric.label,
            format_number(entry.value, entry.metric.digits),
            format_interval(entry),
            format_baselines(entry),
        )
        # A bar in a label would begin a new cell.
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    undefined = [
        f"{titles.get(task, task)}: {sentence}."
        for task, sentence in undefined_sentences(catalogue, metrics)
    ]
    return "\n".join([*lines, *[""] * bool(undefined), *undefined]) + "\n"


def format_baselines(entry: Entry) -> str:
    """Returns the null baselines of a metric with their values as text."""
    digits = entry.metric.digits
    return "; ".join(f"{label} {format_number(x, digits)}" for label, x in entry.baselines.items())


def _value_cell(entry: Entry, notes: tuple[Note, ...] = ()) -> Cell:
    # A reason stands in place of the interval.
    interval = format_interval(entry) or entry.reason()
    notes = (Note(interval, "muted"), *notes) if interval else notes
    return Cell(format_number(entry.value, entry.metric.digits), "model", notes)


def _baseline_css(entry: Entry, baseline: float | None) -> str:
    """Returns the CSS class of a baseline: red if the model does not beat it."""
    if baseline is None or math.isnan(baseline) or math.isnan(entry.value):
        return ""
    return "muted" if entry.beats(baseline) else "unbeaten"


def _metric_table(measured: Sequence[Entry]) -> Table:
    """Returns a table of metrics: label and meaning, value, strip, then each baseline."""
    labels = tuple(dict.fromkeys(label for entry in measured for label in entry.baselines))
    rows = []
    for entry in measured:
        baselines = []
        for label in labels:
            baseline = entry.baselines.get(label)
            text = "" if baseline is None else format_number(baseline, entry.metric.digits)
            baselines.append(Cell(text, _baseline_css(entry, baseline)))
        rows.append(
            (
                Cell(entry.metric.label, notes=(Note(entry.metric.meaning, "meaning"),)),
                _value_cell(entry),
                Cell("", "strip-cell", marks=strip_marks(entry.value, entry.baselines)),
                *baselines,
            )
        )
    return Table("", ("metric", "model", "", *labels), tuple(rows))


def _pivot_table(
    names: tuple[str, ...], measured: Sequence[Entry], task_metrics: Mapping[str, Any]
) -> Table:
    """Returns a table with a row for each value of the placeholders and a column for each metric.

    Below a value stands its strongest baseline.
    """
    patterns = list(dict.fromkeys(entry.pattern for entry in measured))
    cells: dict[tuple[str, ...], dict[str, Cell]] = {}
    for entry in measured:
        strongest = entry.strongest_baseline()
        notes: tuple[Note, ...] = ()
        if strongest:
            text = f"{strongest[0]} {format_number(strongest[1], entry.metric.digits)}"
            notes = (Note(text, _baseline_css(entry, strongest[1])),)
        # A group may lack some of the metrics; their cells stay empty.
        cells.setdefault(entry.group, {})[entry.pattern] = _value_cell(entry, notes)
    rows = tuple(
        (
            *(Cell(value.replace("_", " ")) for value in group),
            *(row.get(pattern, Cell("")) for pattern in patterns),
        )
        for group, row in cells.items()
    )
    columns = (*names, *(_column_label(task_metrics[pattern].label) for pattern in patterns))
    return Table(f"By {' and '.join(names)}", columns, rows, num_labels=len(names))


def _group_name(segment: str) -> str:
    """Returns what the placeholder of a path segment stands for.

    >>> _group_name("{finding}"), _group_name("round{t}"), _group_name("i2t_p{k}")
    ('finding', 'round', 'k')
    """
    word = re.sub(r"{\w+}", "", segment)
    return word if word.isalpha() else re.findall(r"{(\w+)}", segment)[0]


def _column_label(label: str) -> str:
    """Returns the label of a metric without the parts that vary within a pivot table.

    >>> _column_label("AUROC, {share} % of labels"), _column_label("CNR of {finding}")
    ('AUROC', 'CNR of finding')
    """
    constant = [part for part in label.split(", ") if "{" not in part]
    return ", ".join(constant) or re.sub(r"[{}]", "", label)
