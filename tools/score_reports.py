"""Scores the report parser: on phantoms, whose triplets are exact, and on annotated real reports.

    python tools/score_reports.py phantom --count 1000
    python tools/score_reports.py openi --archive openi_reports/NLMCXR_reports.tgz

Prints Markdown tables and never a word of a report.
"""

import argparse
import re
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan_jax.data.phantom import write_report  # noqa: E402
from plan_jax.data.phantom.report_text import NAMES  # noqa: E402
from plan_jax.data.report_parser import extract_triplets, label_findings  # noqa: E402
from plan_jax.data.report_parser.places import expand_regions  # noqa: E402
from plan_jax.data.report_parser.terms import COVERED_FINDINGS  # noqa: E402
from plan_jax.types import UserError  # noqa: E402

# The parser was developed on phantoms 0 to 499 of seed 0, and on the Open-I reports whose number is
# divisible by 5. Neither is scored by default.
SEED, FIRST_INDEX = 0, 500
DEVELOPMENT_DIVISOR = 5
MAX_XML_BYTES = 2**20
SIDES_OF_WORD = {"bilateral": {"left", "right"}, "left": {"left"}, "right": {"right"}}

# Patterns of Open-I annotations in lower case, `head/qualifier/...`, and the finding of each.
ANNOTATIONS: tuple[tuple[str, str], ...] = (
    (r"pulmonary atelectasis", "atelectasis or collapse"),
    (r"calcinosis|calcified granuloma|atherosclerosis", "calcification"),
    (r"cardiomegaly|(cardiac shadow|heart)/.*enlarged", "cardiomegaly"),
    (r"consolidation|airspace disease", "consolidation"),
    (r"deformity", "deformity"),
    (
        r"(pulmonary |bullous )?emphysema|blister|pulmonary disease, chronic obstructive",
        "emphysema",
    ),
    (r"fractures, bone", "fracture"),
    (r"hernia", "hernia"),
    (r"lung/hyperdistention|lung, hyperlucent|diaphragm/.*flattened", "hyperinflate"),
    (r"infiltrate", "infiltration"),
    (r"catheters, indwelling", "line"),
    (r"markings|lung/(.*/)?(interstitial|prominent)", "marking"),
    (r"mass$|mass/", "mass"),
    (r"nodule|(opacity|density)/(.*/)?round", "nodule"),
    (r"opacity|density", "opacity"),
    (r"pleural effusion|hydropneumothorax|hemothorax", "pleural effusion"),
    (r"thickening/.*pleura", "pleural thicken"),
    (r"pneumonia", "pneumonia"),
    (r"pneumothorax|hydropneumothorax|hemopneumothorax", "pneumothorax"),
    (r"pulmonary edema|pulmonary congestion", "edema or engorgement"),
    (r"cicatrix|(pulmonary )?fibrosis", "scar"),
    (r"stents", "stent"),
    (r"tube, inserted", "tube"),
    (r"costophrenic angle/.*blunted|sulcus/.*blunted", "blunt"),
)
LABELS = tuple(dict.fromkeys(finding for _, finding in ANNOTATIONS))
NAMES_OF_LABEL = {label: label.split(" or ") for label in LABELS}


class Counts(NamedTuple):
    """True positives, false negatives and false positives by name."""

    correct: Counter
    missed: Counter
    extra: Counter


class AnnotatedReport(NamedTuple):
    """An Open-I report: its number, findings with impression, and annotations in lower case."""

    number: int
    text: str
    annotations: list[str]


def count_matches(pairs: Iterable[tuple[set, set]], name_of: Callable[[Any], str]) -> Counts:
    """Returns the counts of (predicted, true) sets, each item under its name."""
    counts = Counts(Counter(), Counter(), Counter())
    for predicted, truth in pairs:
        counts.correct.update(map(name_of, predicted & truth))
        counts.missed.update(map(name_of, truth - predicted))
        counts.extra.update(map(name_of, predicted - truth))
    return counts


def format_scores(counts: Counts) -> list[str]:
    """Returns the lines of a table: one row for each name, and one for all together."""
    lines = ["| finding | precision | recall | F1 | stated |", "|---|---|---|---|---|"]
    names = sorted(counts.correct | counts.missed | counts.extra)
    for label, group in [*((name, [name]) for name in names), ("all", names)]:
        correct, missed, extra = (sum(counter[name] for name in group) for counter in counts)
        precision = correct / max(correct + extra, 1)
        recall = correct / max(correct + missed, 1)
        f1 = 2 * correct / max(2 * correct + missed + extra, 1)
        cells = [label, f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}", str(correct + missed)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def score_phantoms(count: int) -> str:
    """Returns tables of phantoms on which the parser was not developed, for their own kinds."""
    with_region, without_region = [], []
    for index in range(FIRST_INDEX, FIRST_INDEX + count):
        *_, text, triplets = write_report(SEED, index)
        truth = set(triplets)
        predicted = {triplet for triplet in extract_triplets(text) if triplet[1] in NAMES}
        with_region.append((predicted, truth))
        without_region.append(({item[1:] for item in predicted}, {item[1:] for item in truth}))
    lines = [f"{count} phantoms, seed {SEED}, from index {FIRST_INDEX}"]
    lines += ["", "finding and existence:", ""]
    lines += format_scores(count_matches(without_region, lambda pair: pair[0]))
    lines += ["", "region, finding and existence:", ""]
    lines += format_scores(count_matches(with_region, lambda triplet: triplet[1]))
    return "\n".join(lines)


def read_openi(archive: Path) -> Iterator[AnnotatedReport]:
    """Yields the reports of the Open-I archive.

    Raises:
      UserError: a file is larger than `MAX_XML_BYTES`, or declares a document type or an entity.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            number = re.fullmatch(r"(?:.*/)?(\d+)\.xml", member.name)
            stream = tar.extractfile(member) if number and member.isfile() else None
            if number is None or stream is None:
                continue
            content = stream.read(MAX_XML_BYTES + 1)
            # Entities can expand without bound. A zero byte means UTF-16, which would hide them.
            is_unsafe = any(word in content for word in (b"<!DOCTYPE", b"<!ENTITY", b"\0"))
            if len(content) > MAX_XML_BYTES or is_unsafe:
                raise UserError(f"{member.name} is too large or declares entities; leave it out")
            tree = ET.fromstring(content)
            parts = {part.get("Label"): part.text or "" for part in tree.iter("AbstractText")}
            text = "\n\n".join(parts.get(name, "") for name in ("FINDINGS", "IMPRESSION"))
            annotations = [part.text.strip().lower() for part in tree.iter("major") if part.text]
            yield AnnotatedReport(int(number[1]), text, annotations)


def compare_sides(label: str, report: AnnotatedReport) -> Iterator[tuple[set, set]]:
    """Yields the parsed and the annotated sides of a finding, if both name a side."""
    entries = [
        annotation
        for pattern, finding in ANNOTATIONS
        if finding == label
        for annotation in report.annotations
        if re.match(pattern, annotation)
    ]
    words = (word for entry in entries for word in entry.split("/"))
    annotated = set().union(*(SIDES_OF_WORD.get(word, set()) for word in words))
    names = {
        finding for name in NAMES_OF_LABEL[label] for finding in COVERED_FINDINGS.get(name, (name,))
    }
    regions = [
        region
        for region, finding, existence in extract_triplets(report.text)
        if finding in names and existence == 1
    ]
    parsed = {region.split()[0] for region in expand_regions(regions) if region != "heart"}
    # The heart has no side, though annotators sometimes give one.
    if annotated and regions and label != "cardiomegaly":
        yield parsed, annotated


def score_openi(archive: Path, part: str, count_doubtful: bool) -> str:
    """Returns tables of what the parser finds stated, against the annotations of Open-I."""
    pairs, sides = [], []
    num_normal = num_normal_without_findings = 0
    for report in read_openi(archive):
        is_development = report.number % DEVELOPMENT_DIVISOR == 0
        if is_development != (part == "development") or "no indexing" in report.annotations:
            continue
        annotated = {
            finding
            for pattern, finding in ANNOTATIONS
            for annotation in report.annotations
            if re.match(pattern, annotation)
        }
        stated = set()
        for label, names in NAMES_OF_LABEL.items():
            labels = label_findings(report.text, names)
            if labels.max() == 1 or (count_doubtful and labels.any()):
                stated.add(label)
        pairs.append((stated, annotated))
        if report.annotations == ["normal"]:
            num_normal += 1
            num_normal_without_findings += not stated
        for label in stated & annotated:
            sides += compare_sides(label, report)
    meaning = "stated" if count_doubtful else "not stated"
    num_same = sum(parsed == annotated for parsed, annotated in sides)
    lines = [f"{len(pairs)} reports, {part}; what is uncertain counts as {meaning}", ""]
    lines += format_scores(count_matches(pairs, str))
    lines += [
        "",
        f"{num_normal_without_findings} of {num_normal} annotated `normal` state none of these",
        f"{num_same} of {len(sides)} findings with an annotated side have that side",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the tables for the data that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="data", required=True)
    phantom = commands.add_parser("phantom")
    phantom.add_argument("--count", type=int, default=1000)
    openi = commands.add_parser("openi")
    openi.add_argument("--archive", type=Path, required=True)
    openi.add_argument("--part", choices=("held out", "development"), default="held out")
    openi.add_argument("--doubtful", action="store_true", help="uncertain counts as stated")
    arguments = parser.parse_args()
    if arguments.data == "phantom":
        print(score_phantoms(arguments.count))
    else:
        print(score_openi(arguments.archive, arguments.part, arguments.doubtful))


if __name__ == "__main__":
    main()
