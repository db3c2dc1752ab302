"""A table that compares runs by the headline metrics of the catalogue."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from plan_jax.metrics import Catalogue, headlines, is_number

RUN_METRICS = {"images_per_s": "images/s"}  # of a run, not of a task: not in the catalogue

Metrics = Mapping[str, Any]


class Comparison(NamedTuple):
    """A table of texts; a notebook shows it as such, and `str` is Markdown."""

    columns: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        """Returns the table in Markdown."""
        return to_markdown(self.columns, self.rows)

    def _repr_markdown_(self) -> str:
        """Returns the table in Markdown, by a convention of IPython."""
        return str(self)


def compare(
    runs: Mapping[str, Sequence[Metrics]], catalogue: Catalogue, name: str = "run"
) -> Comparison:
    """Returns a row for each group of runs, and below them one for each null baseline.

    Baselines are those of one run: they depend on the data and not on the model. The columns are
    the headline metrics that the runs have.

    Args:
      runs: the metrics of one or more runs, which differ in their seed only, by their label.
      catalogue: the catalogue of metrics.
      name: head of the column of labels.
    """
    # JSON has no NaN: what is undefined is null in `metrics.json`.
    runs = {
        label: [{key: x for key, x in metrics.items() if x is not None} for metrics in seeds]
        for label, seeds in runs.items()
    }
    labels = column_labels(runs, catalogue)
    rows = table_rows(runs, catalogue, list(labels))
    return Comparison([name, "seeds", *labels.values()], rows)


def column_labels(runs: Mapping[str, Sequence[Metrics]], catalogue: Catalogue) -> dict[str, str]:
    """Returns the compared metrics: their keys in the catalogue's order, and their labels."""
    merged = {
        key: value
        for metrics_of_seeds in runs.values()
        for metrics in metrics_of_seeds
        for key, value in metrics.items()
    }
    labels = {entry.key: entry.metric.label for entry in headlines(catalogue, merged)}
    return labels | {key: label for key, label in RUN_METRICS.items() if key in merged}


def table_rows(
    runs: Mapping[str, Sequence[Metrics]], catalogue: Catalogue, keys: Sequence[str]
) -> list[list[str]]:
    """Returns the rows of `compare`, with a cell for each of some metrics."""
    rows = []
    for label, metrics_of_seeds in runs.items():
        cells = [label, str(len(metrics_of_seeds))]
        for key in keys:
            values = [m[key] for m in metrics_of_seeds if is_number(m.get(key))]
            cells.append(format_seeds(values))
        rows.append(cells)
    if not rows:
        return rows
    *_, (last_run, *_) = runs.values()
    baselines = {entry.key: entry.baselines for entry in headlines(catalogue, last_run)}
    for name in dict.fromkeys(name for nulls in baselines.values() for name in nulls):
        values = [baselines.get(key, {}).get(name) for key in keys]
        cells = ["" if value is None else format_significant(value, 3) for value in values]
        rows.append([name, "", *cells])
    return rows


def format_significant(value: float, digits: int) -> str:
    """Returns a number with this many significant digits, trailing zeros included.

    >>> format_significant(2.0, 3), format_significant(101.7, 3), format_significant(0.054, 2)
    ('2.00', '102', '0.054')
    """
    return f"{value:#.{digits}g}".rstrip(".")


def format_seeds(values: Sequence[float]) -> str:
    """Returns mean and standard deviation over seeds; of one seed the value, of none nothing.

    >>> format_seeds([1.0, 2.0]), format_seeds([1.0]), format_seeds([])
    ('1.50 ± 0.71', '1.00', '')
    """
    if not values:
        return ""
    mean = format_significant(float(np.mean(values)), 3)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format_significant(float(np.std(values, ddof=1)), 2)}"


def to_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as a Markdown table.

    >>> print(to_markdown(["variant", "CNR"], [["PLAN", "2.1"]]), end="")
    | variant | CNR |
    | --- | --- |
    | PLAN | 2.1 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
