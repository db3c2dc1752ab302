"""The page of a run: one HTML file that needs nothing else, and the same pictures as PNGs.

All text that comes from data is escaped; the page runs no script and asks for no other document.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan_jax.metrics import slug
from plan_jax.page import downstream, figures
from plan_jax.page.downstream import markdown
from plan_jax.page.elements import (
    Html,
    document,
    folded,
    is_number,
    number,
    picture,
    section,
    strip,
    tag,
)
from plan_jax.page.figures import Panel
from plan_jax.page.tables import (
    GROUNDING,
    auroc_meaning,
    finding_table,
    interval,
    metric_tables,
    nulls_of,
    recall_meaning,
    rounds_table,
    verdict,
)
from plan_jax.types import (
    BoxExample,
    Curve,
    MaskExample,
    PhraseExample,
    ReportExample,
    RetrievalExample,
)

__all__ = ["markdown", "write"]

TITLES = {"plan": "PLAN", "gloria": "GLoRIA", "convirt": "ConVIRT", "mgca": "MGCA"}


def write(
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    rows: Sequence[Any] = (),
) -> Path:
    """Write `report.html` and `figures/*.png` into a run's folder and return the page's path.

    `metrics` are the flat final values (`grounding/cnr_signed`, ...), `history` the rows logged
    while training, each with its `step`, and `rows` what tasks show, of any kind of `figures`. A
    part without values is left out of the page.
    """
    folder = Path(folder)

    def of(kind: type) -> list[Any]:
        return [row for row in rows if isinstance(row, kind)]

    cases = of(PhraseExample)
    pictures = folder / "figures"
    _draw(pictures, cases)
    drawn = ""
    if panels := _panels(history, metrics):
        drawn, png = figures.curves(history, panels)
        (pictures / "curves.png").write_bytes(png)
    body = [
        _head(config, metrics),
        _cards(metrics),
        downstream.summary(metrics),
        _phrases(cases),
        rounds_table(metrics),
        metric_tables(metrics),
        finding_table(metrics),
        _retrieved(of(RetrievalExample)),
        downstream.lines(of(Curve)),
        downstream.masks(of(MaskExample)),
        downstream.boxes(of(BoxExample)),
        downstream.texts(of(ReportExample)),
        section("While it trained", tag("div", Html(drawn), class_="curves")) if drawn else "",
        section("Everything", folded("Config", config), folded("All metrics", metrics)),
    ]
    page = folder / "report.html"
    unfinished = page.with_suffix(".part")
    unfinished.write_text(
        document(f"plan_jax: {config.get('method', 'run')}", *body), encoding="utf-8"
    )
    unfinished.replace(page)
    return page


def _draw(pictures: Path, cases: Sequence[PhraseExample]) -> None:
    """Write the phrases' pictures into a folder, instead of those that were there."""
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("phrase_*.png"):
        old.unlink()
    for i, row in enumerate(cases):
        name = slug(f"phrase {i:02d} {row.kind} {row.phrase}")[:80]
        (pictures / f"{name}.png").write_bytes(figures.encode(figures.row_picture(row)))


def _head(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Html:
    method = str(config.get("method", "run"))
    data, speed = config.get("data", {}), metrics.get("images_per_s")
    facts = {
        "data": data.get("name") if isinstance(data, Mapping) else data,
        "steps": config.get("steps"),
        "batch": config.get("batch"),
        "seed": config.get("seed"),
        "trained in": _duration(metrics.get("wall_s")),
        "evaluated in": _duration(metrics.get("evaluated_s")),
        "images/s": number(speed, 0) if is_number(speed) else "",
        "fingerprint of parameters": str(metrics.get("params_sha256", ""))[:16],
    }
    items = [tag("li", f"{k} ", tag("b", str(v))) for k, v in facts.items() if v not in (None, "")]
    title = TITLES.get(method, method)
    return tag("header", tag("h1", title), tag("ul", *items, class_="facts"))


def _cards(metrics: Mapping[str, Any]) -> Html | None:
    """Show the headline values large, each beside what it has to beat."""
    wanted = (
        ("grounding/cnr_signed", "Grounding: contrast to noise", GROUNDING["cnr_signed"][1]),
        ("grounding/pointing", "Grounding: pointing game", GROUNDING["pointing"][1]),
        ("retrieval/i2t_r5", "Retrieval: recall at 5", recall_meaning(5, metrics)),
        ("zero_shot/auroc_macro", "Zero-shot: AUROC", auroc_meaning()),
    )
    cards = []
    for key, title, meaning in wanted:
        if is_number(metrics.get(key)):
            value, nulls = float(metrics[key]), nulls_of(key, metrics)
            span = interval(key, metrics)
            large = tag("div", number(value), tag("small", f"  {span}"), class_="value")
            said = verdict(value, nulls)
            parts = [large, strip(value, nulls), tag("p", said), tag("p", meaning)]
            cards.append(tag("div", tag("h3", title), *parts, class_="card"))
    return tag("div", *cards, class_="cards") if cards else None


def _phrases(rows: Sequence[PhraseExample]) -> Html | None:
    if not rows:
        return None
    rounds = len(rows[0].heat_maps) > 1
    text = (
        "Phrases of held-out reports in their images. Best and worst are by signed CNR, one of "
        "each finding first; random ones are not chosen by score. All heat maps of a row share "
        "one colour scale, written above it: below its lower end, one standard deviation above "
        "the row's mean, nothing is painted, so that noise does not look like an answer."
    )
    text += " Round 0 is the map before any refinement." if rounds else ""
    bar = tag("span", class_="bar", style=f"background:{figures.colour_bar()}")
    ring = tag("span", class_="ring")
    legend = [tag("span", ring, "truth"), tag("span", "weak", bar, "strong")]
    shown = [_phrase(row) for row in rows]
    key = tag("p", *legend, class_="key")
    return section("Where the words found their pixels", tag("p", text), key, *shown)


def _phrase(row: PhraseExample) -> Html:
    captions = ["radiograph", "truth"]
    captions += (
        [f"round {t}" for t in range(len(row.heat_maps))] if len(row.heat_maps) > 1 else ["heat"]
    )
    pictures = zip(figures.row_parts(row), captions, strict=True)
    cells = [tag("figure", picture(p, c), tag("figcaption", c)) for p, c in pictures]
    low, high = figures.heat_scale(row.heat_maps)
    hit = {1.0: "hit", 0.0: "missed"}.get(row.pointing, f"{row.pointing:.2f} hit")
    header = tag(
        "header",
        tag("span", row.kind, class_=f"chip {slug(row.kind)}"),
        tag("h3", row.phrase),
        tag("span", f"CNR {number(row.cnr)}"),
        tag("span", f"pointing: {hit}"),
        tag("span", f"colour from {low:.2f} to {high:.2f}"),
    )
    return tag("div", header, tag("div", *cells, class_="pictures"), class_="row")


def _retrieved(rows: Sequence[RetrievalExample]) -> Html | None:
    if not rows:
        return None
    shown = []
    for row in rows:
        found = []
        for text, score, right in row.retrieved:
            sign = ("\u2713 right", "right") if right else ("\u2717 wrong", "wrong")
            value = tag("span", f"  {number(score, 3)}", class_="soft")
            found.append(tag("li", tag("b", sign[0], class_=sign[1]), text, value))
        own = tag("p", tag("span", "its own report: ", class_="soft"), row.text)
        rank = tag("p", f"found at rank {row.rank:.0f} of {row.num_candidates}", class_="soft")
        image = tag("div", picture(figures.radiograph(row.image), "radiograph"), rank)
        shown.append(tag("div", image, tag("div", own, tag("ol", *found)), class_="found"))
    text = (
        "Images drawn at random and the reports found first for each, with their similarity. A "
        "report with the same words as the image's own is right."
    )
    return section("Which report belongs to this image?", tag("p", text), *shown)


def _duration(seconds: Any) -> str:
    if not is_number(seconds):
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _panels(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[Panel]:
    """Choose the curves: losses together, headline metrics with their baselines, then the rest."""
    seen: dict[str, int] = {}
    for row in history:
        for key, value in row.items():
            seen[key] = seen.get(key, 0) + is_number(value)
    keys = [k for k, n in seen.items() if n > 1 and k not in ("step", "time", "wall_s", "epoch")]
    losses = [k for k in keys if k.rpartition("/")[2].startswith("loss") or k.endswith("_loss")]
    panels = [Panel("Loss", {k: k for k in losses[:6]})] if losses else []
    headline = (
        "grounding/cnr_signed",
        "grounding/pointing",
        "retrieval/i2t_r5",
        "zero_shot/auroc_macro",
    )
    for name in headline:
        lines = {k: k for k in keys if k == name or k.endswith(f"/{name}")}
        levels = {n: x for n, x in nulls_of(name, metrics).items() if n in ("lung prior", "chance")}
        if lines:
            panels.append(Panel(name, lines, levels))
    plain = [k for k in keys if k not in losses and k.count("/") < 2]
    plain = [k for k in plain if not any(part in k for part in ("grounding", "retriev", "zero_sh"))]
    return panels + [Panel(k, {k: k}) for k in plain[:6]]
