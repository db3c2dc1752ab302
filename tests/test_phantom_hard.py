"""Hard phantoms: the standard level is untouched; subtle findings, distractors, turned films."""

import hashlib

import numpy as np
import pytest
from records import are_equal
from scipy.ndimage import binary_dilation

from plan_jax.command.config_files import load_config_file
from plan_jax.config import Config
from plan_jax.data import phantom, preparation
from plan_jax.data.builders.phantom import PhantomConfig
from plan_jax.data.phantom import Difficulty, distractors, draw_study, rendering, report_text
from plan_jax.data.phantom.anatomy import draw_patient
from plan_jax.data.tokenizer import load_tokenizer, tokenize
from plan_jax.tasks.grounding_targets import collect_targets, fit_priors, null_maps
from plan_jax.types import UserError

HARD = Difficulty(hard=True)
COUNT = 60
# (seed, index) -> hash of what is written, pixels [8::16, 8::16], and sizes of the masks, all from
# before there was a second level. All kinds of findings occur.
STANDARD = {
    (0, 2): (
        "4d3b6c37563abdb4",
        "0e9ba89d8766811a695484865132afaf2491493ab9c2ac7b4042cbb433815aabbebec0a2",
        (1319, 451, 32),
    ),
    (5, 0): (
        "15c582ae4e7feee8",
        "9fa9bac6a3318a293c4c22a59017514f298d8f25c5c3d78c8ccad6d9d480acc1caccc69c",
        (462, 78, 21),
    ),
    (11, 21): (
        "e6aaae000520be81",
        "8da9dac0c29ca716ca2fe0289d43d6ba96288e57c8dd4b2893c9cbdaca8ab3bfd2cbc9b0",
        (469, 820, 42, 195),
    ),
}


@pytest.fixture(scope="module")
def studies():
    return [draw_study(11, index, 96, HARD) for index in range(COUNT)]


@pytest.mark.parametrize(("seed", "index"), STANDARD)
def test_the_standard_level_is_what_it_was(seed, index):
    digest, pixels, sizes = STANDARD[seed, index]
    record = draw_study(seed, index)
    written = repr((record.text, record.triplets, record.labels.tolist()))
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == digest
    # Processors round exponentials differently, so a grey value may differ by one and a mask by a
    # pixel or two; another draw would change the noise of every pixel by several grey values.
    before = np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(6, 6).astype(int)
    assert abs(record.image[8::16, 8::16, 0] - before).max() <= 1
    masks = [phrase.mask.sum() for phrase in record.phrases]
    assert len(masks) == len(sizes) and abs(np.subtract(masks, sizes)).max() <= 2


def test_records_of_the_standard_level_stay_prepared():
    folders = [
        preparation._hash_builder_config(PhantomConfig(name="", **fields))
        for fields in ({}, {"difficulty": "standard"}, {"train": 12288}, {"difficulty": "hard"})
    ]
    assert folders[:3] == ["db66425a651f", "db66425a651f", "5ab1f2b95a02"]
    assert folders[3] not in folders[:3]


def test_an_unknown_difficulty_is_refused():
    with pytest.raises(UserError, match="difficulty 'hrad' is unknown; use standard or hard"):
        PhantomConfig(name="", difficulty="hrad")
    with pytest.raises(UserError, match="difficulty 'hrad' is unknown; use standard or hard"):
        load_config_file("phantom:hrad")


def test_a_hard_phantom_is_a_pure_function(studies):
    assert all(are_equal(draw_study(11, i, 96, HARD), studies[i]) for i in (0, 7, 4))
    assert not np.array_equal(draw_study(11, 0).image, studies[0].image)
    assert not np.array_equal(draw_study(12, 0, 96, HARD).image, studies[0].image)
    small = draw_study(11, 3, 48, HARD)
    assert (small.text, small.triplets) == (studies[3].text, studies[3].triplets)


def test_findings_are_smaller_and_fainter_and_overlap():
    overlapping = {False: 0, True: 0}
    for hard in (False, True):
        for index in range(150):
            findings = phantom.write_report(11, index, Difficulty(hard=hard))[1]
            assert all((finding.size < 1) == hard for finding in findings)
            assert all(2 / 3 <= finding.size <= 1 for finding in findings)
            assert all(0.5 <= finding.contrast <= 0.7 for finding in findings if hard)
            zones = [(finding.side, finding.zone) for finding in findings if finding.zone]
            overlapping[hard] += len(set(zones)) < len(zones)
    assert overlapping[False] == 0 and overlapping[True] > 3


def render_parts(index, omitted=None, turn=None):
    """Returns the findings, their masks, the scene and the film, without noise and distractors."""
    patient = draw_patient(np.random.default_rng((11, phantom.patient_and_study(index)[0])))
    rng, findings, _, _ = phantom.write_report(11, index, HARD)
    drawn = [finding for i, finding in enumerate(findings) if i != omitted]
    film = phantom.Film(turn=0.05 if turn is None else turn)
    scene = phantom._position_patient(rng, patient, drawn, 96, film)
    masks = [rendering.render_finding(scene, finding) for finding in drawn]
    return findings, masks, scene, phantom._expose_film(scene, rng, 0, film).astype(float)


@pytest.mark.parametrize("index", range(0, 40, 2))
def test_omitting_a_hard_finding_changes_the_image_inside_its_mask(index):
    findings, masks, _, image = render_parts(index)
    for i, finding in enumerate(findings):
        change = np.abs(image - render_parts(index, i)[3])
        if finding.kind == "cardiomegaly":  # the heart is always there; only its rim is new
            assert np.sum(change[masks[i]] > 10) > 20
        else:
            assert change[masks[i]].mean() > max(4, 5 * change[~masks[i]].mean()), finding


def centre(mask):
    return np.argwhere(mask).mean(0)


def test_masks_and_anatomy_turn_with_the_patient():
    num_masks = 0
    for index in range(12):
        turned = []
        for turn in (-0.1, 0.1):
            findings, masks, scene, _ = render_parts(index, turn=turn)
            anatomy = phantom.segment_anatomy(scene.chest)
            masks = [mask for mask, f in zip(masks, findings, strict=True) if f.kind != "pacemaker"]
            parts = [*masks, anatomy["right lung"], anatomy["left lower zone"]]
            turned.append([centre(mask) - centre(anatomy["left lung"]) for mask in parts])
        for before, after in zip(*turned, strict=True):
            if np.hypot(*before) > 15:  # nearer, a pixel is too large an angle
                angles = [np.arctan2(*offset) for offset in (before, after)]
                angle = np.angle(np.exp(1j * (angles[1] - angles[0])))
                assert abs(angle - 0.2) < 0.06
                num_masks += 1
    assert num_masks > 24


def test_findings_stand_out_from_their_surroundings_on_turned_films(studies):
    contrasts = {}
    for record in studies:
        lungs = record.anatomy["right lung"] | record.anatomy["left lung"]
        covered = np.any([phrase.mask for phrase in record.phrases], 0) if record.phrases else lungs
        for phrase in record.phrases:
            ring = binary_dilation(phrase.mask, iterations=6) & lungs & ~covered
            if ring.any():
                image = record.image[..., 0]
                contrast = image[phrase.mask].mean() - image[ring].mean()
                contrasts.setdefault(phrase.bare, []).append(contrast)
    assert set(contrasts) == set(phantom.FINDINGS)
    for kind, values in contrasts.items():
        sign = -1 if kind == "pneumothorax" else 1
        assert np.mean(np.sign(values) == sign) > 0.75 and sign * np.mean(values) > 3, kind


def test_oedema_has_a_box_in_each_lung(studies):
    num_oedema = 0
    for record in studies:
        for phrase in record.phrases:
            if phrase.bare == "pulmonary oedema":
                num_oedema += 1
                assert len(phrase.boxes) == 2
                for (x0, _, x1, _), lung in zip(phrase.boxes, ("right", "left"), strict=True):
                    inside = phrase.mask & record.anatomy[f"{lung} lung"]
                    columns = np.flatnonzero(inside.any(0))
                    assert (x0, x1) == (columns[0], columns[-1] + 1)
    assert num_oedema > 6


def test_distractors_lie_outside_of_masks_and_reports():
    words = set(" ".join(report_text.grammar_strings()).split())
    assert not words & {"skin", "fold", "nipple", "electrode", "wire", "button"}
    num_films = num_shown = 0
    for index in range(40):
        _, masks, scene, _ = render_parts(index)
        opacity = distractors.draw_distractors(np.random.default_rng(index), scene.chest, masks)
        assert opacity.dtype == np.float32 and opacity.min() >= 0
        covered = np.any(masks, 0) if masks else np.zeros(opacity.shape, bool)
        # What fades out, and several that do, are no more than a trace.
        assert opacity[covered].max(initial=0) <= 4 * distractors.VISIBLE_OPACITY
        num_films += 1
        num_shown += opacity.max() > 0.1
    assert 0.5 * num_films < num_shown < num_films


@pytest.mark.parametrize(
    "render",
    [
        distractors._render_skin_fold,
        distractors._render_button,
        lambda *args: distractors._render_nipple("left", 0.5, 0.5, 0.5, *args),
        lambda *args: distractors._render_lead("right", -0.5, *args),
    ],
    ids=("fold", "button", "nipple", "lead"),
)
def test_every_distractor_is_seen_where_it_belongs(render):
    scene = render_parts(0)[2]
    for seed in range(10):
        opacity = render(np.random.default_rng(seed), scene.chest)
        assert opacity.shape == scene.chest.x.shape and opacity.dtype == np.float32
        assert 0.08 < opacity.max() < 0.6 and opacity.min() >= 0
        # Small or thin, and not all over the film.
        assert 4 < (opacity > distractors.VISIBLE_OPACITY).sum() < 0.2 * opacity.size


def test_hard_reports_fit_into_the_config_for_them():
    data = Config.from_dict(load_config_file("phantom:hard")).data
    assert data.builder["difficulty"] == "hard"
    tokenizer = load_tokenizer("phantom")
    lengths = []
    for index in range(100):
        *_, text, _ = phantom.write_report(5, index, HARD)
        sentences = tokenizer.tokenize_sentences(text)
        limits = {"max_tokens": data.max_tokens, "max_words": data.max_words}
        assert len(tokenize(tokenizer, text, **limits).sentence_texts) == len(sentences)
        lengths.append(sum(len(sentence.word_id) for sentence in sentences))
    assert 65 < np.mean(lengths) < 85 and max(lengths) <= report_text.HARD_MAX_WORDS


def test_null_maps_of_hard_phantoms(studies):
    targets, skipped = collect_targets(studies[:20])
    assert targets and not skipped
    banks = null_maps(targets, fit_priors(studies[20:]), size=(96, 96), grid=(12, 12))
    assert set(banks) == {"random", "centre", "prior", "mean_finding", "mean_phrase"}
    truth = np.stack([target.truth for target in targets])
    heat = banks["mean_phrase"].maps[banks["mean_phrase"].index]
    assert heat[truth].mean() > 3 * heat[~truth].mean()
