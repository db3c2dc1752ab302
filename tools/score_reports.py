"""Score the report parser: on phantoms, whose triplets are exact, and on annotated real reports.

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
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan_jax.data.phantom import write_report  # noqa: E402
from plan_jax.data.phantom.report_text import NAMES  # noqa: E402
from plan_jax.data.report_parser import tags, triplets  # noqa: E402
from plan_jax.data.report_parser.places import expanded  # noqa: E402
from plan_jax.data.report_parser.terms import COVERS  # noqa: E402
from plan_jax.types import UserError  # noqa: E402

SEED, FIRST = 0, 500  # the parser was developed on phantoms 0 to 499 of seed 0
DEVELOPED = 5  # and on the Open-I reports whose number this divides
LARGEST = 2**20  # bytes of one report's XML

# Open-I annotation, lower case, `head/qualifier/...` -> the finding that it states.
MESH: tuple[tuple[str, str], ...] = (
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
LABELS = tuple(dict.fromkeys(finding for _, finding in MESH))
NAMES_OF = {label: label.split(" or ") for label in LABELS}


def scores(found: Counter, missed: Counter, extra: Counter) -> list[str]:
    """Make the rows of a table, a name each and all together, of counts by name."""
    rows = ["| finding | precision | recall | F1 | stated |", "|---|---|---|---|---|"]
    names = sorted(found | missed | extra)
    for name in [*names, ""]:
        here = names if name == "" else [name]
        right, lost, wrong = (sum(c[n] for n in here) for c in (found, missed, extra))
        precision, recall = right / max(right + wrong, 1), right / max(right + lost, 1)
        f1 = 2 * right / max(2 * right + lost + wrong, 1)
        cells = [name or "all", *(f"{v:.3f}" for v in (precision, recall, f1)), str(right + lost)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def counted(pairs: Iterable[tuple[set, set]], name) -> tuple[Counter, Counter, Counter]:
    """Count what was rightly found, missed and wrongly found, under the name of each thing."""
    found, missed, extra = Counter(), Counter(), Counter()
    for ours, theirs in pairs:
        found.update(map(name, ours & theirs))
        missed.update(map(name, theirs - ours))
        extra.update(map(name, ours - theirs))
    return found, missed, extra


def phantom(count: int) -> str:
    """Compare the triplets of phantoms that the development did not look at, about their kinds."""
    whole, pairs = [], []
    for index in range(FIRST, FIRST + count):
        *_, text, theirs = write_report(SEED, index)
        ours = {t for t in triplets(text) if t[1] in NAMES}
        whole.append((ours, set(theirs)))
        pairs.append(({t[1:] for t in ours}, {t[1:] for t in theirs}))
    lines = [f"{count} phantoms, seed {SEED}, from index {FIRST}", "", "finding and existence:", ""]
    lines += scores(*counted(pairs, lambda t: t[0]))
    lines += ["", "region, finding and existence:", ""]
    return "\n".join(lines + scores(*counted(whole, lambda t: t[1])))


def openi_reports(archive: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Read number, findings and impression, and annotation of each report of the archive.

    Raises:
      UserError: if a file is larger than `LARGEST` or declares a document type or an entity.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            number = re.fullmatch(r"(?:.*/)?(\d+)\.xml", member.name)
            stream = tar.extractfile(member) if number and member.isfile() else None
            if stream is None:
                continue
            raw = stream.read(LARGEST + 1)
            banned = any(word in raw for word in (b"<!DOCTYPE", b"<!ENTITY", b"\0"))  # 0: UTF-16
            if len(raw) > LARGEST or banned:
                raise UserError(f"{member.name} is too large or declares entities; leave it out")
            tree = ET.fromstring(raw)
            said = {e.get("Label"): e.text or "" for e in tree.iter("AbstractText")}
            text = "\n\n".join(said.get(part, "") for part in ("FINDINGS", "IMPRESSION"))
            major = [e.text.strip().lower() for e in tree.iter("major") if e.text]
            yield int(number[1]), text, major


def compared_sides(label: str, text: str, major: list[str]) -> Iterator[tuple[set, set]]:
    """Give the sides of a finding that the parser states and those marked, if any is marked."""
    both = {"bilateral": {"left", "right"}, "left": {"left"}, "right": {"right"}}
    entries = [e for pattern, f in MESH if f == label for e in major if re.match(pattern, e)]
    marked = set().union(*(both.get(word, ()) for e in entries for word in e.split("/")))
    names = {name for asked in NAMES_OF[label] for name in COVERS.get(asked, (asked,))}
    said = [r for r, name, existence in triplets(text) if name in names and existence == 1]
    sided = {box.split()[0] for box in expanded(said) if box != "heart"}
    if marked and said and label != "cardiomegaly":
        yield sided, marked


def openi(archive: Path, part: str, doubtful: bool) -> str:
    """Compare what the parser finds stated with what the annotators of Open-I marked."""
    pairs, sides, quiet = [], [], {True: [], False: []}
    for number, text, major in openi_reports(archive):
        if (number % DEVELOPED == 0) != (part == "development") or "no indexing" in major:
            continue
        marked = {f for pattern, f in MESH for entry in major if re.match(pattern, entry)}
        stated = {
            label
            for label, names in NAMES_OF.items()
            if (found := tags(text, names)).max() == 1 or (doubtful and found.any())
        }
        pairs.append((stated, marked))
        quiet[major == ["normal"]] += [not stated]
        sides += [pair for label in stated & marked for pair in compared_sides(label, text, major)]
    counts = "stated" if doubtful else "not stated"
    lines = [f"{len(pairs)} reports, {part}; what is uncertain counts as {counts}", ""]
    normal = f"{sum(quiet[True])} of {len(quiet[True])} annotated `normal` state none of these"
    same = (
        f"{sum(a == b for a, b in sides)} of {len(sides)} found with a marked side have that side"
    )
    return "\n".join([*lines, *scores(*counted(pairs, str)), "", normal, same])


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    drawn = kinds.add_parser("phantom")
    drawn.add_argument("--count", type=int, default=1000)
    real = kinds.add_parser("openi")
    real.add_argument("--archive", type=Path, required=True)
    real.add_argument("--part", choices=("held out", "development"), default="held out")
    real.add_argument("--doubtful", action="store_true", help="uncertain counts as stated")
    given = parser.parse_args()
    if given.kind == "phantom":
        print(phantom(given.count))
    else:
        print(openi(given.archive, given.part, given.doubtful))


if __name__ == "__main__":
    main()
