"""The metrics catalogue: from the key of a metric to its label, meaning and null baselines.

The formulas are in the modules of this package, in pure numpy and apart from any model.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from plan_jax.types import Metric

Catalogue = Mapping[str, Mapping[str, Metric]]  # of each task, its METRICS


def slug(name: str) -> str:
    """Returns a name as a word for keys and file names.

    >>> slug("Pleural effusion (left)")
    'pleural_effusion_left'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def is_number(value: Any) -> bool:
    """Returns whether a value is a plain number, NaN included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Entry:
    """A measured metric: its full key, its place in the catalogue and its null baselines.

    `group` are the values of the placeholders in the catalogue's key, `interval` the bootstrap
    interval (NaN, NaN where there is none).
    """

    key: str
    task: str
    pattern: str
    group: tuple[str, ...]
    metric: Metric
    value: float
    baselines: Mapping[str, float]
    interval: tuple[float, float]

    def reason(self) -> str:
        """Returns why the value is NaN; "" if it is a number, or nothing is known."""
        return self.metric.undefined if math.isnan(self.value) else ""

    def beats(self, baseline: float) -> bool:
        """Returns whether the value is strictly better than a baseline; False if either is NaN."""
        if self.metric.higher_is_better:
            return self.value > baseline
        return self.value < baseline

    def strongest_baseline(self) -> tuple[str, float] | None:
        """Returns the label and value of the best baseline, or None if there is no finite one."""
        finite = [item for item in self.baselines.items() if math.isfinite(item[1])]
        choose = max if self.metric.higher_is_better else min
        return choose(finite, key=lambda item: item[1], default=None)


def lookup(catalogue: Catalogue, key: str) -> tuple[str, tuple[str, ...], Metric] | None:
    """Returns the pattern, the placeholders' values and the filled-in metric of a key, or None.

    An exact key wins over a pattern, and among patterns the first one wins.

    >>> catalogue = {"classification": {"{share}/auroc": Metric("AUROC, {share} %", "...")}}
    >>> lookup(catalogue, "classification/10/auroc")[2].label
    'AUROC, 10 %'
    """
    task, _, rest = key.partition("/")
    metrics = catalogue.get(task, {})
    # Sorting is stable: first the exact keys, then the patterns in their order.
    for pattern in sorted(metrics, key=lambda name: "{" in name):
        names = re.findall(r"{(\w+)}", pattern)
        match = re.fullmatch(re.sub(r"{\w+}", r"([^/]+)", pattern), rest)
        if match:
            values = dict(zip(names, match.groups(), strict=True))
            metric = metrics[pattern]
            baselines = {k: v.format(**values) for k, v in metric.baselines.items()}
            # Slugs have underscores instead of spaces; a label is for people, a key is not.
            label = metric.label.format(**{k: v.replace("_", " ") for k, v in values.items()})
            return pattern, match.groups(), replace(metric, label=label, baselines=baselines)
    return None


def entries(catalogue: Catalogue, values: Mapping[str, Any]) -> Iterator[Entry]:
    """Yields every measured metric that the catalogue knows, in the catalogue's order.

    Keys that serve as baselines or bounds of an interval are yielded only if the catalogue names
    them without placeholders.
    """
    matches = {
        key: match
        for key, value in values.items()
        if is_number(value) and (match := lookup(catalogue, key)) is not None
    }
    # `{finding}/cnr_signed` also matches the key of a baseline, as `prior/cnr_signed`.
    baseline_keys = {
        f"{key.partition('/')[0]}/{baseline}"
        for key, (_, _, metric) in matches.items()
        for baseline in metric.baselines.values()
    }
    # And `i2t_p{k}` matches the bound `i2t_p5_low`.
    bound_keys = {f"{key}_{bound}" for key in values for bound in ("low", "high")}
    derived_keys = baseline_keys | bound_keys
    for task, metrics in catalogue.items():
        order = {pattern: position for position, pattern in enumerate(metrics)}
        keys = [
            key
            for key, (_, group, _) in matches.items()
            if key.startswith(f"{task}/") and not (group and key in derived_keys)
        ]
        # Sorting is stable: the keys of one pattern stay in the order of `values`.
        for key in sorted(keys, key=lambda key: order[matches[key][0]]):
            pattern, group, metric = matches[key]
            baselines: dict[str, Any] = {
                label: values.get(f"{task}/{baseline}")
                for label, baseline in metric.baselines.items()
            }
            # A bound that is undefined is NaN, which metrics.json holds as null.
            bounds: list[Any] = [values.get(f"{key}_{end}") for end in ("low", "high")]
            low, high = (float(x) if is_number(x) else math.nan for x in bounds)
            yield Entry(
                key=key,
                task=task,
                pattern=pattern,
                group=group,
                metric=metric,
                value=float(values[key]),
                baselines={label: float(x) for label, x in baselines.items() if is_number(x)},
                interval=(low, high),
            )


def undefined_sentences(catalogue: Catalogue, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the task and a sentence for each reason why some of its metrics are NaN.

    >>> metric = Metric("AUROC, {finding}", "", undefined="all labels are 0")
    >>> catalogue = {"zero_shot": {"{finding}/auroc": metric}}
    >>> values = dict.fromkeys(("zero_shot/edema/auroc", "zero_shot/mass/auroc"), math.nan)
    >>> undefined_sentences(catalogue, values)
    [('zero_shot', 'AUROC, edema; AUROC, mass are undefined: all labels are 0')]
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries(catalogue, values):
        if reason := entry.reason():
            groups.setdefault((entry.task, reason), []).append(entry.metric.label)
    return [
        (task, f"{'; '.join(labels)} {'are' if len(labels) > 1 else 'is'} undefined: {reason}")
        for (task, reason), labels in groups.items()
    ]


def headlines(catalogue: Catalogue, values: Mapping[str, Any]) -> list[Entry]:
    """Returns the measured headline metrics, in the catalogue's order."""
    return [entry for entry in entries(catalogue, values) if entry.metric.headline]
