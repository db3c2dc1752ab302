"""The part of a page, and the table, of the tasks that fit a head; and the table of all tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from plan_jax.page import figures, overlays
from plan_jax.page.elements import Html, cell, is_number, number, picture, section, table, tag
from plan_jax.page.tables import interval, nulls_of
from plan_jax.types import BoxExample, Curve, MaskExample, ReportExample

TASKS = {
    "grounding": "Phrase grounding",
    "retrieval": "Image-text retrieval",
    "zero_shot": "Zero-shot classification",
    "classification": "Classification",
    "segmentation": "Segmentation",
    "detection": "Detection",
    "report_generation": "Report generation",
}
# The last parts of the keys that a table of all tasks shows, and what they are called.
HEADS = {
    "grounding": {"cnr_signed": "CNR, signed", "pointing": "pointing game", "miou_z": "mIoU (z)"},
    "retrieval": {"i2t_r5": "R@5, image to report", "t2i_r5": "R@5, report to image"},
    "zero_shot": {"auroc_macro": "AUROC", "f1_macro": "F1"},
    "classification": {"auroc_macro": "AUROC", "auprc_macro": "AUPRC", "accuracy": "accuracy"},
    "segmentation": {"dice": "Dice", "iou": "IoU"},
    "detection": {
        "map_strict": "mAP .40:.75, strict",
        "map_mgca": "mAP .40:.75, as MGCA counts",
        "coco/ap50": "AP at IoU .5",
    },
    "report_generation": {
        "ce/f1_micro": "F1 of findings, micro",
        "ce/f1_macro": "F1 of findings, macro",
        "strict/bleu4": "BLEU-4",
        "strict/rouge_l": "ROUGE-L",
        "strict/cider": "CIDEr-D",
    },
}
GROUPED = ("classification", "segmentation")  # by share of labels, by what is segmented
BESIDE = ("random", "chance")  # groups of values that are to be beaten


def headlines(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Choose the metrics that a table of all tasks shows: key and name, in order."""
    found = []
    for task, names in HEADS.items():
        if task not in GROUPED:
            keys = {f"{task}/{last}": said for last, said in names.items()}
            found += [(key, said) for key, said in keys.items() if is_number(metrics.get(key))]
            continue
        for key in metrics:
            parts = key.split("/")
            if len(parts) == 3 and parts[0] == task and parts[2] in names:
                group = parts[1].replace("_", " ")
                if task == "classification" and group.replace(".", "").isdecimal():
                    group = f"{group} % of labels"
                elif task == "classification" or parts[1] in BESIDE:
                    continue
                found.append((key, f"{group}, {names[parts[2]]}"))
    return found


def markdown(metrics: Mapping[str, Any]) -> str:
    """Write the table of all tasks: one row a metric, beside its interval and what it has to beat.

    >>> print(markdown({"detection/map_strict": 0.5, "detection/random/map_strict": 0.25}))
    | task | metric | model | 95 % interval | to beat |
    |---|---|---|---|---|
    | Detection | mAP .40:.75, strict | 0.500 |  | random encoder 0.250 |
    <BLANKLINE>
    """
    lines = ["| task | metric | model | 95 % interval | to beat |", "|---|---|---|---|---|"]
    for key, name in headlines(metrics):
        nulls = "; ".join(f"{n} {x:.3f}" for n, x in nulls_of(key, metrics).items())
        task = TASKS[key.split("/")[0]]
        value = f"{float(metrics[key]):.3f}"
        lines.append(f"| {task} | {name} | {value} | {interval(key, metrics)} | {nulls} |")
    return "\n".join(lines) + "\n"


def summary(metrics: Mapping[str, Any]) -> Html | None:
    """Show the table of all tasks, where heads were fitted."""
    if not any(key.startswith(tuple(f"{t}/" for t in list(TASKS)[3:])) for key in metrics):
        return None
    rows, last = [], ""
    for key, name in headlines(metrics):
        task = key.split("/")[0]
        value, nulls = metrics[key], nulls_of(key, metrics)
        others = ", ".join(f"{n} {number(x, 3)}" for n, x in nulls.items())
        first = tag("td", TASKS[task] if task != last else "")
        own = cell(value, "own", 3, interval(key, metrics))
        rows.append([first, tag("td", name), own, tag("td", others, class_="soft")])
        last = task
    spent = [
        f"{TASKS[t]} {metrics[f'{t}/seconds']:.0f} s"
        for t in TASKS
        if is_number(metrics.get(f"{t}/seconds"))
    ]
    text = (
        "Heads are fitted to the training split, chosen on validation and judged here. The random "
        "encoder is the same tower with random weights under the same head."
    )
    return section(
        "All tasks",
        tag("p", text),
        table(["", "", "model", "to beat"], rows),
        tag("p", f"Time: {', '.join(spent)}.", class_="soft") if spent else "",
    )


def masks(rows: Sequence[MaskExample]) -> Html | None:
    """Show segmented images, by what was segmented."""
    if not rows:
        return None
    parts = []
    for name in dict.fromkeys(row.name for row in rows):
        cells = []
        for row in rows:
            if row.name == name:
                said = f"Dice {number(row.dice, 2)}"
                shown = picture(overlays.mask_picture(row), said)
                cells.append(tag("figure", shown, tag("figcaption", said)))
        grid = tag("div", *cells, class_="pictures")
        parts.append(tag("div", tag("header", tag("h3", name)), grid, class_="row"))
    return section("Segmented", _key("what was found", "truth"), *parts)


def boxes(rows: Sequence[BoxExample]) -> Html | None:
    """Show images with true and found boxes."""
    if not rows:
        return None
    cells = []
    for row in rows:
        best = number(float(row.scores[0]), 2) if len(row.scores) else "none"
        said = f"{len(row.truth)} true, best score {best}"
        cells.append(
            tag("figure", picture(overlays.box_picture(row), said), tag("figcaption", said))
        )
    parts = [
        tag("div", tag("div", *cells[i : i + 4], class_="pictures"), class_="row")
        for i in range(0, len(cells), 4)
    ]
    return section("Detected", _key("found, with its score", "truth"), *parts)


def texts(rows: Sequence[ReportExample]) -> Html | None:
    """Show generated reports beside the radiologist's, with the findings each states."""
    if not rows:
        return None
    shown = []
    for row in rows:
        image = tag("div", picture(figures.radiograph(row.image), "radiograph"))
        said = [
            tag("p", tag("b", "reference: "), row.reference),
            tag("p", tag("b", "generated: "), row.generated),
        ]
        lists = (("right", row.correct), ("missed", row.missed), ("invented", row.invented))
        for name, findings in lists:
            if findings:
                kind = "right" if name == "right" else "wrong"
                said.append(tag("p", tag("b", f"{name}: ", class_=kind), ", ".join(findings)))
        shown.append(tag("div", image, tag("div", *said), class_="found"))
    text = "Findings are those that this project's parser reads from both texts."
    return section("Generated reports", tag("p", text), *shown)


def lines(rows: Sequence[Curve]) -> Html | None:
    """Show ROC and calibration curves."""
    if not rows:
        return None
    drawn, _ = overlays.line_chart(rows)
    return section("Classifier by classifier", tag("div", Html(drawn), class_="curves"))


def _key(found: str, truth: str) -> Html:
    colour = "#{:02x}{:02x}{:02x}".format(*overlays.FOUND)
    ring = tag("span", class_="ring")
    patch = tag("span", class_="bar", style=f"background:{colour};width:14px")
    return tag("p", tag("span", patch, found), tag("span", ring, truth), class_="key")
