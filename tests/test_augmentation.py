"""Augmentation moves boxes, masks, regions and names of sides with the image."""

import dataclasses
import math
from typing import get_args, get_type_hints

import chex
import numpy as np
import pytest
from fitted_heads import make_tower
from PIL import Image
from records import FINDINGS, REGION_NAMES, make_record
from task_runs import check_task, run_task

from configs import mgca, testing
from plan_jax import config as configs
from plan_jax.config import Config
from plan_jax.data import augmentation, loader, schema, transforms
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.augmentation import PRESETS, Augmentation, Draw
from plan_jax.data.dataset import Dataset
from plan_jax.data.records import open_records
from plan_jax.main import apply_overrides
from plan_jax.tasks import classification
from plan_jax.types import Model, Phrase, Record, UserError, read_column, select_records

SIZE = 64
GEOMETRIC = {
    "window": Augmentation(window=0.75),
    "area": Augmentation(area=(0.5, 0.9), aspect=(0.75, 1.33)),
    "flip": Augmentation(flip=1.0, swap_sides=True),
    "rotate": Augmentation(rotate=30.0),
    "translate": Augmentation(translate=0.2),
    "scale": Augmentation(scale=(0.7, 1.4)),
    "convirt": PRESETS["convirt"],
}


def make_rng(seed):
    return np.random.default_rng(seed)


def make_rectangle(shape, box):
    image = np.zeros((*shape, 1), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def bounding_box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def smooth_image(rows, columns):
    coarse = make_rng(0).integers(0, 256, (5, 5), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC))


# The warp -------------------------------------------------------------------------------------


def warp_literally(image, matrix, size):
    """Samples each output pixel by itself: black outside, linear between centres of pixels."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    rows, columns = image.shape
    output = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            x, y, _ = inverse @ [column + 0.5, row + 0.5, 1]
            if not (0 <= x < columns and 0 <= y < rows):
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                weight = (1 - abs(x - 0.5 - j)) * (1 - abs(y - 0.5 - i))
                # The outer half of a border pixel repeats it.
                pixel = image[np.clip(i, 0, rows - 1), np.clip(j, 0, columns - 1)]
                output[row, column] += weight * pixel
    return output


@pytest.mark.parametrize("name", GEOMETRIC)
def test_the_warp_is_that_of_a_literal_loop(name):
    image = smooth_image(20, 26)
    matrix = augmentation.draw(GEOMETRIC[name], image.shape, 24, make_rng(1)).matrix
    warped = augmentation.warp_image(image, matrix, 24)
    expected = warp_literally(image, matrix, 24)
    assert warped.dtype == np.uint8 and warped.any()
    np.testing.assert_allclose(warped, expected, atol=0.51)


def test_a_large_reduction_averages_all_pixels():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::4] = 200
    matrix = np.asarray([[0.25, 0, 0], [0, 0.25, 0]])
    assert set(augmentation.warp_image(stripes, matrix, 16).ravel()) == {50}


def test_the_window_of_mgca_is_a_crop_of_stored_pixels():
    image = make_rng(0).integers(0, 256, (256, 256, 1), dtype=np.uint8)
    corners = set()
    for seed in range(40):
        sample = augmentation.draw(PRESETS["mgca"], (256, 256), 224, make_rng(seed))
        left, top = (-sample.matrix[:, 2]).astype(int).tolist()
        crop = augmentation.warp_image(image, sample.matrix, 224)
        np.testing.assert_array_equal(crop, image[top : top + 224, left : left + 224])
        corners |= {left, top}
    assert min(corners) >= 0 and max(corners) <= 32 and len(corners) > 20


# Annotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("shape", [(96, 96), (100, 70)])
def test_a_drawn_rectangle_is_where_its_box_says(name, shape):
    box, num_inside = (30, 40, 52, 66), 0
    image = make_rectangle(shape, box)
    for seed in range(8):
        sample = augmentation.draw(GEOMETRIC[name], shape, SIZE, make_rng(seed))
        warped = augmentation.warp_image(image, sample.matrix, SIZE)[..., 0]
        (moved,) = augmentation.warp_boxes(np.asarray([box], np.float32), sample.matrix, SIZE)
        # Any light at all, because a sharp corner of a turned rectangle is faint.
        np.testing.assert_allclose(bounding_box(warped > 10), moved, atol=1.5)
        mask = augmentation.warp_mask(image[..., 0] > 0, sample.matrix, SIZE)
        np.testing.assert_array_equal(mask, warped >= 128)
        num_inside += bool((moved[:2] > 0).all() and (moved[2:] < SIZE).all())
    assert num_inside, "no rectangle was wholly inside, so nothing was compared"


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_point_follows_the_matrix(name):
    """The centre of light of a small dot is where the matrix maps the dot."""
    image = np.zeros((64, 64), np.uint8)
    image[30:33, 33:36] = 255
    matrix = augmentation.draw(GEOMETRIC[name], (64, 64), SIZE, make_rng(3)).matrix
    light = augmentation.warp_image(image, matrix, SIZE).astype(float)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    centre = [(light * columns).sum() / light.sum(), (light * rows).sum() / light.sum()]
    np.testing.assert_allclose(centre, matrix @ [34.5, 31.5, 1], atol=0.1)


def test_a_box_with_under_a_quarter_of_its_area_is_lost():
    boxes = np.asarray([[6.0, 0, 10, 4], [7.5, 0, 9.5, 4], [0, 0, 0, 0], [5, 5, 5, 8]])
    identity = np.asarray([[1.0, 0, 0], [0, 1, 0]])
    moved = augmentation.warp_boxes(boxes, identity, 8)
    assert moved.tolist() == [[6, 0, 8, 4], [7.5, 0, 8, 4], [0] * 4, [0] * 4]
    further = identity + [[0, 0, 0.1], [0, 0, 0]]
    assert not augmentation.warp_boxes(boxes, further, 8)[1].any()


def test_a_record_is_augmented_as_a_whole():
    mask = make_rectangle((40, 40), (4, 8, 12, 20))[..., 0] > 0
    record = Record(
        image=make_rectangle((40, 40), (4, 8, 12, 20)),
        text="Left effusion. Right lung is clear.",
        sections={"findings": "Left effusion."},
        labels=np.asarray([1, 0, -1], np.int8),
        phrases=(
            Phrase(
                "left effusion", 0, "effusion|left|", "effusion", ((4.0, 8.0, 12.0, 20.0),), mask
            ),
            Phrase("clear right lung", 1),
        ),
        anatomy={"left lung": mask, "heart": ~mask},
        triplets=(("left lung", "effusion", 1),),
        regions=np.asarray([[4, 8, 12, 20], [20, 2, 30, 9], [0, 0, 0, 0]], np.float32),
    )
    mirror = Augmentation(flip=1.0, swap_sides=True)
    names = ("left effusion", "right effusion", "oedema"), ("left_lung", "heart", "right_lung")
    mirrored = augmentation.augment_record(record, mirror, 40, make_rng(0), *names)
    assert mirrored.text == "Right effusion. Left lung is clear."
    assert mirrored.sections == {"findings": "Right effusion."}
    assert mirrored.labels.tolist() == [0, 1, -1]
    phrase = mirrored.phrases[0]
    assert (phrase.text, phrase.key, phrase.bare) == (
        "right effusion",
        "effusion|right|",
        "effusion",
    )
    assert phrase.finding == 1 and mirrored.phrases[1].finding == 0
    assert phrase.boxes == ((28.0, 8.0, 36.0, 20.0),)
    np.testing.assert_array_equal(phrase.mask, mask[:, ::-1])
    np.testing.assert_array_equal(mirrored.image, record.image[:, ::-1])
    assert list(mirrored.anatomy) == ["heart", "right lung"]
    np.testing.assert_array_equal(mirrored.anatomy["right lung"], mask[:, ::-1])
    assert mirrored.triplets == (("right lung", "effusion", 1),)
    # The box of the left lung is now that of the right lung.
    assert mirrored.regions.tolist() == [[0] * 4, [10, 2, 20, 9], [28, 8, 36, 20]]
    again = augmentation.augment_record(mirrored, mirror, 40, make_rng(0), *names)
    assert again.text == record.text and again.phrases[0].boxes == record.phrases[0].boxes
    np.testing.assert_array_equal(again.regions, record.regions)


def test_a_phrase_outside_the_view_keeps_its_words_without_a_place():
    mask = make_rectangle((40, 40), (0, 0, 4, 4))[..., 0] > 0
    phrase = Phrase("nodule", boxes=((0.0, 0.0, 4.0, 4.0), (10.0, 10.0, 30.0, 30.0)), mask=mask)
    record = Record(np.zeros((40, 40, 1), np.uint8), "nodule", phrases=(phrase,))
    for seed in range(20):
        zoom = Augmentation(area=(0.25, 0.25))
        (moved,) = augmentation.augment_record(record, zoom, 40, make_rng(seed), ()).phrases
        assert moved.text == "nodule"
        if moved.mask is None and len(moved.boxes) == 1:
            return
    raise AssertionError("no draw moved the small nodule out of the view")


def test_a_name_of_one_side_needs_its_counterpart():
    mirror = Augmentation(flip=1.0, swap_sides=True)
    message = "regions of the dataset have 'left lung' and not 'right lung', so no .*set .*flip=0"
    with pytest.raises(UserError, match=message):
        augmentation.augment_record(
            make_record(1), mirror, 24, make_rng(0), FINDINGS, ["left lung"] * 3
        )


# Grey values ----------------------------------------------------------------------------------


def test_brightness_and_contrast_follow_their_formulas():
    image = smooth_image(24, 24)
    sample = Draw(np.eye(2, 3), False, brightness=1.3, contrast=0.7, blur=0.0)
    bright = np.clip(image * 1.3, 0, 255)
    expected = np.clip(bright.mean() + 0.7 * (bright - bright.mean()), 0, 255)
    np.testing.assert_allclose(augmentation.change_grey(image, sample), expected, atol=0.51)
    as_it_was = sample._replace(brightness=1.0, contrast=1.0)
    assert augmentation.change_grey(image, as_it_was) is image


def test_the_blur_has_the_standard_deviation_that_was_drawn():
    image = np.zeros((65, 65), np.uint8)
    image[28:37, 28:37] = 255
    sample = Draw(np.eye(2, 3), False, 1.0, 1.0, blur=3.0)
    profile = augmentation.change_grey(image, sample).astype(float).sum(0)
    offsets = np.arange(65) - 32
    variance = (profile * offsets**2).sum() / profile.sum() - (9**2 - 1) / 12
    assert math.sqrt(variance) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_draws_cover_the_ranges_of_a_preset(name):
    preset = PRESETS[name]
    draws = [augmentation.draw(preset, (256, 200), 224, make_rng(seed)) for seed in range(400)]
    assert np.mean([sample.is_mirrored for sample in draws]) == pytest.approx(preset.flip, abs=0.08)
    factors = np.asarray([[sample.brightness, sample.contrast] for sample in draws]) - 1
    assert np.abs(factors).max() == pytest.approx(max(preset.brightness, 0), abs=0.02)
    has_jitter = (factors != 0).any(1).mean()
    expected = preset.jitter_probability if preset.brightness else 0
    assert has_jitter == pytest.approx(expected, abs=0.06)
    blurs = np.asarray([sample.blur for sample in draws])
    expected = preset.blur_probability if preset.blur[1] else 0
    assert (blurs > 0).mean() == pytest.approx(expected, abs=0.08)
    assert blurs.max() <= preset.blur[1] and (not expected or blurs[blurs > 0].min() >= 0.1)


# The loader -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    texts = ("Left lung is clear.", "Heart is normal.", "Right lung is clear.")
    records = [dataclasses.replace(make_record(n), text=texts[n % 3]) for n in range(12)]
    return Dataset(
        [schema.serialize(r) for r in records], FINDINGS, ("lung", "heart"), REGION_NAMES
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    words = "[PAD] [UNK] [CLS] [SEP] . left right lung heart is normal clear no effusion a b c d e"
    path.write_text("\n".join(words.split()) + "\n")
    return tokenization.load_tokenizer(str(path))


@pytest.fixture
def make_batches(dataset, tokenizer):
    iterators = []

    def make(**changes):
        options = dict(batch_size=4, size=24, max_tokens=16, max_words=10, seed=3)
        options["extra"] = ("labels", "regions", "region_words")
        iterators.append(loader.train_batches(dataset, tokenizer, **options | changes))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def test_batches_are_a_function_of_seed_and_position(make_batches):
    iterator = make_batches(augment=PRESETS["convirt"])
    batches = [next(iterator) for _ in range(4)]
    resumed = make_batches(augment=PRESETS["convirt"])
    resumed.set_state(iterator.get_state() | {"step": 2})
    for batch in batches[2:]:
        chex.assert_trees_all_equal(batch, next(resumed))
    seeded = next(make_batches(augment=PRESETS["convirt"], seed=4))
    assert not np.array_equal(batches[0].image, seeded.image)


def test_an_augmentation_changes_neither_order_nor_sentences(make_batches):
    plain, augmented = next(make_batches()), next(make_batches(augment=PRESETS["mgca"]))
    chex.assert_trees_all_equal(plain.text, augmented.text)
    np.testing.assert_array_equal(plain.extra["labels"], augmented.extra["labels"])
    grey = next(make_batches(augment=Augmentation(brightness=0.5)))
    np.testing.assert_array_equal(plain.extra["regions"], grey.extra["regions"])
    assert (plain.image != grey.image).any()


def test_a_mirrored_batch_is_that_of_mirrored_studies(make_batches):
    plain = next(make_batches(max_shift=0))
    mirrored = next(make_batches(augment=Augmentation(flip=1.0, swap_sides=True)))
    np.testing.assert_array_equal(plain.image[:, :, ::-1], mirrored.image)
    left, right = 5, 6  # of the vocabulary
    swapped = np.select([plain.text.tokens == left, plain.text.tokens == right], [right, left])
    expected = np.where(swapped > 0, swapped, plain.text.tokens)
    np.testing.assert_array_equal(mirrored.text.tokens, expected)
    assert (expected != plain.text.tokens).any()
    order = [2, 1, 0]  # of left lung, heart, right lung
    x0, y0, x1, y1 = np.moveaxis(plain.extra["regions"][:, order], -1, 0)
    is_real = (x1 > x0)[..., None]
    boxes = np.where(is_real, np.stack([1 - x1, y0, 1 - x0, y1], -1), 0)
    np.testing.assert_allclose(mirrored.extra["regions"], boxes, atol=1e-6)
    np.testing.assert_array_equal(
        mirrored.extra["region_words"], plain.extra["region_words"][:, order]
    )


def test_a_run_says_what_its_augmentation_does(dataset):
    mirror, turn = loader.describe_augmentation(dataset, PRESETS["convirt"], 24)
    assert mirror.startswith("50% of the images are mirrored; 8 of 12 sampled texts say left or")
    assert "of 24 sampled regions out of the image" in turn
    assert loader.describe_augmentation(dataset, Augmentation(), 24) == []
    (window,) = loader.describe_augmentation(dataset, Augmentation(window=0.2), 24)
    assert not window.startswith("the augmentation moves 0 ")


def test_regions_without_a_counterpart_are_refused_before_training(dataset, tokenizer):
    lopsided = Dataset(dataset.source, FINDINGS, region_names=("left lung", "heart", "spine"))
    options = dict(batch_size=4, size=24, max_tokens=16, max_words=10, seed=3)
    with pytest.raises(UserError, match="have 'left lung' and not 'right lung'"):
        loader.train_batches(
            lopsided, tokenizer, augment=PRESETS["convirt"], extra=("regions",), **options
        )
    iterator = loader.train_batches(lopsided, tokenizer, augment=PRESETS["convirt"], **options)
    assert next(iterator).image.any(), "a method that reads no regions needs no counterparts"
    iterator.close()


# Records that heads are fitted to ----------------------------------------------------------------


def test_augmented_copies_are_a_function_of_seed_record_and_copy(dataset):
    findings = ("left mass", "right mass")
    sided = Dataset(dataset.source, findings, ("lung", "heart"), REGION_NAMES)
    records = open_records(sided, None, 24)
    copies = records.augment("chexpert_moco", 3, seed=5)
    assert len(copies) == 36 and copies.shape == (24, 24)
    labels, texts = read_column(copies, "labels"), read_column(copies, "text")
    num_mirrored = 0
    for row in range(36):
        rng = make_rng((5, row % 12, row // 12))
        names = findings, REGION_NAMES
        stored = records.dataset[row % 12]
        expected = augmentation.augment_record(stored, PRESETS["chexpert_moco"], 24, rng, *names)
        np.testing.assert_array_equal(copies.read_image(row), expected.image)
        assert labels[row].tolist() == expected.labels.tolist() and texts[row] == expected.text
        num_mirrored += labels[row].tolist() != stored.labels.tolist()
    assert 8 < num_mirrored < 28
    part = select_records(copies, [30, 2])
    np.testing.assert_array_equal(part.read_image(0), copies.read_image(30))
    digests = [copies, part, records.augment("mgca", 3, 5), records.augment("chexpert_moco", 3, 6)]
    assert len({records.identify() for records in digests}) == 4
    with pytest.raises(UserError, match="'left mass' and not 'right mass'"):
        lopsided = Dataset(sided.source, ("left mass", "b"), sided.anatomy_names, REGION_NAMES)
        open_records(lopsided, None, 24).augment("convirt", 1, 0)


def test_a_head_is_fitted_to_augmented_copies(monkeypatch):
    random = make_rng(0)
    images = random.integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    records = [
        Record(image, "", str(n), np.int8([image.mean() > 128])) for n, image in enumerate(images)
    ]
    stored = open_records(Dataset([schema.serialize(r) for r in records], ("mass",)), None, 4)
    fits, fit_head = [], classification.fit_head

    def record_fit(loss, params, stats, train, *args, **options):
        fits.append(train)
        return fit_head(loss, params, stats, train, *args, **options)

    monkeypatch.setattr(classification, "fit_head", record_fit)
    model = Model("net", (2, 2), 0, 4, None, None, None, None, tower=make_tower())
    options = classification.Options(fractions=(0.5,), epochs=1, bootstrap_samples=2)
    options = dataclasses.replace(options, augment="mgca", augment_copies=3)
    parts = {"train": range(30), "val": range(30, 45), "test": range(45, 60)}
    splits = {split: stored.select(indices) for split, indices in parts.items()}
    metrics, _ = run_task(classification, model, splits, options, findings=("mass",))
    assert metrics["50/n_train"] == 15
    share = classification.draw_share(30, 0.5, 0)
    copies = splits["train"].augment("mgca", 3, 0)
    images = np.stack([copies.read_image(int(30 * c + n)) for c in range(3) for n in share])
    stages, _ = model.tower.apply(model.tower.variables, images)
    np.testing.assert_allclose(np.asarray(fits[0]["features"]), stages.pooled, atol=1e-5)
    assert (images[:15] != images[15:30]).any(), "the copies are of one draw"
    labels = read_column(splits["train"].select(share.tolist()), "labels")
    np.testing.assert_array_equal(fits[0]["labels"], np.tile(labels, (3, 1)) == 1)
    with pytest.raises(UserError, match="augment is 'mgca', and the records are in memory"):
        splits = {split: [records[i] for i in indices] for split, indices in parts.items()}
        check_task(classification, splits, options, findings=("mass",))


def test_the_presets_of_heads_are_those_of_training():
    choices = get_args(get_type_hints(classification.Options)["augment"])
    assert choices == ("", *PRESETS)


# The config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("name", "simclr", "use one of convirt, mgca, chexpert_moco, or '' for none"),
        ("flip", 0.5, "set config.data.augment.swap_sides=True .*, or flip=0"),
        ("window", 0.0, "use 0.1 to 1"),
        ("rotate", 181.0, "use 0 to 180"),
        ("area", (0.9, 0.6), "use two ascending numbers from 0.01 to 1"),
        ("blur", (-1.0, 2.0), "use two ascending numbers from 0 to 100"),
        ("scale", (1.0,), "must have 2 items"),
        ("brightness", True, "must be a number"),
    ],
)
def test_values_out_of_range_are_refused(field, value, remedy):
    with pytest.raises(UserError, match=rf"config\.data\.augment\.{field} is .*; .*{remedy}"):
        Config.from_dict({"data": {"augment": {field: value}}})


def test_a_preset_gives_the_fields_that_are_not_set():
    content = testing.get_config().to_dict()
    overrides = {"data.augment.name": "convirt", "data.augment.rotate": "5"}
    overrides["data.augment.area"] = "(0.8, 1)"
    augment = Config.from_dict(apply_overrides(content, overrides)).data.augment
    assert augment == dataclasses.replace(PRESETS["convirt"], rotate=5.0, area=(0.8, 1.0))
    assert Config.from_dict(content).data.augment == Augmentation()
    assert Config.from_dict(mgca.get_config().to_dict()).data.augment == PRESETS["mgca"]
    # A stored config keeps its values if a preset changes later.
    stored = Config.from_dict({"data": {"augment": {"name": "mgca"}}}).to_dict()
    assert stored["data"]["augment"]["window"] == 0.875


def test_a_window_needs_images_that_are_larger_than_it():
    content = {"name": "pairs", "size": 224, "builder": {"manifest": "m.csv", "size": 224}}
    config = Config.from_dict({"data": content | {"augment": {"name": "mgca"}}})
    configs.check_image_size(config)
    message = r"augment.window is 0.875; 224 pixels are cut from 256, .* at 224; .*builder.size=256"
    with pytest.raises(UserError, match=message):
        configs.check_image_size(config, is_training=True)


def test_without_an_augmentation_images_are_shifted_as_before(make_batches, dataset):
    batch = next(make_batches(max_shift=2))
    numbers = [int(image[12, 12, 0]) for image in batch.image]
    for position, number in enumerate(numbers):
        rng = make_rng((3, position))
        rng.permutation(1)  # of the sentences
        image = transforms.fit_image(dataset[number].image, 24)
        expected = {
            transforms.shift_image(image, down, right).tobytes()
            for down in range(-2, 3)
            for right in range(-2, 3)
        }
        assert batch.image[position].tobytes() in expected


@pytest.mark.parametrize(
    "names", [("left_lung", "Right lung"), ("LeftLung", "RightLung"), ("Lung_L", "Lung_R")]
)
def test_names_of_sides_are_told_in_each_spelling(names):
    values = np.asarray([3, 5])
    assert augmentation.have_sides(names, "regions")
    np.testing.assert_array_equal(augmentation.exchange_sides(values, names, "regions"), [5, 3])
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :, :3] = masks[1, :, 6:] = True
    record = Record(
        image=np.zeros((8, 8, 1), np.uint8),
        text="",
        patient_id="a",
        labels=np.zeros(0, np.int8),
        anatomy=dict(zip(names, masks, strict=True)),
    )
    mirror = Augmentation(flip=1.0, swap_sides=True)
    moved = augmentation.augment_record(record, mirror, 8, make_rng(0), ())
    assert list(moved.anatomy) == list(names)
    np.testing.assert_array_equal(moved.anatomy[names[0]], masks[1, :, ::-1])
    np.testing.assert_array_equal(moved.anatomy[names[1]], masks[0, :, ::-1])
