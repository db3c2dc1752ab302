"""Phantom radiographs: image, masks, boxes, labels and patients agree."""

import dataclasses

import numpy as np
import pytest
from records import are_equal

from plan_jax.data import phantom
from plan_jax.data.builders.phantom import PhantomConfig
from plan_jax.data.phantom import Difficulty, draw_study, rendering, report_text
from plan_jax.data.phantom.anatomy import ANATOMY, SIDES, ZONES, draw_patient
from plan_jax.types import Record, UserError


@pytest.fixture(scope="module")
def studies() -> list[Record]:
    return [draw_study(11, index) for index in range(100)]


def test_a_record_has_the_documented_shapes(studies):
    for record in studies[:20]:
        assert record.image.shape == (96, 96, 1) and record.image.dtype == np.uint8
        assert record.labels.shape == (len(phantom.FINDINGS),) and record.labels.dtype == np.int8
        assert tuple(record.anatomy) == ANATOMY
        masks = [phrase.mask for phrase in record.phrases] + list(record.anatomy.values())
        assert all(mask.shape == (96, 96) and mask.dtype == bool for mask in masks)


def test_drawing_is_a_pure_function():
    assert all(are_equal(draw_study(5, i), draw_study(5, i)) for i in (0, 7, 4))
    assert not np.array_equal(draw_study(5, 0).image, draw_study(6, 0).image)
    assert not np.array_equal(draw_study(5, 0).image, draw_study(5, 1).image)


def test_every_kind_and_every_number_of_findings_occurs(studies):
    assert {len(record.phrases) for record in studies} == {0, 1, 2, 3, 4}
    assert np.all(sum(record.labels.astype(int) for record in studies) > 0)


def test_labels_phrases_masks_and_boxes_agree(studies):
    for record in studies:
        present = {phantom.FINDINGS[i] for i in np.flatnonzero(record.labels)}
        assert present == {phrase.bare for phrase in record.phrases}
        assert len({phrase.key for phrase in record.phrases}) == len(record.phrases)
        for phrase in record.phrases:
            kind, side, zone = phrase.key.split("|")
            mask = phrase.mask
            assert phantom.FINDINGS[phrase.finding] == phrase.bare == kind
            assert phrase.text.startswith(kind) and side in phrase.text and zone in phrase.text
            assert mask.sum() >= 8
            covered = np.zeros_like(mask)
            for box in phrase.boxes:
                x0, y0, x1, y1 = map(int, box)
                assert mask[y0, x0:x1].any() and mask[y1 - 1, x0:x1].any()
                assert mask[y0:y1, x0].any() and mask[y0:y1, x1 - 1].any()
                covered[y0:y1, x0:x1] = True
            assert not (mask & ~covered).any()


def test_findings_lie_where_their_phrases_say(studies):
    for record in studies:
        for phrase in record.phrases:
            kind, side, zone = phrase.key.split("|")
            region = None
            if zone:
                region = record.anatomy[f"{side} {zone} zone"]
            elif kind in ("pleural effusion", "pneumothorax"):
                region = record.anatomy[f"{side} lung"]
            elif kind == "cardiomegaly":
                assert np.array_equal(phrase.mask, record.anatomy["heart"])
            elif kind == "pulmonary oedema":
                region = record.anatomy["right lung"] | record.anatomy["left lung"]
            if region is not None:
                assert (phrase.mask & region).sum() >= 0.7 * phrase.mask.sum(), phrase.key


def render_without(index, omitted):
    """Returns all findings of a study, and the masks and the noiseless image without one of them.

    Every image has the same anatomy, position and exposure.
    """
    patient = draw_patient(np.random.default_rng((11, phantom.patient_and_study(index)[0])))
    rng, findings, _, _ = phantom.write_report(11, index)
    drawn = [finding for i, finding in enumerate(findings) if i != omitted]
    scene = phantom._position_patient(rng, patient, drawn, 96)
    masks = [rendering.render_finding(scene, finding) for finding in drawn]
    return findings, masks, phantom._expose_film(scene, rng, 0).astype(float)


@pytest.mark.parametrize("index", range(0, 40, 2))
def test_omitting_a_finding_changes_the_image_inside_its_mask(index):
    findings, masks, image = render_without(index, None)
    for i, finding in enumerate(findings):
        change = np.abs(image - render_without(index, i)[2])
        if finding.kind == "cardiomegaly":  # the heart is always there; only its rim is new
            assert np.sum(change[masks[i]] > 10) > 60
        else:
            assert change[masks[i]].mean() > max(8, 5 * change[~masks[i]].mean()), finding


def test_the_patient_s_right_is_on_the_image_s_left(studies):
    for record in studies[:20]:
        columns = [np.nonzero(record.anatomy[f"{side} lung"])[1] for side in ("right", "left")]
        assert columns[0].mean() < 40 and columns[1].mean() > 56
        heart = np.nonzero(record.anatomy["heart"])[1]
        middle = (columns[0].mean() + columns[1].mean()) / 2
        assert np.mean(heart > middle) > 0.5  # most of the heart lies to the patient's left
        for phrase in record.phrases:
            side = phrase.key.split("|")[1]
            if side and phrase.bare != "pacemaker":
                assert (np.nonzero(phrase.mask)[1].mean() < 48) == (side == "right")


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
        resized, reference = draw_study(11, index, size=size), studies[index]
        assert resized.image.shape == (size, size, 1)
        assert (resized.text, resized.triplets) == (reference.text, reference.triplets)
        for a, b in zip(resized.phrases, reference.phrases, strict=True):
            assert a.text == b.text and a.mask.any()
            if b.mask.sum() > 150 and size > 50 and a.bare != "pacemaker":
                assert abs(a.mask.mean() / b.mask.mean() - 1) < 0.25


def test_difficulty_changes_findings_reports_and_noise():
    plain = Difficulty(findings=("nodule", "pacemaker"), filler=0, negated=0, hedged=0, noise=0)
    for index in range(20):
        record = draw_study(2, index, 32, plain)
        assert record.labels.shape == (2,)
        assert all(phrase.bare == plain.findings[phrase.finding] for phrase in record.phrases)
        assert not any(f"{line.capitalize()}." in record.text for line in report_text.FILLER[1:])
        assert all(existence >= 0 for _, _, existence in record.triplets)
    empty = [draw_study(2, i, 32, Difficulty(max_findings=0)) for i in range(20)]
    assert not any(record.phrases or record.labels.any() for record in empty)
    noiseless, noisy = (
        draw_study(2, 0, 96, Difficulty(noise=noise)).image.astype(int) for noise in (0, 3)
    )
    roughness = [np.abs(np.diff(image, axis=1)).mean() for image in (noiseless, noisy)]
    assert roughness[1] > 1.3 * roughness[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"findings": ("nodules",)}, "finding 'nodules' is unknown; use some of consolidation"),
        ({"findings": ()}, "findings .* is empty; name at least one"),
        ({"findings": ("nodule", "nodule")}, "findings .* repeats a kind; name each once"),
        ({"max_findings": 5}, "max_findings 5 is out of range; use 0 to 4"),
        ({"noise": -1.0}, "noise -1.0 is negative; use 0 or more"),
        ({"filler": -0.1}, "filler -0.1 is negative; use 0 or more"),
        ({"hedged": 1.5}, "hedged 1.5 is not a share; use 0 to 1"),
        ({"vague": -0.5}, "vague -0.5 is not a share; use 0 to 1"),
    ],
)
def test_wrong_difficulty_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Difficulty(**wrong)
    with pytest.raises(UserError, match=message):
        PhantomConfig(name="x", **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed -1 is negative; use 0 or more"),
        ({"index": -1}, "index -1 is negative; use 0 or more"),
        ({"size": 16}, "size 16 is too small for a chest; use 32 or more"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        draw_study(**({"seed": 0, "index": 0} | wrong))


def test_patients_have_one_anatomy_and_one_split():
    studies_of_patients = [phantom.patient_and_study(i) for i in range(5)]
    assert studies_of_patients == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    patients = [draw_study(0, i, 32).patient_id for i in range(3)]
    assert patients[0] == patients[1] != patients[2]
    a, b = (draw_patient(np.random.default_rng((0, 4))) for _ in range(2))
    for field in dataclasses.fields(a):
        assert np.all(getattr(a, field.name) == getattr(b, field.name))
    ranges = [phantom.split_range(split, 100) for split in phantom.SPLITS]
    train, val, test = ({phantom.patient_and_study(i)[0] for i in indices} for indices in ranges)
    assert not (train & val or train & test or val & test)
    last = phantom.patient_and_study(phantom.split_range("train", phantom.SPLIT_SIZE)[-1])
    assert last[0] < phantom.patient_and_study(phantom.split_range("val", 1)[0])[0]
    with pytest.raises(UserError, match="train count 3000001 is out of range; use 0 to 3000000"):
        phantom.split_range("train", phantom.SPLIT_SIZE + 1)
