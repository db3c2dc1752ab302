"""Phantom radiographs: what is drawn, what is written and what is claimed agree."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from plan_jax.data import dataset as datasets
from plan_jax.data import phantom
from plan_jax.data.builders import phantom as builder
from plan_jax.data.phantom import Difficulty, draw, report_text
from plan_jax.data.phantom import findings as phantom_findings
from plan_jax.data.phantom.anatomy import ANATOMY, new_patient
from plan_jax.types import Record, UserError

SIDES, ZONES = ("right", "left"), ("upper", "mid", "lower")


@pytest.fixture(scope="module")
def studies() -> list[Record]:
    return [draw(11, i) for i in range(100)]


def same(a: Record, b: Record) -> bool:
    """Whether two records agree in everything, bit for bit."""
    truth = all(
        (x.text, x.key, x.bare, x.finding, x.boxes) == (y.text, y.key, y.bare, y.finding, y.boxes)
        and np.array_equal(x.mask, y.mask)
        for x, y in zip(a.phrases, b.phrases, strict=True)
    )
    regions = all(np.array_equal(a.anatomy[name], b.anatomy[name]) for name in ANATOMY)
    plain = (a.text, a.patient_id, a.triplets) == (b.text, b.patient_id, b.triplets)
    return plain and truth and regions and np.array_equal(a.image, b.image)


def test_a_record_has_the_promised_shapes(studies):
    for record in studies[:20]:
        assert record.image.shape == (96, 96, 1) and record.image.dtype == np.uint8
        assert record.labels.shape == (len(phantom.FINDINGS),) and record.labels.dtype == np.int8
        assert tuple(record.anatomy) == ANATOMY
        masks = [p.mask for p in record.phrases] + list(record.anatomy.values())
        assert all(mask.shape == (96, 96) and mask.dtype == bool for mask in masks)


def test_drawing_is_a_pure_function():
    assert all(same(draw(5, i), draw(5, i)) for i in (0, 7, 4))
    assert not np.array_equal(draw(5, 0).image, draw(6, 0).image)
    assert not np.array_equal(draw(5, 0).image, draw(5, 1).image)


def test_every_kind_and_every_number_of_findings_occurs(studies):
    assert {len(record.phrases) for record in studies} == {0, 1, 2, 3, 4}
    assert np.all(sum(record.labels.astype(int) for record in studies) > 0)


def test_labels_phrases_masks_and_boxes_agree(studies):
    for record in studies:
        present = {phantom.FINDINGS[i] for i in np.flatnonzero(record.labels)}
        assert present == {p.bare for p in record.phrases}
        assert len({p.key for p in record.phrases}) == len(record.phrases)
        for p in record.phrases:
            kind, side, zone = p.key.split("|")
            assert phantom.FINDINGS[p.finding] == p.bare == kind
            assert p.text.startswith(kind) and side in p.text and zone in p.text
            assert p.mask.sum() >= 8
            covered = np.zeros_like(p.mask)
            for x0, y0, x1, y1 in map(lambda box: map(int, box), p.boxes):
                assert p.mask[y0, x0:x1].any() and p.mask[y1 - 1, x0:x1].any()
                assert p.mask[y0:y1, x0].any() and p.mask[y0:y1, x1 - 1].any()
                covered[y0:y1, x0:x1] = True
            assert not (p.mask & ~covered).any()


def test_findings_lie_where_their_phrases_say(studies):
    for record in studies:
        for p in record.phrases:
            kind, side, zone = p.key.split("|")
            inside = None
            if zone:
                inside = record.anatomy[f"{side} {zone} zone"]
            elif kind in ("pleural effusion", "pneumothorax"):
                inside = record.anatomy[f"{side} lung"]
            elif kind == "cardiomegaly":
                assert np.array_equal(p.mask, record.anatomy["heart"])
            elif kind == "pulmonary oedema":
                inside = record.anatomy["right lung"] | record.anatomy["left lung"]
            if inside is not None:
                assert (p.mask & inside).sum() >= 0.7 * p.mask.sum(), p.key


def test_every_finding_can_be_seen(studies):
    """Leave one finding out: the picture changes inside its mask by far more than outside."""
    for index in range(0, 40, 2):
        patient = new_patient(np.random.default_rng((11, phantom.patient_of(index)[0])))

        def render(skip, index=index, patient=patient):
            rng, planned, _, _ = phantom.report(11, index)
            kept = [f for i, f in enumerate(planned) if i != skip]
            scene = phantom._scene(rng, patient, kept, 96)
            masks = [phantom_findings.paint(scene, f) for f in kept]
            return planned, masks, phantom._expose(scene, rng, 0).astype(float)

        planned, masks, image = render(None)
        for i, finding in enumerate(planned):
            change = np.abs(image - render(i)[2])
            if finding.kind == "cardiomegaly":  # only its rim is new
                assert np.sum(change[masks[i]] > 10) > 60
            else:
                assert change[masks[i]].mean() > max(8, 5 * change[~masks[i]].mean()), finding


def test_right_is_on_the_image_left(studies):
    for record in studies[:20]:
        columns = [np.nonzero(record.anatomy[f"{side} lung"])[1] for side in SIDES]
        assert columns[0].mean() < 40 and columns[1].mean() > 56
        heart = np.nonzero(record.anatomy["heart"])[1]
        middle = (columns[0].mean() + columns[1].mean()) / 2
        assert np.mean(heart > middle) > 0.5  # most of the heart lies to the patient's left
        for p in record.phrases:
            side = p.key.split("|")[1]
            if side and p.bare != "pacemaker":
                assert (np.nonzero(p.mask)[1].mean() < 48) == (side == "right")


def test_zones_are_the_thirds_of_the_lungs(studies):
    for record in studies[:10]:
        for side in SIDES:
            zones = np.stack([record.anatomy[f"{side} {zone} zone"] for zone in ZONES])
            assert np.array_equal(zones.sum(0), record.anatomy[f"{side} lung"])
            heights = [np.nonzero(zone)[0].mean() for zone in zones]
            assert heights == sorted(heights)


@pytest.mark.parametrize("size", [32, 57, 160])
def test_any_resolution_shows_the_same_study(studies, size):
    for index in range(15):
        small, known = draw(11, index, size=size), studies[index]
        assert small.image.shape == (size, size, 1)
        assert (small.text, small.triplets) == (known.text, known.triplets)
        for a, b in zip(small.phrases, known.phrases, strict=True):
            assert a.text == b.text and a.mask.any()
            if b.mask.sum() > 150 and size > 50 and a.bare != "pacemaker":
                assert abs(a.mask.mean() / b.mask.mean() - 1) < 0.25


# What a reader finds in a report, by rules of their own.
NORMAL_MEANS = {
    "heart size is normal": ("cardiomegaly",),
    "normal cardiac silhouette": ("cardiomegaly",),
    "pulmonary vasculature is normal": ("pulmonary oedema",),
    "clear": ("consolidation", "nodule"),
    "no active disease of the lungs": ("consolidation", "nodule"),
    "costophrenic angle is sharp": ("pleural effusion",),
}
DOUBT = ("possible", "may be", "cannot be excluded", "suspected")


def kinds_in(part: str) -> list[str]:
    """Kinds that a part of a sentence names, by the longest synonym."""
    found = []
    names = [(name, kind) for kind, all_of in report_text.NAMES.items() for name, _ in all_of]
    for name, kind in sorted(names, key=lambda pair: -len(pair[0])):
        if re.search(rf"\b{name}\b", part):
            found.append(kind)
            part = re.sub(rf"\b{name}\b", "", part)
    return found


def claims_in(sentence: str) -> set[tuple[str, str, int]]:
    """Triplets that one sentence of a report states."""
    sentence = sentence.lower().rstrip(".")
    side = next((s for s in SIDES if f" {s} " in f" {sentence} "), "")
    zone = next((z for z in ZONES if f" {z} " in f" {sentence} "), "")
    everywhere = {"cardiomegaly": "heart", "pacemaker": "chest"}
    for words, kinds in NORMAL_MEANS.items():
        if words in sentence:
            region = f"{side} {zone} zone" if zone else f"{side} lung" if side else "both lungs"
            return {(everywhere.get(kind, region), kind, 0) for kind in kinds}
    stated, _, without = sentence.partition(" without ")
    denied = kinds_in(without)
    if re.match(r"(no|there is no|there are no)\b", stated):
        stated, denied = "", denied + kinds_in(stated)
    claims = {(everywhere.get(kind, "both lungs"), kind, 0) for kind in denied}
    if "enlarged" in stated:
        claims.add(("heart", "cardiomegaly", 1))
    sided = stated.replace("both lungs", "").replace("pleural effusion", "effusion")
    for kind in kinds_in(re.sub(rf"\b({side or 'x'}) (?=pleural|effusion)", "", sided)):
        nowhere = "both lungs" if kind == "pulmonary oedema" else "chest"
        lung = f"{side} lung" if side else nowhere
        region = f"{side} chest".strip() if kind == "pacemaker" else everywhere.get(kind, lung)
        region = f"{side} {zone} zone" if zone else region
        claims.add((region, kind, -1 if any(word in stated for word in DOUBT) else 1))
    return claims


def test_triplets_are_exactly_what_the_report_states(studies):
    for record in studies:
        read = [claims_in(sentence) for sentence in re.split(r"(?<=\.) ", record.text)]
        assert set().union(*read) == set(record.triplets), record.text
        assert len(set(record.triplets)) == len(record.triplets)


def test_reports_mention_what_is_there_and_deny_only_what_is_not(studies):
    for record in studies:
        stated = [kind for _, kind, existence in record.triplets if existence]
        assert sorted(stated) == sorted(p.bare for p in record.phrases), record.text
        for region, kind, existence in record.triplets:
            there = [p for p in record.phrases if p.bare == kind]
            if existence == 0 and region in ("both lungs", "heart", "chest"):
                assert not there
            elif existence == 0:
                side, zone = region.split()[0], region.split()[1]
                zone = "" if zone == "lung" else zone
                assert not [p for p in there if p.key in (f"{kind}|{side}|{zone}", f"{kind}||")]


def test_reports_read_well():
    reports = [phantom.report(4, i)[2:] for i in range(600)]
    words = [len(text.split()) for text, _ in reports]
    assert 30 <= np.mean(words) <= 40 and max(words) <= 70 and min(words) >= 3
    assert len({text for text, _ in reports}) > 580
    for text, _ in reports:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | \.|[{}]", text.lower()), text
        assert all(re.fullmatch(r"[A-Z][a-z ]+\.", s) for s in re.split(r"(?<=\.) ", text)), text
    existence = [e for _, triplets in reports for _, _, e in triplets if e]
    assert 0.05 < np.mean(np.array(existence) == -1) < 0.15


def test_difficulty_does_what_it_says():
    plain = Difficulty(findings=("nodule", "pacemaker"), filler=0, negated=0, hedged=0, noise=0)
    for index in range(20):
        record = draw(2, index, 32, plain)
        assert record.labels.shape == (2,)
        assert all(p.bare == plain.findings[p.finding] for p in record.phrases)
        assert not any(f"{line.capitalize()}." in record.text for line in report_text.FILLER[1:])
        assert all(existence >= 0 for _, _, existence in record.triplets)
    empty = [draw(2, i, 32, Difficulty(max_findings=0)) for i in range(20)]
    assert not any(record.phrases or record.labels.any() for record in empty)
    calm, noisy = (draw(2, 0, 96, Difficulty(noise=noise)).image.astype(int) for noise in (0, 3))
    assert np.abs(np.diff(noisy, axis=1)).mean() > 1.3 * np.abs(np.diff(calm, axis=1)).mean()
    hedged = [phantom.report(2, i, Difficulty(hedged=1)) for i in range(60)]
    for _, findings, _, triplets in hedged:
        subtle = [f.kind for f in findings if f.level == 0 and f.kind != "pacemaker"]
        assert sorted(subtle) == sorted(kind for _, kind, existence in triplets if existence == -1)
    for share in (0, 1):
        vague = [phantom.report(2, i, Difficulty(vague=share)) for i in range(60)]
        sided = [len([f for f in findings if f.side]) for _, findings, _, _ in vague]
        placed = [
            len([1 for where, _, existence in triplets if existence and where.split()[0] in SIDES])
            for _, _, _, triplets in vague
        ]
        assert placed == ([0] * 60 if share else sided)


@pytest.mark.parametrize(
    "wrong",
    [
        {"findings": ("nodules",)},
        {"findings": ()},
        {"findings": ("nodule", "nodule")},
        {"max_findings": 5},
        {"noise": -1.0},
        {"filler": -0.1},
        {"hedged": 1.5},
        {"vague": -0.5},
    ],
)
def test_wrong_difficulty_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).rstrip("s")):
        Difficulty(**wrong)
    with pytest.raises(UserError):
        builder.PhantomConfig(name="x", **wrong)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"index": -1}, {"size": 16}])
def test_wrong_draw_is_named(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        draw(**({"seed": 0, "index": 0} | wrong))


def test_patients_have_one_anatomy_and_one_split():
    assert [phantom.patient_of(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert draw(0, 0, 32).patient_id == draw(0, 1, 32).patient_id != draw(0, 2, 32).patient_id
    a, b = (new_patient(np.random.default_rng((0, 4))) for _ in range(2))
    assert all(np.all(getattr(a, f.name) == getattr(b, f.name)) for f in dataclasses.fields(a))
    ranges = [phantom.split_range(split, 100) for split in phantom.SPLITS]
    train, val, test = ({phantom.patient_of(i)[0] for i in indices} for indices in ranges)
    assert not (train & val or train & test or val & test)
    last = phantom.patient_of(phantom.split_range("train", phantom.SPLIT_SIZE)[-1])
    assert last[0] < phantom.patient_of(phantom.split_range("val", 1)[0])[0]
    with pytest.raises(UserError, match="train count 3000001"):
        phantom.split_range("train", phantom.SPLIT_SIZE + 1)


CONFIG = {"seed": 9, "size": 48, "train": 7, "val": 4, "test": 5}


def test_builder_stores_what_is_drawn(tmp_path):
    for split in phantom.SPLITS:
        dataset = datasets.open_dataset("phantom", split, data_dir=str(tmp_path), **CONFIG)
        assert len(dataset) == CONFIG[split]
        assert dataset.findings == phantom.FINDINGS and dataset.anatomy_names == ANATOMY
        for i, index in enumerate(phantom.split_range(split, CONFIG[split])):
            assert same(dataset[i], draw(9, index, 48))


def test_other_processes_draw_the_same():
    job, indices = (9, 48, Difficulty()), phantom.split_range("val", 40)
    apart = list(builder._draw_apart(job, indices, processes=2))
    here = list(builder._draw(job, indices))
    assert len(apart) == len(here) == 40
    for a, b in zip(apart, here, strict=True):
        assert a["image"].getvalue() == b["image"].getvalue() and a["text"] == b["text"]
        assert np.array_equal(a["masks"], b["masks"]) and a["triplets"] == b["triplets"]


def test_a_killed_preparation_is_not_taken_for_whole(tmp_path):
    config = {"seed": 1, "size": 32, "train": 150, "val": 1, "test": 1}
    code = f"from plan_jax.data import dataset as r; r.open_dataset('phantom', 'train', **{config},"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code} data_dir={str(tmp_path)!r})"],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("phantom/*/incomplete.*/*")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("phantom/*/1.0.0/dataset_info.json"))
    dataset = datasets.open_dataset("phantom", "train", data_dir=str(tmp_path), **config)
    assert len(dataset) == 150 and same(dataset[149], draw(1, 149, 32))
