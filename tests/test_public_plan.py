"""The plan of a preparation: what is left out and why, splits without leaks, and the order."""

import hashlib

import pytest
import toy_films
from toy_films import make_row

from plan_jax.data.public import items
from plan_jax.data.public.items import Box, Item, Shape
from plan_jax.data.public.plan import make_plan
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash, count_leaks
from plan_jax.types import UserError


def plan_films(folder, rows, *, needs_images=True, **fields):
    """Writes films and returns their plan, and the folder with what was left out."""
    source_folder, parts = folder / "source", folder / "parts"
    toy_films.write(source_folder, rows)
    parts.mkdir(exist_ok=True)
    config = toy_films.ToyFilmsConfig(name="x", source=str(source_folder), **fields)
    source = SourceFolder(source_folder)
    builder = toy_films.ToyFilms(config=config, data_dir=folder / "data")
    items_of_table = builder.read_items(source)
    return make_plan(items_of_table, source, config, parts, needs_images=needs_images), source


def list_ids(plan):
    """Returns the ids of each split in the order of the records."""
    return {split: [item.image_id for item in plan.read_items(split)] for split in plan.offsets}


def test_an_item_survives_its_line(tmp_path):
    item = Item(
        image_id="a",
        image="a.png",
        labels={"effusion": -1},
        boxes=[Box((1.0, 2.0, 3.0, 4.0), "effusion", "left effusion", is_normalised=True)],
        shapes=[Shape("polygons", [[[0, 0], [4, 0], [4, 4]]], size=(9, 8))],
        anatomy={"heart": [Shape("file", "heart.png")]},
        regions={"left lung": (0.0, 1.0, 2.0, 3.0)},
        triplets=[("left lung", "effusion", 1)],
        shape=(7, 9),
    )
    restored = items.from_json(items.to_json(item))
    assert items.to_json(restored) == items.to_json(item)
    assert restored.boxes == item.boxes and restored.anatomy == item.anatomy


@pytest.mark.parametrize(
    ("field", "value"),
    [("view", "pa"), ("split", "valid"), ("labels", {"a": 2}), ("shapes", [Shape("rle", [])])],
)
def test_a_builder_cannot_set_a_field_to_anything(field, value):
    with pytest.raises(ValueError, match="is not one of"):
        Item(image_id="a", image="a.png", **{field: value})


def test_the_order_is_that_of_hashed_ids_whatever_the_order_of_rows(tmp_path):
    rows = [make_row(number, split="train") for number in range(20)]
    first = list_ids(plan_films(tmp_path, rows)[0])
    second = list_ids(plan_films(tmp_path, rows[::-1])[0])
    expected = sorted(
        (row["id"] for row in rows), key=lambda x: hashlib.sha256(x.encode()).digest()
    )
    assert first == second == {"train": expected}
    assert expected != [row["id"] for row in rows]


def test_what_is_left_out_has_a_reason(tmp_path):
    rows = [make_row(number) for number in range(16)]
    rows[1]["id"] = ""
    rows[3]["id"] = rows[2]["id"]
    rows[4]["view"] = "LATERAL"
    rows[5]["view"] = "UNKNOWN"
    rows[6]["split"] = "unused"
    source_folder = tmp_path / "source"
    (source_folder / "films").mkdir(parents=True)
    (source_folder / "films/7.png").touch()
    plan, source = plan_films(tmp_path, rows)
    assert source.dropped == {
        "has no id": ["films/1.png"],
        "id occurs more than once": ["film-2"],
        "not a frontal film, or of unknown view": ["film-4", "film-5"],
        "left out by the split rule official": ["film-6"],
        "image is missing or empty": ["films/7.png"],
    }
    assert len(plan) == 10 and plan.missing == ["films/7.png"]
    plan, source = plan_films(tmp_path, rows, views="all", split="hash")
    assert {"film-4", "film-5", "film-6"} <= {
        name for part in list_ids(plan).values() for name in part
    }


def test_a_check_counts_missing_images_but_keeps_their_rows(tmp_path):
    rows = [make_row(number) for number in range(8)]
    (tmp_path / "source/films").mkdir(parents=True)
    (tmp_path / "source/films/3.png").touch()
    plan, source = plan_films(tmp_path, rows, needs_images=False)
    assert len(plan) == 8 and plan.missing == ["films/3.png"] and not source.dropped


def test_too_many_missing_images_stop_the_preparation(tmp_path):
    rows = [make_row(number) for number in range(8)]
    (tmp_path / "source/films").mkdir(parents=True)
    (tmp_path / "source/films/3.png").touch()
    with pytest.raises(
        UserError, match=r"1 of 8 images .* as films/3.png, more than .* max_bad 0.1"
    ):
        plan_films(tmp_path, rows, max_bad=0.1)
    plan, _ = plan_films(tmp_path, rows, max_bad=0.2)
    assert len(plan) == 7
    for path in (tmp_path / "source/films").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no image .* can be used \(image is missing or empty: 8\)"
    ):
        plan_films(tmp_path, rows, max_bad=1.0)


def test_nothing_usable_stops_the_preparation(tmp_path):
    with pytest.raises(UserError, match="no image .* can be used .*not a frontal film.*: 2"):
        plan_films(tmp_path, [make_row(0, view="LATERAL"), make_row(1, view="OTHER")])


def test_patients_are_divided_by_a_hash_of_their_id(tmp_path):
    rows = [make_row(number, split="") for number in range(40)]
    plan, _ = plan_films(tmp_path, rows, val_fraction=0.3, test_fraction=0.3)
    for split, names in list_ids(plan).items():
        for name in names:
            patient = f"p{int(name.removeprefix('film-')) // 2}"
            number = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
            assert split == ("val" if number < 0.3 else "test" if number < 0.6 else "train")
    assert {*plan.offsets} == {"train", "val", "test"}
    assert not any(plan.leaks.values())


def test_the_share_of_a_hash_is_that_asked_for():
    splits = [assign_by_hash(str(number), 0.1, 0.2) for number in range(4000)]
    assert abs(splits.count("val") / 4000 - 0.1) < 0.02
    assert abs(splits.count("test") / 4000 - 0.2) < 0.02


def test_a_leak_of_the_default_rule_stops_the_preparation(tmp_path):
    rows = [make_row(number) for number in range(16)]
    rows[0]["split"] = "test"  # of the patient of row 1, who is in train
    with pytest.raises(
        UserError, match="patient 'p0' of dataset toy_films is in train and in test"
    ):
        plan_films(tmp_path, rows)
    plan, _ = plan_films(tmp_path, rows, split="leaky")
    assert plan.leaks == {"val": 0, "test": 1}
    plan, _ = plan_films(tmp_path, rows, split="hash")
    assert plan.leaks == {"val": 0, "test": 0}


def test_leaks_are_counted_by_image():
    pairs = [("a", "train"), ("a", "test"), ("a", "test"), ("b", "val"), ("b", "test")]
    assert count_leaks(pairs) == {"val": 0, "test": 2}


def test_a_word_for_a_missing_text_is_no_section(tmp_path):
    plan, _ = plan_films(tmp_path, [make_row(0, report="nan"), make_row(1, report="Normal.")])
    sections = {item.image_id: item.sections for item in plan.read_items("train")}
    assert sections == {"film-0": {}, "film-1": {"findings": "Normal."}}


def test_a_word_for_a_missing_id_is_no_patient(tmp_path):
    rows = [make_row(0, patient="nan", split="train"), make_row(1, patient="nan", split="test")]
    plan, _ = plan_films(tmp_path, rows)
    patients = [item.patient_id for split in plan.offsets for item in plan.read_items(split)]
    assert patients == ["film-0", "film-1"]
    assert plan.leaks == {"val": 0, "test": 0}


def test_half_of_a_character_is_no_text(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    config = toy_films.ToyFilmsConfig(name="x", source=str(tmp_path))
    source = SourceFolder(tmp_path)
    films = [Item(name, "a.png", sections={"findings": "\u00e9"}) for name in ("a", "\ud800")]
    plan = make_plan(films, source, config, folder, needs_images=False)
    assert list_ids(plan) == {"train": ["a"]}
    assert source.dropped == {"has a text that is not Unicode": ["\ufffd"]}


def test_nothing_is_left_of_items_that_could_not_be_written(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    config = toy_films.ToyFilmsConfig(name="x", source=str(tmp_path))
    with pytest.raises(OSError, match="No space"):
        make_plan([Item("a", "a.png")], SourceFolder(tmp_path), config, tmp_path, fail)
    assert not list(tmp_path.iterdir())


def test_sizes_count_images_patients_and_studies(tmp_path):
    plan, _ = plan_films(tmp_path, [make_row(number) for number in range(8)])
    assert plan.sizes["train"] == {"images": 4, "patients": 2, "studies": 4}
    assert plan.labels == ["effusion"]
