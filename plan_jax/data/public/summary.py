"""The summary of a prepared dataset: `summary.json`, and the lines that a user reads."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plan_jax.data import images, quoting
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.items import Item
from plan_jax.data.public.plan import Plan
from plan_jax.data.public.source_folder import SourceFolder

SUMMARY_FILE = "summary.json"
DROPPED_FILE = "dropped.txt"  # next to the records: all that was left out, one a line
STATES = {1: "present", 0: "absent", -1: "unknown"}
MAX_EXAMPLES = 3  # of ids in a line
MAX_REASONS = 20  # lines of what is left out


class Tally:
    """Counts over the items that have become records."""

    def __init__(self, findings: Sequence[str]) -> None:
        """Initialises all counts with zero."""
        self.findings = findings
        self.ids: list[str] = []
        self.sizes: dict[str, dict[str, Any]] = {}
        self.labels: dict[str, dict[str, Counter[str]]] = {}
        self.views: Counter[str] = Counter()
        self.sections: Counter[str] = Counter()
        self.marks: Counter[str] = Counter()

    def add(self, split: str, items: Iterable[Item]) -> None:
        """Adds the records of a split."""
        patients, studies, number = set[str](), set[str](), 0
        table = {finding: Counter[str]() for finding in self.findings}
        for item in items:
            number += 1
            self.ids.append(item.image_id)
            patients.add(item.patient_id)
            studies.add(item.study_id or item.image_id)
            for finding in self.findings:
                table[finding][STATES[item.labels.get(finding, -1)]] += 1
            self.views[item.view] += 1
            self.sections.update(list(item.sections))  # the names, not the texts
            self.sections["images with a report"] += bool(item.sections)
            for name in ("boxes", "shapes", "regions", "anatomy", "triplets"):
                count = len(getattr(item, name))
                self.marks[name] += count
                self.marks[f"images with {name}"] += bool(count)
        self.sizes[split] = {
            "images": number,
            "patients": len(patients),
            "studies": len(studies),
        }
        self.labels[split] = table

    @property
    def id_digest(self) -> str:
        """Returns SHA-256 of the sorted ids, one a line."""
        return hashlib.sha256("\n".join(sorted(self.ids)).encode()).hexdigest()


def summarise(
    tally: Tally, plan: Plan, source: SourceFolder, config: PublicConfig, version: str
) -> dict[str, Any]:
    """Returns the summary as an object of JSON; it holds no ids and no texts of reports."""
    facts = config.facts
    return {
        "dataset": facts.name,
        "version": version,
        "options": config.identity(),
        "splits": tally.sizes,
        "split_rule": config.split_rule,
        "is_split_by_image": facts.is_split_by_image and _has_a_patient_each(tally.sizes),
        "leaks": dict(plan.leaks),
        "labels": {
            split: {finding: dict(counts) for finding, counts in table.items()}
            for split, table in tally.labels.items()
        },
        "views": {view or "not stated": count for view, count in tally.views.items()},
        "sections": {name: count for name, count in tally.sections.items() if count},
        "annotations": {name: count for name, count in tally.marks.items() if count},
        "dropped": {reason: len(names) for reason, names in sorted(source.dropped.items())},
        "missing_images": len(plan.missing),
        "notes": list(source.notes),
        "ids_sha256": tally.id_digest,
        "published": dict(facts.counts),
        "licence": facts.licence,
        "citation": facts.citation,
        "page": facts.page,
    }


def describe(
    summary: Mapping[str, Any],
    dropped: Mapping[str, Sequence[str]],
    config: PublicConfig,
    faults: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str | int, Sequence[str]] | None = None,
) -> list[str]:
    """Returns the lines of a summary for a user.

    Args:
      summary: as `summarise` returns it.
      dropped: reason -> names of what is left out.
      config: the options of the builder.
      faults: reason -> ids of images with a fault, which are used.
      notes: what was noted of how images were read -> their paths.
    """
    lines = [
        *_describe_splits(summary["splits"]),
        _compare(summary),
        *_describe_labels(summary["labels"]),
        _join("views", summary["views"]) if set(summary["views"]) != {"not stated"} else "",
        _join("reports, by section", summary["sections"]),
        _join("annotations", summary["annotations"]),
        *remark(summary, dropped, config, faults, notes),
        f"SHA-256 of the sorted ids: {summary['ids_sha256'][:16]}",
    ]
    return [line for line in lines if line]


def remark(
    summary: Mapping[str, Any],
    dropped: Mapping[str, Sequence[str]],
    config: PublicConfig,
    faults: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str | int, Sequence[str]] | None = None,
) -> list[str]:
    """Returns the lines that every run shows: what was left out, leaks, and other remarks.

    The arguments are those of `describe`.
    """
    facts = config.facts
    lines = [f"{facts.title} ({facts.citation}), split rule {summary['split_rule']}"]
    if summary["is_split_by_image"]:
        lines.append(f"split by image, not by patient: {facts.patients}")
    for split, count in summary["leaks"].items():
        if count:
            lines.append(
                f"leak: {count} of {summary['splits'].get(split, {}).get('images', 0)} images of "
                f"{split} are of patients whom train has too"
            )
    if leak := facts.leaks.get(summary["split_rule"]):
        lines.append(f"leak of the rule {summary['split_rule']}: {leak}")
    lines += _describe_dropped(dropped)
    for fault, names in sorted((faults or {}).items()):
        lines.append(f"{quoting.count(len(names), 'image')} with {fault} ({_give_examples(names)})")
    lines += images.summarise_notes(notes or {}, config.size)
    return lines + list(summary["notes"])


def list_dropped(dropped: Mapping[str, Sequence[str]]) -> str:
    """Returns all that is left out, one a line, with the reason."""
    return "".join(
        f"{reason}\t{name}\n" for reason, names in sorted(dropped.items()) for name in names
    )


def _has_a_patient_each(sizes: Mapping[str, Mapping[str, int]]) -> bool:
    """Returns whether each image counts as a patient, as where a list of patients is not there."""
    return all(counts["patients"] == counts["images"] for counts in sizes.values())


def _describe_splits(sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"{split}: {counts['images']} images, {counts['studies']} studies, "
        f"{counts['patients']} patients"
        for split, counts in sizes.items()
    ]


def _compare(summary: Mapping[str, Any]) -> str:
    """Returns how many of the published images, patients and studies there are here.

    Patients are left out if images count as such, and what a rule has put into two splits, since it
    counts twice.
    """
    published, parts = summary["published"], []
    is_patient_known = not summary["is_split_by_image"] and not any(summary["leaks"].values())
    for name in ("images", "patients", "studies"):
        if name not in published or (name == "patients" and not is_patient_known):
            continue
        total = sum(counts[name] for counts in summary["splits"].values())
        if total <= published[name]:
            parts.append(f"{total:,} of {published[name]:,} {name}")
    return f"of what was published: {', '.join(parts)}" if parts else ""


def _describe_labels(labels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Returns a table with one line for each finding: present, absent, unknown by split."""
    findings = list(next(iter(labels.values()), {}))
    if not findings:
        return []
    width = max(map(len, findings))
    head = "  ".join(f"{split} present/absent/unknown" for split in labels)
    lines = [f"{'label'.ljust(width)}  {head}"]
    for finding in findings:
        cells = [
            "/".join(str(table[finding].get(state, 0)) for state in STATES.values()).rjust(
                len(f"{split} present/absent/unknown")
            )
            for split, table in labels.items()
        ]
        lines.append(f"{finding.ljust(width)}  {'  '.join(cells)}")
    return lines


def _describe_dropped(dropped: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a line for each of the most frequent reasons, and one for all others."""
    by_number = sorted(dropped.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    shown, rest = sorted(by_number[:MAX_REASONS]), by_number[MAX_REASONS:]
    lines = [
        f"left out {len(names)}: {reason} ({_give_examples(names)})" for reason, names in shown
    ]
    if rest:
        number = sum(len(names) for _, names in rest)
        lines.append(f"left out {number} for {len(rest)} other reasons; {DROPPED_FILE} lists them")
    return lines


def _join(title: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    parts = sorted(counts.items(), key=lambda part: (-part[1], part[0]))
    return f"{title}: {', '.join(f'{name} {count}' for name, count in parts)}"


def _give_examples(names: Sequence[str]) -> str:
    examples = ", ".join(names[:MAX_EXAMPLES])
    return f"{examples}, ..." if len(names) > MAX_EXAMPLES else examples
