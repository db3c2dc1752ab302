"""The metrics catalogue: label, meaning and null baselines of every task's metrics."""

from plan_jax.types import Metric

TITLES = {
    "grounding": "Phrase grounding",
    "retrieval": "Image-text retrieval",
    "zero_shot": "Zero-shot classification",
    "classification": "Classification",
    "segmentation": "Segmentation",
    "detection": "Detection",
    "report_generation": "Report generation",
}

# Label, meaning, digits, and whether it is a headline.
_GROUNDING = {
    "cnr_signed": (
        "CNR, signed",
        "How far the heat inside the truth stands above the rest of the image, in units of its "
        "spread. 0: no contrast; negative: the wrong place is hot.",
        2,
        True,
    ),
    "pointing": ("pointing game", "How often the hottest pixel lies inside the truth.", 3, True),
    "miou_z": (
        "mIoU (z)",
        "Overlap of the hot area with the truth at thresholds .1 to .5, after max(S - mean, 0) / "
        "max.",
        3,
        True,
    ),
    "miou_minmax": (
        "mIoU, min-max",
        "The same overlap after scaling each map to [0, 1].",
        3,
        False,
    ),
    "miou_raw": (
        "mIoU, raw",
        "The same overlap on the map as it is, negative values as 0.",
        3,
        False,
    ),
    "cnr_abs": (
        "CNR, absolute",
        "CNR without its sign, as first published. A map that is dark where it should be bright "
        "also scores, so read it next to the signed one.",
        2,
        False,
    ),
}
_MAPS = {
    "random map": "random",
    "image centre": "centre",
    "lung prior": "prior",
    "mean mask of finding": "mean_finding",
    "mean mask of phrase": "mean_phrase",
}
_WAYS = {"i2t": "image to report", "t2i": "report to image"}
_AUROC = "How often an image with the finding scores above one without it; 0.5 is chance."


def _grounding() -> dict[str, Metric]:
    metrics = {
        "n": Metric("phrases", "Number of scored phrases.", 0),
        "skipped": Metric("skipped phrases", "Phrases without a usable truth.", 0),
    }
    for prefix, suffix in (("", ""), ("bare/", ", bare")):
        for key, (label, meaning, digits, headline) in _GROUNDING.items():
            baselines = {name: f"{prefix}{null}/{key}" for name, null in _MAPS.items()}
            bare = " The phrase names no location." if suffix else ""
            metrics[f"{prefix}{key}"] = Metric(
                label + suffix,
                meaning + bare,
                digits,
                baselines,
                headline and (not suffix or key != "miou_z"),
            )
    for prefix, suffix in (("", ""), ("bare/", ", bare")):
        for key, (label, meaning, digits, headline) in _GROUNDING.items():
            if headline:
                metrics[f"{prefix}round{{t}}/{key}"] = Metric(label + suffix, meaning, digits)
    for prefix, suffix in (("", ""), ("bare/", ", bare")):
        for key in ("cnr_signed", "pointing"):
            label, meaning, digits, _ = _GROUNDING[key]
            baselines = {name: f"{prefix}{null}/{{finding}}/{key}" for name, null in _MAPS.items()}
            metrics[f"{prefix}{{finding}}/{key}"] = Metric(
                label + suffix, meaning, digits, baselines
            )
    return metrics


def _retrieval() -> dict[str, Metric]:
    metrics = {
        "n": Metric("studies", "Number of candidates.", 0),
        "duplicates": Metric("duplicates", "Studies that share their words with another.", 0),
    }
    for prefix in ("", "{similarity}/"):
        for way, direction in _WAYS.items():
            for k in (1, 5, 10):
                metrics[f"{prefix}{way}_r{k}"] = Metric(
                    f"R@{k}, {direction}",
                    f"How often the counterpart, or one with the same words, is among the first "
                    f"{k}.",
                    3,
                    {"chance": f"chance/{way}_r{k}"},
                    k < 10 and not prefix,
                )
            metrics[f"{prefix}{way}_median_rank"] = Metric(
                f"median rank, {direction}",
                "Half of the queries are answered by this rank.",
                1,
                {"chance": f"chance/{way}_median_rank"},
                higher_is_better=False,
            )
    return metrics


_RANDOM = "random encoder"

CATALOGUE = {
    "grounding": _grounding(),
    "retrieval": _retrieval(),
    "zero_shot": {
        "auroc_macro": Metric(
            "AUROC", f"{_AUROC} By prompts alone.", 3, {"chance": "chance/auroc_macro"}, True
        ),
        "f1_macro": Metric(
            "F1", "Mean over findings.", 3, {"all positive": "all_positive/f1_macro"}, True
        ),
        "{similarity}/auroc_macro": Metric("AUROC", _AUROC, 3, {"chance": "chance/auroc_macro"}),
        "{finding}/auroc": Metric("AUROC", _AUROC, 3),
    },
    "classification": {
        f"{{share}}/{key}": Metric(
            f"{{share}} % of labels, {label}",
            meaning,
            3,
            {_RANDOM: f"random/{{share}}/{key}", "chance": f"chance/{{share}}/{key}"},
            True,
        )
        for key, label, meaning in (
            ("auroc_macro", "AUROC", _AUROC),
            ("auprc_macro", "AUPRC", "Area under the precision-recall curve."),
            ("accuracy", "accuracy", "Share of images with the right class."),
        )
    }
    | {"{share}/{finding}/auroc": Metric("AUROC", _AUROC)},
    "segmentation": {
        f"{{target}}/{key}": Metric(
            f"{{target}}, {label}",
            meaning,
            3,
            {
                _RANDOM: f"random/{{target}}/{key}",
                "mean mask of training": f"mean_mask/{{target}}/{key}",
            },
            True,
        )
        for key, label, meaning in (
            ("dice", "Dice", "Twice the overlap over the sum of both areas."),
            ("iou", "IoU", "Overlap over union of both areas."),
        )
    },
    "detection": {
        key: Metric(
            label, meaning, 3, {_RANDOM: f"random/{key}", "usual boxes": f"prior/{key}"}, True
        )
        for key, label, meaning in (
            ("map_strict", "mAP .40:.75, strict", "Mean precision over IoU thresholds."),
            ("map_mgca", "mAP .40:.75, as MGCA counts", "As the code of MGCA counts it."),
            ("coco/ap50", "AP at IoU .5", "COCO's average precision."),
        )
    }
    | {"{finding}/ap50": Metric("AP at IoU .5", "COCO's average precision.")},
    "report_generation": {
        key: Metric(
            label,
            meaning,
            3,
            {
                _RANDOM: f"random/{key}",
                "nearest image's report": f"retrieval/{key}",
                "commonest report": f"common/{key}",
            },
            True,
        )
        for key, label, meaning in (
            ("ce/f1_micro", "F1 of findings, micro", "Findings stated, against the reference."),
            ("ce/f1_macro", "F1 of findings, macro", "The same, averaged over findings."),
            ("strict/bleu4", "BLEU-4", "Overlap of word sequences with the reference."),
            ("strict/rouge_l", "ROUGE-L", "Longest common subsequence with the reference."),
            ("strict/cider", "CIDEr-D", "Overlap of rare word sequences with the reference."),
        )
    },
}
