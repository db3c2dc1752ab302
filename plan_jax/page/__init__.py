"""The page of a run: one HTML file that needs nothing else, and its pictures as PNG files.

Jinja2 escapes everything that comes from data. The page runs no script, and its content security
policy lets it load no other document. Metrics are laid out by the catalogue that the caller passes,
so a new metric or task appears without a change here.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from jaxtyping import UInt8
from numpy import ndarray

from plan_jax.logger import write_atomically
from plan_jax.metrics import Catalogue, is_number, slug
from plan_jax.page import charts, figures
from plan_jax.page.comparison import Comparison, compare
from plan_jax.page.examples import save_examples
from plan_jax.page.runs import (
    StoredRun,
    compare_phrases,
    curve_chart,
    list_remarks,
    metric_tables,
    run_table,
)
from plan_jax.page.tables import (
    Cell,
    Table,
    format_number,
    headline_cards,
    markdown,
    summary_table,
    task_tables,
)
from plan_jax.types import (
    BoxExample,
    Curve,
    MaskExample,
    PhraseExample,
    ReportExample,
    RetrievalExample,
)

__all__ = [
    "Comparison",
    "compare",
    "markdown",
    "render_comparison",
    "render_runs",
    "save_examples",
    "write_page",
]


def write_page(
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    catalogue: Catalogue,
    titles: Mapping[str, str],
    history: Sequence[Mapping[str, Any]] = (),
    rows: Sequence[Any] = (),
) -> Path:
    """Writes `report.html` and `figures/*.png` into the folder of a run.

    A part of the page without values is left out.

    Args:
      folder: the folder of the run; it is created if it is missing.
      config: the config of the run, as nested mappings.
      metrics: flat final values, as `grounding/cnr_signed`.
      catalogue: the catalogue of metrics, in the order of the tasks on the page.
      titles: the name of each task on the page.
      history: the rows logged during training, each with its `step`.
      rows: examples of any type that `types.py` declares for the page.

    Returns:
      The path of the page.
    """
    folder = Path(folder)

    def select(kind: type) -> list[Any]:
        return [row for row in rows if isinstance(row, kind)]

    figure_folder = folder / "figures"
    figure_folder.mkdir(parents=True, exist_ok=True)
    _write_phrase_pictures(figure_folder, select(PhraseExample))
    training_svg = classifier_svg = ""
    if panels := charts.training_panels(history, metrics, catalogue, titles):
        training_svg, png = charts.training_chart(history, panels)
        write_atomically(figure_folder / "curves.png", png)
    if curves := select(Curve):
        classifier_svg, _ = charts.classifier_chart(curves)

    masks: dict[str, list[MaskExample]] = {}
    for example in select(MaskExample):
        masks.setdefault(example.name, []).append(example)

    # Pairs and not mappings, since two tasks may have the same title.
    sections = [
        (titles.get(task, task), task_tables(catalogue, task, metrics)) for task in catalogue
    ]
    durations = [(titles.get(task, task), metrics.get(f"{task}/seconds")) for task in catalogue]
    template = _environment().get_template("template.html")
    html = template.render(
        title=str(config.get("method", "run")),
        run_info=_run_info(config, metrics),
        cards=headline_cards(catalogue, titles, metrics),
        summary=summary_table(catalogue, titles, metrics),
        durations=[(name, seconds) for name, seconds in durations if is_number(seconds)],
        task_sections=[(name, tables) for name, tables in sections if tables],
        phrases=select(PhraseExample),
        retrieved=select(RetrievalExample),
        masks=masks,
        boxes=select(BoxExample),
        reports=select(ReportExample),
        training_svg=training_svg,
        classifier_svg=classifier_svg,
        config_json=_to_json(config),
        metrics_json=_to_json(metrics),
    )
    path = folder / "report.html"
    write_atomically(path, html)
    return path


def render_comparison(
    title: str,
    description: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    links: Sequence[str] = (),
) -> str:
    """Returns a page with one table of runs, whose first column is text, and links to their pages.

    Args:
      title: the title of the page.
      description: a sentence above the table.
      columns: the heads of the columns.
      rows: the texts of the cells.
      links: paths relative to the page.
    """
    cells = tuple(tuple(Cell(text) for text in row) for row in rows)
    comparison = Table("", tuple(columns), cells)
    template = _environment().get_template("comparison.html")
    return template.render(title=title, description=description, comparison=comparison, links=links)


def render_runs(
    runs: Sequence[StoredRun],
    catalogue: Catalogue,
    titles: Mapping[str, str],
    folder: Path | None = None,
) -> str:
    """Returns the page that compares runs.

    Args:
      runs: the runs, the reference first.
      catalogue: the catalogue of metrics, in the order of the tasks on the page.
      titles: the name of each task on the page.
      folder: where the page will be, for links to the pages of the runs; None has no links.
    """
    pages = [(run.label, run.folder / "report.html") for run in runs]
    links = [
        # Quoted: a folder may be named `a#b`, or begin like the scheme of an address.
        (label, quote(Path(os.path.relpath(page.absolute(), folder)).as_posix()))
        for label, page in pages
        if folder is not None and page.exists()
    ]
    return (
        _environment()
        .get_template("runs.html")
        .render(
            labels=[run.label for run in runs],
            remarks=list_remarks(runs),
            runs=run_table(runs),
            links=links,
            tables=metric_tables(runs, catalogue, titles),
            phrases=compare_phrases(runs),
            curves=curve_chart(runs, catalogue, titles),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    """Returns the templates of this folder, which escape every value."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # A misspelt variable raises an error instead of leaving a part of the page empty.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "slug": slug, "data_uri": _to_data_uri}
    environment.globals["figures"] = figures
    return environment


def _write_phrase_pictures(folder: Path, examples: Sequence[PhraseExample]) -> None:
    """Writes one PNG for each phrase, instead of those of an earlier evaluation."""
    for path in folder.glob("phrase_*.png"):
        path.unlink()
    for i, example in enumerate(examples):
        # Without the phrase: names of files end up in logs and errors.
        name = slug(f"phrase {i:02d} {example.kind}")
        picture = figures.concatenate(figures.phrase_pictures(example))
        write_atomically(folder / f"{name}.png", figures.encode_picture(picture))


def _run_info(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the head of the page says about the run, without unknown values."""
    data, speed = config.get("data", {}), metrics.get("images_per_s")
    values = {
        "data": data.get("name") if isinstance(data, Mapping) else data,
        "steps": config.get("steps"),
        "batch": config.get("batch"),
        "seed": config.get("seed"),
        "training took": _format_duration(metrics.get("wall_s")),
        "evaluation took": _format_duration(metrics.get("evaluated_s")),
        "images/s": format_number(speed, 0) if is_number(speed) else "",
        "SHA-256 of parameters": str(metrics.get("params_sha256", ""))[:16],
    }
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def _format_duration(seconds: Any) -> str:
    if not is_number(seconds):
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, default=str, ensure_ascii=False)


def _to_data_uri(picture: UInt8[ndarray, "V U 3"]) -> str:
    """Returns a picture as an address that contains the JPEG itself."""
    content = base64.b64encode(figures.encode_picture(picture, "JPEG")).decode()
    return f"data:image/jpeg;base64,{content}"
