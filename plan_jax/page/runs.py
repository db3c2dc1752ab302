"""The page that compares runs: their curves, metrics with differences, and the same phrases.

The first run is the reference. The others are compared with it example by example where both have
stored the scores of the same examples, measured with the same options: the interval of a difference
is that of a paired bootstrap.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from plan_jax.logger import read_rows
from plan_jax.metrics import Catalogue, Entry, entries, is_number
from plan_jax.metrics.intervals import bootstrap_difference
from plan_jax.page import charts, figures
from plan_jax.page.examples import ScoreTable, StoredExamples, load_examples
from plan_jax.page.tables import (
    Cell,
    Note,
    Table,
    format_baselines,
    format_interval,
    format_number,
)
from plan_jax.types import PhraseExample, UserError

MAX_RUNS = len(charts.LINE_COLOURS)
MAX_PANELS = 12
MAX_PHRASES = 12
# Grey levels by which thumbnails of one film may differ at two sizes of the model's input.
THUMBNAIL_TOLERANCE = 8
UNPAIRED_OPTIONS = ("bootstrap_samples", "num_examples")  # the scores do not depend on them
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class StoredRun:
    """The content of the folder of a run or of an evaluation: config, metrics, curves, examples.

    `metrics` are empty if the run has not been evaluated.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    examples: StoredExamples = field(default_factory=StoredExamples)

    @property
    def data(self) -> str:
        """Returns the dataset and the split it was evaluated on; "" if that is not known."""
        return self.examples.data

    def scores_of(self, task: str) -> dict[str, ScoreTable]:
        """Returns the scores of single examples of a task, by key of the metric."""
        scores = self.examples.scores.items()
        return {key: table for key, table in scores if key.startswith(f"{task}/")}


class PhraseComparison(NamedTuple):
    """A phrase in its film, and the pictures and captions of each run's map."""

    phrase: str
    pictures: list[UInt8[np.ndarray, "V U 3"]]
    captions: list[str]


def read_runs(folders: Sequence[str | Path]) -> list[StoredRun]:
    """Returns the runs in some folders, each with the shortest label that tells it from the others.

    Raises:
      UserError: there are too many or too few, one is named twice, or is no run.
    """
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UserError(f"{len(folders)} runs cannot be compared; pass 2 to {MAX_RUNS} folders")
    paths = [Path(folder) for folder in folders]
    places = [path.absolute() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is named twice; pass each run once")
    return [
        _read_run(path, label) for path, label in zip(paths, shorten_labels(places), strict=True)
    ]


def shorten_labels(paths: Sequence[Path]) -> list[str]:
    """Returns a label for each path: its last parts, as few as tell it from the others.

    >>> shorten_labels([Path("/runs/plan/eval/test"), Path("/runs/mgca/eval/test")])
    ['plan/eval/test', 'mgca/eval/test']
    """
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _read_run(folder: Path, label: str) -> StoredRun:
    if not (folder / "metrics.json").exists() and not (folder / "config.json").exists():
        what = "is not a run" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; pass a folder that training or --mode eval has written")
    # An evaluation is in runs/NAME/eval/SPLIT; curves and config are those of the run.
    parents = folder.absolute().parents
    is_evaluation = len(parents) > 1 and parents[0].name == "eval"
    run = parents[1] if is_evaluation and not (folder / "config.json").exists() else folder
    metrics = _read_json(folder / "metrics.json")
    return StoredRun(
        label,
        folder,
        _read_json(run / "config.json"),
        # JSON has no NaN: what is undefined is null.
        {key: math.nan if value is None else value for key, value in metrics.items()},
        read_rows(run / "metrics.jsonl"),
        load_examples(folder),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object, {} if there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UserError(f"{path} cannot be read ({reason}); leave its run out") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; leave its run out")
    return content


def list_remarks(runs: Sequence[StoredRun]) -> list[str]:
    """Returns what a reader has to know before the values: what is missing, what differs."""
    remarks = [
        f"{run.label} has not been evaluated, so it has curves only."
        for run in runs
        if not run.metrics
    ]
    evaluated = [run for run in runs if run.metrics]
    places = {run.data for run in evaluated if run.data}
    if len(places) > 1:
        parts = "; ".join(f"{run.label}: {run.data or 'unknown'}" for run in evaluated)
        remarks.append(
            f"These runs were evaluated on different data ({parts}). Their values cannot be "
            "compared, and no differences are shown between different data."
        )
    unknown = [run.label for run in evaluated if not run.data]
    if unknown:
        remarks.append(
            f"It is not stored on which data {', '.join(unknown)} "
            f"{'was' if len(unknown) == 1 else 'were'} evaluated; a difference means something on "
            "the same data only."
        )
    remarks += [
        f"The examples.npz of {run.label} belongs to other metrics than its metrics.json, so it is "
        "left out and differences have no interval; plan-jax --mode eval --checkpoint RUN writes "
        "both."
        for run in runs
        if run.examples.is_stale
    ]
    for run in runs[1:]:
        for task in run.examples.options:
            if other := _find_other_options(runs[0], run, task):
                parts = ", ".join(f"{name} {a} and {b}" for name, (a, b) in other.items())
                remarks.append(
                    f"{runs[0].label} and {run.label} were measured by {task} with different "
                    f"options ({parts}), so their examples are not paired: differences have no "
                    "interval."
                )
    without = [run.label for run in evaluated if not (run.examples.scores or run.examples.is_stale)]
    if without:
        verb = "has" if len(without) == 1 else "have"
        remarks.append(
            f"{', '.join(without)} {verb} no scores of single examples, so differences have no "
            "interval; plan-jax --mode eval --checkpoint RUN writes them."
        )
    return remarks


def _find_other_options(first: StoredRun, second: StoredRun, task: str) -> dict[str, tuple]:
    """Returns the two values of each option of a task in which runs that measured it differ."""
    options, own = (run.examples.options.get(task, {}) for run in (first, second))
    return {
        name: (options.get(name), own.get(name))
        for name in {**options, **own}
        if name not in UNPAIRED_OPTIONS and options and own and options.get(name) != own.get(name)
    }


def run_table(runs: Sequence[StoredRun]) -> Table:
    """Returns a table of what tells the runs apart: one row for each run."""
    rows = []
    for run in runs:
        data = run.config.get("data")
        trained_on = data.get("name", "") if isinstance(data, Mapping) else ""
        values = [run.label, run.config.get("method", ""), trained_on, run.data or "–"]
        numbers = [run.config.get("seed", "–"), run.metrics.get("steps", run.config.get("steps"))]
        numbers += [run.metrics.get("images_per_s")]
        cells = [Cell(str(value)) for value in values]
        cells += [Cell(format_number(x, 0) if is_number(x) else "–") for x in numbers]
        rows.append((*cells, Cell(str(run.metrics.get("params_sha256", ""))[:12] or "–")))
    columns = ("run", "method", "trained on", "evaluated on", "seed", "steps", "images/s")
    return Table("", (*columns, "SHA-256 of parameters"), tuple(rows), num_labels=4)


def metric_tables(
    runs: Sequence[StoredRun], catalogue: Catalogue, titles: Mapping[str, str]
) -> list[tuple[str, Table]]:
    """Returns the headline metrics of all tasks in one table, then all metrics of each task.

    A row is a metric: its value in each run, and how far each other run is from the first. Metrics
    of groups, as of a finding, are left out.
    """
    measured = [{entry.key: entry for entry in entries(catalogue, run.metrics)} for run in runs]
    keys = list(dict.fromkeys(key for entries_ in measured for key in entries_))
    kinds = {key: next(e[key] for e in measured if key in e) for key in keys}
    headline_keys = [key for key in keys if kinds[key].metric.headline]
    tables = []
    if headline_keys:
        rows = _metric_rows(runs, measured, headline_keys, titles)
        tables.append(("Headline metrics", rows))
    for task in catalogue:
        further = [
            key
            for key in keys
            if kinds[key].task == task and not kinds[key].group and key not in headline_keys
        ]
        if further:
            rows = _metric_rows(runs, measured, further, {})
            tables.append((f"{titles.get(task, task)}: further metrics", rows))
    return tables


def _metric_rows(
    runs: Sequence[StoredRun],
    measured: Sequence[Mapping[str, Entry]],
    keys: Sequence[str],
    titles: Mapping[str, str],
) -> Table:
    reference = runs[0]
    rows = []
    for key in keys:
        found = [entry for entries_ in measured if (entry := entries_.get(key))]
        first = found[0]
        task = titles.get(first.task, "")
        label = f"{task}: {first.metric.label}" if task else first.metric.label
        cells = [Cell(label, notes=(Note(first.metric.meaning, "meaning"),) if titles else ())]
        for entries_ in measured:
            entry = entries_.get(key)
            if entry is None:
                cells.append(Cell("–"))
                continue
            interval = format_interval(entry) or entry.reason()
            notes = (Note(interval, "muted"),) if interval else ()
            cells.append(Cell(format_number(entry.value, entry.metric.digits), notes=notes))
        for run, entries_ in zip(runs[1:], measured[1:], strict=True):
            cells.append(_difference_cell(reference, run, measured[0].get(key), entries_.get(key)))
        if titles:
            baselines = format_baselines(first).split("; ")
            cells.append(Cell("", notes=tuple(Note(text, "muted") for text in baselines)))
        rows.append(tuple(cells))
    labels = [run.label for run in runs]
    differences = [f"{label} {_MINUS} {labels[0]}" for label in labels[1:]]
    columns = ("metric", *labels, *differences, *["null baselines"] * bool(titles))
    return Table("", columns, tuple(rows))


def _difference_cell(
    reference: StoredRun, run: StoredRun, first: Entry | None, second: Entry | None
) -> Cell:
    """Returns how far a run is from the reference, with the interval of the difference."""
    if first is None or second is None or math.isnan(first.value) or math.isnan(second.value):
        return Cell("–")
    # Runs of earlier versions have not stored it.
    if reference.data and run.data and reference.data != run.data:
        return Cell("–", notes=(Note("different data", "muted"),))
    difference = second.value - first.value
    text = f"{difference:+.{second.metric.digits}f}".replace("-", _MINUS)
    if _find_other_options(reference, run, first.task):
        return Cell(text, notes=(Note("other options: no interval", "muted"),))
    scores, own_scores = (source.scores_of(first.task) for source in (reference, run))
    # Also where a metric has no such scores itself: the data may have one name and other images.
    shared = [key for key in scores if key in own_scores]
    if not all(np.array_equal(scores[key].digests, own_scores[key].digests) for key in shared):
        return Cell(text, notes=(Note("other examples: no interval", "muted"),))
    if first.key not in shared:
        return Cell(text)
    stored, own = scores[first.key], own_scores[first.key]
    low, high = bootstrap_difference(stored.table, own.table, stored.statistic)
    if math.isnan(low) or math.isnan(high):
        return Cell(text)
    interval = f"{low:+.2g} to {high:+.2g}".replace("-", _MINUS)
    if low <= 0 <= high:
        return Cell(text, notes=(Note(interval, "muted"), Note("not distinguishable", "muted")))
    is_better = (low > 0) == second.metric.higher_is_better
    verdict, css = ("better", "right") if is_better else ("worse", "wrong")
    return Cell(text, css, (Note(interval, "muted"), Note(verdict, css)))


def curve_chart(runs: Sequence[StoredRun], catalogue: Catalogue, titles: Mapping[str, str]) -> str:
    """Returns the curves of all runs over their steps as an SVG; "" if there are none.

    A panel shows one key of the history, with a line for each run that has it.
    """
    rows: list[dict[str, Any]] = []
    lines: dict[str, dict[str, str]] = {}
    panel_titles: dict[str, str] = {}
    for i, run in enumerate(runs):
        rows += [
            {"step": row["step"]} | {f"{i} {key}": x for key, x in row.items() if key != "step"}
            for row in run.history
        ]
        for panel in charts.training_panels(run.history, run.metrics, catalogue, titles):
            for key in panel.lines.values():
                lines.setdefault(key, {})[run.label] = f"{i} {key}"
                title = key if len(panel.lines) > 1 else panel.title
                panel_titles.setdefault(key, title)
    if not lines:
        return ""
    panels = [charts.Panel(panel_titles[key], lines[key]) for key in lines][:MAX_PANELS]
    return charts.training_chart(rows, panels)[0]


def compare_phrases(runs: Sequence[StoredRun]) -> list[PhraseComparison]:
    """Returns the phrases whose maps at least two runs have stored, with the map of each run.

    Maps of different methods have different units, so each has a colour scale of its own.
    """
    examples: dict[str, list[tuple[StoredRun, PhraseExample]]] = {}
    for run in runs:
        for example in run.examples.phrases:
            group = examples.setdefault(example.name, [])
            # One run may have the same words of two findings in a film.
            is_new = not group or group[-1][0] is not run
            if is_new and (not group or _is_same_film(group[0][1].image, example.image)):
                group.append((run, example))
    groups = [group for group in examples.values() if len(group) > 1]
    # Those that most runs have come first; then the order of the first run.
    groups.sort(key=len, reverse=True)
    comparisons = []
    for group in groups[:MAX_PHRASES]:
        first = group[0][1]
        pictures = [figures.radiograph(first.image, first.truth)]
        captions = ["the film, with the truth"]
        for run, example in group:
            heat_map = example.heat_maps[-1]
            pictures.append(figures.overlay_heat_map(example.image, heat_map, example.truth))
            captions.append(f"{run.label}: CNR {format_number(example.cnr)}")
        comparisons.append(PhraseComparison(first.phrase, pictures, captions))
    return comparisons


def _is_same_film(first: UInt8[np.ndarray, "Y X 1"], second: UInt8[np.ndarray, "V U 1"]) -> bool:
    """Returns whether two images show one film, which models may see at different sizes."""
    thumbnails = [
        np.asarray(Image.fromarray(image[..., 0]).resize((8, 8), Image.Resampling.BOX), float)
        for image in (first, second)
    ]
    return float(abs(thumbnails[0] - thumbnails[1]).mean()) <= THUMBNAIL_TOLERANCE
