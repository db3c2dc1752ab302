"""The numbers of a page: every metric beside what it has to beat, and what it means in words."""

from collections.abc import Mapping
from typing import Any

from plan_jax.page.elements import Html, cell, is_number, number, section, strip, table, tag

NULLS = {
    "random": "random map",
    "centre": "image centre",
    "prior": "lung prior",
    "mean_finding": "mean mask of finding",
    "mean_phrase": "mean mask of phrase",
}
BASELINES = {
    "random": "random encoder",
    "chance": "chance",
    "prior": "usual boxes",
    "mean_mask": "mean mask of training",
    "retrieval": "nearest image's report",
    "common": "commonest report",
}
GROUNDING = {
    "cnr_signed": (
        "CNR, signed",
        "How far the heat inside the truth stands above the rest of the image, in units of its "
        "spread. 0: it says nothing; negative: it lights up the wrong place.",
    ),
    "pointing": ("Pointing game", "How often the hottest pixel lies inside the truth."),
    "miou_z": (
        "mIoU, above the mean",
        "Overlap of the hot area with the truth at thresholds .1 to .5, after max(S - mean, 0) / "
        "max.",
    ),
    "miou_minmax": ("mIoU, min-max", "The same overlap after stretching each map to 0..1."),
    "miou_raw": ("mIoU, raw", "The same overlap on the map as it is, negative values as 0."),
    "cnr_abs": (
        "CNR, absolute",
        "CNR without its sign, as first published: a map that is dark where it should be bright "
        "also scores, so read it beside the signed one.",
    ),
}
HEADS = ("cnr_signed", "pointing")
KINDS = {"": "global", "local/": "local", "both/": "both"}
WAYS = {"i2t": "image to report", "t2i": "report to image"}


def rounds_table(metrics: Mapping[str, Any]) -> Html | None:
    """Show whether refinement helps: one row for each round."""
    columns = [(p, k) for p in ("", "bare/") for k in ("cnr_signed", "pointing", "miou_z")]
    rows = []
    while f"grounding/round{len(rows)}/cnr_signed" in metrics:
        t = len(rows)
        keys = [f"grounding/{p}round{t}/{k}" for p, k in columns]
        rows.append([tag("td", f"round {t}"), *(cell(metrics.get(k), digits=3) for k in keys)])
    if not rows:
        return None
    names = [f"{GROUNDING[k][0]}{', bare' if p else ''}" for p, k in columns]
    text = "The same phrases, scored on the map after each round; bare phrases name no place."
    return section("Does refinement help?", tag("p", text), table(["", *names], rows))


def metric_tables(metrics: Mapping[str, Any]) -> Html | None:
    """Show every metric beside the maps and orders that know less."""
    parts: list[str] = []
    for prefix, title in (("", "Grounding, full phrases"), ("bare/", "Grounding, bare phrases")):
        keys = {f"grounding/{prefix}{k}": v for k, v in GROUNDING.items()}
        if any(key in metrics for key in keys):
            n, skipped = (metrics.get(f"grounding/{prefix}{k}", 0) for k in ("n", "skipped"))
            note = f"{n:.0f} phrases, {skipped:.0f} skipped for want of a usable truth."
            parts += [tag("h3", title), tag("p", note, class_="soft"), _values(keys, metrics)]
    parts += [*_retrieval(metrics), *_zero_shot(metrics)]
    text = (
        "Each value with what it has to beat. A baseline in red does better than the model; the "
        "two mean masks know the text and the training truths, but never see the image."
    )
    return section("The numbers", tag("p", text), *parts) if parts else None


def _retrieval(metrics: Mapping[str, Any]) -> list[Html]:
    """One row for each depth, one column for each direction and similarity."""
    columns = [(w, k) for w in WAYS for k in KINDS if f"retrieval/{k}{w}_r5" in metrics]
    if not columns:
        return []
    n, twins = (metrics.get(f"retrieval/{k}", 0) for k in ("n", "duplicates"))
    note = (
        f"{n:.0f} studies; {twins:.0f} share their words with another, and finding any with the "
        "same words counts as a hit. Global compares the whole report with the whole image, local "
        "its words with pixels, both is the two together."
    )
    rows = []
    for name in ("r1", "r5", "r10", "median_rank"):
        title, digits, meaning = "Median rank", 1, "Half of the queries are answered by this place."
        if name != "median_rank":
            title, digits, meaning = f"R@{name[1:]}", 3, recall_meaning(int(name[1:]), metrics)
        row = [tag("td", title, tag("div", meaning, class_="meaning"))]
        for way, kind in columns:
            key = f"retrieval/{kind}{way}_{name}"
            row.append(cell(metrics.get(key), "own", digits, interval(key, metrics)))
        rows.append([*row, cell(metrics.get(f"retrieval/chance/i2t_{name}"), "behind", digits)])
    names = [f"{WAYS[way]}, {KINDS[kind]}" for way, kind in columns]
    return [
        tag("h3", "Retrieval"),
        tag("p", note, class_="soft"),
        table(["", *names, "chance"], rows),
    ]


def _zero_shot(metrics: Mapping[str, Any]) -> list[Html]:
    keys = {f"zero_shot/{k}auroc_macro": said for k, said in KINDS.items()}
    keys = {key: said for key, said in keys.items() if key in metrics}
    if not keys:
        return []
    name = tag("td", "AUROC, mean over findings", tag("div", auroc_meaning(), class_="meaning"))
    row = [name, *(cell(metrics[k], "own", small=interval(k, metrics)) for k in keys)]
    row.append(cell(metrics.get("zero_shot/chance/auroc_macro"), "behind"))
    return [tag("h3", "Zero-shot classification"), table(["", *keys.values(), "chance"], [row])]


def finding_table(metrics: Mapping[str, Any]) -> Html | None:
    """Show each finding by itself: grounding beside two of its null maps, and AUROC."""
    names = [k.split("/")[1] for k in metrics if k.startswith("grounding/") and k.count("/") == 2]
    names = [n for n in dict.fromkeys(names) if f"grounding/random/{n}/cnr_signed" in metrics]
    heads = [
        "",
        "CNR",
        "lung prior",
        "mean mask",
        "pointing",
        "lung prior",
        "mean mask",
        "CNR, bare",
        "pointing, bare",
        "AUROC",
    ]
    rows = []
    for name in names:
        row = [tag("td", name.replace("_", " "))]
        for k in HEADS:
            keys = [f"grounding/{null}{name}/{k}" for null in ("", "prior/", "mean_finding/")]
            own, *rest = (metrics.get(key) for key in keys)
            row += [cell(own, "own", 2), *(cell(x, _side(own, x), 2) for x in rest)]
        row += [cell(metrics.get(f"grounding/bare/{name}/{k}"), "", 2) for k in HEADS]
        rows.append([*row, cell(metrics.get(f"zero_shot/{name}/auroc"))])
    return section("Finding by finding", table(heads, rows)) if rows else None


def nulls_of(key: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Find what a metric has to beat, by name; empty where nothing is known."""
    task, *middle, name = key.split("/")
    if task == "grounding":
        found = {text: "/".join([task, *middle, null, name]) for null, text in NULLS.items()}
    elif task in ("retrieval", "zero_shot"):
        found = {"chance": f"{task}/chance/{name}"}
    else:
        rest = "/".join([*middle, name])
        found = {text: f"{task}/{null}/{rest}" for null, text in BASELINES.items()}
    return {text: float(metrics[k]) for text, k in found.items() if is_number(metrics.get(k))}


def verdict(value: float, nulls: Mapping[str, float]) -> str:
    """Say in words what a value beats and what it does not, the nearest of each."""
    below = {name: x for name, x in nulls.items() if x < value}
    above = {name: x for name, x in nulls.items() if x >= value}
    parts = []
    if below:
        name = max(below, key=below.__getitem__)
        parts.append(f"above the {name} ({number(below[name])})")
    if above:
        name = min(above, key=above.__getitem__)
        parts.append(f"not above the {name} ({number(above[name])})")
    return ", ".join(parts).replace("the chance", "chance").capitalize()


def interval(key: str, metrics: Mapping[str, Any]) -> str:
    """Write the bootstrap interval of a metric, if it has one."""
    low, high = (metrics.get(f"{key}_{end}") for end in ("low", "high"))
    return f"{number(low)} to {number(high)}" if is_number(low) and is_number(high) else ""


def recall_meaning(k: int, metrics: Mapping[str, Any]) -> str:
    """Say what recall at k means, with the number of candidates."""
    among = f" of {metrics['retrieval/n']:.0f}" if is_number(metrics.get("retrieval/n")) else ""
    return f"How often its own report, or image, is among the first {k}{among}."


def auroc_meaning() -> str:
    """Say what the area under the ROC curve means."""
    return (
        "How often an image with the finding scores above one without it, by prompts alone. "
        "0.5 is chance."
    )


def _values(keys: Mapping[str, tuple[str, str]], metrics: Mapping[str, Any]) -> Html:
    """Make the table of some metrics: name and meaning, value, strip, each null."""
    keys = {key: text for key, text in keys.items() if key in metrics}
    nulls = {key: nulls_of(key, metrics) for key in keys}
    names = list(dict.fromkeys(name for some in nulls.values() for name in some))
    rows = []
    for key, (name, meaning) in keys.items():
        value, digits = float(metrics[key]), 2 if "cnr" in key else 3
        row = [
            tag("td", name, tag("div", meaning, class_="meaning")),
            cell(value, "own", digits, interval(key, metrics)),
            tag("td", strip(value, nulls[key]), class_="dots"),
        ]
        others = [nulls[key].get(n) for n in names]
        rows.append(row + [cell(x, _side(value, x), digits) for x in others])
    return table(["", "model", "", *names], rows)


def _side(value: Any, null: Any) -> str:
    if not is_number(value) or not is_number(null):
        return ""
    return "behind" if null < value else "ahead"
