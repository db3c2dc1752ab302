"""CheXpert: layouts, labels, masks, and the published selections of its training table."""

import csv
import json

import numpy as np
import pytest
from miniatures import chexpert as miniature

from configs.eval import chexpert_5x200, chexpert_14, chexpert_linear, chexpert_zero_shot
from plan_jax.data.builders import chexpert
from plan_jax.data.builders.chexpert import FINDINGS, ChexpertConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.preparation import check_dataset
from plan_jax.data.public.shapes import draw_mask
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import count_leaks
from plan_jax.types import UserError


def read(folder, **fields):
    """Returns the folder as it was read, and its items by id."""
    source = SourceFolder(folder, chexpert.FACTS.page)
    config = ChexpertConfig(name="", source=str(folder), **fields)
    items = list(chexpert.read_items(source, config))
    assert len({item.image_id for item in items}) == len(items)
    return source, {item.image_id: item for item in items}


@pytest.mark.parametrize("test", ["groundtruth", "test_labels"])
@pytest.mark.parametrize("layout", ["full", "small", "bare", "inside", "batches"])
def test_each_layout_has_the_same_films(tmp_path, layout, test):
    miniature.write(tmp_path, layout, test)
    source, items = read(tmp_path)
    assert not source.dropped and not source.notes
    paths = [row[0] for row in (*miniature.TRAIN, *miniature.VALID, *miniature.TEST)]
    assert list(items) == [path.removesuffix(".jpg") for path in paths]
    for image_id, item in items.items():
        part, patient_id, study, _ = image_id.split("/")
        assert item.patient_id == patient_id and item.study_id == f"{patient_id}/{study}"
        assert item.split == {"train": "train", "valid": "val", "test": "test"}[part]
        assert source.has(item.image)
    views = {image_id: item.view for image_id, item in items.items()}
    assert [
        views[f"train/{name}"]
        for name in (
            "patient00003/study1/view1_lateral",
            "patient00003/study1/view2_frontal",
            "patient00004/study1/view1_frontal",
        )
    ] == ["LATERAL", "PA", "FRONTAL"]
    assert views["test/patient64742/study1/view1_lateral"] == "LATERAL"
    assert views["test/patient64742/study1/view2_frontal"] == "FRONTAL"


def test_labels_are_read_by_name_and_a_blank_one_is_unknown_or_absent(tmp_path):
    miniature.write(tmp_path)
    for blank in (-1, 0):
        _, items = read(tmp_path, label_blank=blank)
        item = items["train/patient33093/study1/view1_frontal"]
        assert item.labels == dict.fromkeys(FINDINGS, blank) | {
            "Pleural Effusion": 1,
            "Edema": 0,
            "Pneumonia": -1,
        }
        # The table of test has other columns in the middle, and no blank labels.
        lesion = items["test/patient64742/study1/view2_frontal"].labels
        assert lesion == dict.fromkeys(FINDINGS, 0) | {"Lung Lesion": 1}


def test_masks_of_present_findings_belong_to_their_film(tmp_path):
    truth = miniature.write(tmp_path)
    _, items = read(tmp_path)
    masked = {image_id: item.shapes for image_id, item in items.items() if item.shapes}
    assert list(masked) == [
        "valid/patient64541/study1/view1_frontal",
        "test/patient64741/study1/view1_frontal",
    ]
    (shape,) = masked["test/patient64741/study1/view1_frontal"]
    assert shape.label == "Lung Opacity" and shape.size == miniature.SHAPE
    mask = draw_mask([shape], miniature.SHAPE, *miniature.SHAPE)
    np.testing.assert_array_equal(mask, truth[miniature.MASKED]["Airspace Opacity"] == 1)


def test_faulty_masks_and_rows_are_dropped_by_reason(tmp_path):
    miniature.write(tmp_path)
    path = tmp_path / "CheXlocalize/gt_segmentations_test.json"
    masks = json.loads(path.read_text())
    masks[miniature.MASKED]["Airspace Opacity"]["size"] = [39, 48]
    masks["patient99999_study1_view1_frontal"] = {"Edema": {"size": [1, 2], "counts": [1, 1]}}
    path.write_text(json.dumps(masks))
    table = tmp_path / "CheXpert-v1.0-small/train.csv"
    table.write_text(table.read_text().replace("train/patient00001/study1", "train/patient00001"))
    source, items = read(tmp_path)
    assert source.dropped == {
        "a path is not that of a film": [
            "CheXpert-v1.0-small/train/patient00001/view1_frontal.jpg"
        ],
        "a mask is not one of COCO's": [miniature.MASKED],
        "masks of a film that the table does not have": ["patient99999_study1_view1_frontal"],
    }
    assert len(items) == 16


def test_without_the_test_set_valid_is_test(tmp_path):
    miniature.write(tmp_path, test="", masks=False)
    source, items = read(tmp_path, val_fraction=0.4)
    assert source.notes == ["the radiologists' test set is not there, so valid.csv is test"]
    assert {item.split for item in items.values() if item.image_id.startswith("valid")} == {"test"}
    patients = {(item.patient_id, item.split) for item in items.values()}
    assert len(patients) == 8 and {split for _, split in patients} == {"train", "val", "test"}
    assert not any(item.shapes for item in items.values())


def test_labels_without_test_films_are_noted(tmp_path):
    miniature.write(tmp_path, test="", masks=False)
    (tmp_path / "groundtruth.csv").write_text("Study\n")
    source, _ = read(tmp_path)
    assert source.notes[0].startswith("groundtruth.csv labels test films that are not there")


def test_the_test_set_alone_is_enough(tmp_path):
    miniature.write(tmp_path / "a", "small", "")
    miniature._write_test(tmp_path, "test_labels")
    assert len(read(tmp_path / "CheXlocalize")[1]) == 4


def test_only_the_first_view_of_a_study_may_be_used(tmp_path):
    miniature.write(tmp_path)
    _, items = read(tmp_path, first_view=True, views="all")
    test = [image_id for image_id, item in items.items() if item.split == "test"]
    assert test == [
        "test/patient64741/study1/view1_frontal",
        "test/patient64742/study1/view1_lateral",
    ]


@pytest.mark.parametrize("rule", ["official", "valid_is_test", "5x200", "8x200"])
def test_no_patient_is_in_two_splits(tmp_path, rule):
    miniature.write(tmp_path)
    _, items = read(tmp_path, split=rule, val_fraction=0.5)
    splits = {(item.patient_id, item.split) for item in items.values() if item.split != "unused"}
    assert len(splits) == len({patient for patient, _ in splits}) >= 2


def test_by_hash_no_film_has_a_split_of_its_own(tmp_path):
    miniature.write(tmp_path)
    assert {item.split for item in read(tmp_path, split="hash")[1].values()} == {""}


@pytest.mark.parametrize("layout", ["full", "small"])
def test_records_have_films_labels_and_masks(tmp_path, layout):
    truth = miniature.write(tmp_path / "source", layout)
    fields = {"source": str(tmp_path / "source"), "size": 24, "workers": 1}
    records = [
        record
        for split in ("train", "val", "test")
        for record in open_dataset("chexpert", split, data_dir=str(tmp_path / "data"), **fields)
    ]
    frontal = [path for path, *_ in (*miniature.TRAIN, *miniature.VALID, *miniature.TEST)]
    frontal = sorted(path.removesuffix(".jpg") for path in frontal if "frontal" in path)
    assert sorted(record.record_id for record in records) == frontal
    (record,) = [record for record in records if record.record_id.startswith("test/patient64741")]
    assert record.image.shape[:2] == (20, 24)
    assert record.labels[FINDINGS.index("Atelectasis")] == 1
    (phrase,) = record.phrases
    expected = truth[miniature.MASKED]["Airspace Opacity"][::2, ::2] == 1
    np.testing.assert_array_equal(phrase.mask, expected)
    assert phrase.text == "Lung Opacity"


# Published selections ----------------------------------------------------------------------------


def write_train(folder, rows):
    """Writes a training table of frontal films: patient and study, labels."""
    miniature._write_table(
        folder / "train.csv",
        "CheXpert-v1.0",
        [
            (f"train/{study}/view1_frontal.jpg", "Male", 50, "Frontal", "AP", labels)
            for study, labels in rows
        ],
    )


def test_5x200_has_films_with_one_of_the_five_and_none_of_the_others(tmp_path):
    miniature.write(tmp_path)
    source, items = read(tmp_path, split="5x200")
    test = {image_id: item for image_id, item in items.items() if item.split == "test"}
    # An uncertain pneumonia leaves patient33093 out, the plane the lateral films.
    assert list(test) == [
        "train/patient00002/study2/view1_frontal",
        "train/patient00005/study1/view1_frontal",
    ]
    assert {item.split for item in items.values()} == {"test", "unused"}
    assert test["train/patient00005/study1/view1_frontal"].labels == (
        dict.fromkeys(FINDINGS, 0) | {"Pleural Effusion": 1}
    )
    assert source.notes == ["5x200 has 2 films instead of 1,000, as train.csv has no more"]


def test_5x200_draws_as_pandas_does_with_seed_0(tmp_path, monkeypatch):
    monkeypatch.setattr(chexpert, "CLASS_SIZE", 3)
    write_train(tmp_path, [(f"patient{number:05d}/study1", "Edema=1") for number in range(10)])
    _, items = read(tmp_path, split="5x200")
    test = {item.patient_id for item in items.values() if item.split == "test"}
    # pandas.Series(range(10)).sample(3, random_state=0).tolist()
    assert test == {"patient00002", "patient00008", "patient00004"}


def test_8x200_has_one_film_a_patient_and_queries_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(chexpert, "CLASS_SIZE", 4)
    monkeypatch.setattr(chexpert, "NUM_QUERIES", 2)
    rows = [(f"patient{number:05d}/study1", "Fracture=1") for number in range(20)]
    others = [(f"patient{number:05d}/study2", "Edema=1") for number in range(20)]
    write_train(tmp_path, [*rows, *others, ("patient00021/study1", "Edema=1;Fracture=1")])
    _, items = read(tmp_path, split="8x200")
    for split, number in (("test", 4), ("val", 2)):
        names = [
            name
            for item in items.values()
            if item.split == split
            for name, value in item.labels.items()
            if value
        ]
        assert sorted(names) == ["Edema"] * number + ["Fracture"] * number
    patients = [item.patient_id for item in items.values() if item.split != "unused"]
    assert len(patients) == len(set(patients)) == 12


def test_mgca_trains_on_what_it_validates_on(tmp_path, monkeypatch):
    monkeypatch.setattr(chexpert, "CLASS_SIZE", 2)
    monkeypatch.setattr(chexpert, "MGCA_NUM_VAL", 3)
    write_train(
        tmp_path,
        [(f"patient{number:05d}/study1", f"Edema={int(number < 4)}") for number in range(12)],
    )
    _, items = read(tmp_path, split="mgca_compat")
    # RandomState(0): the draw of two among the four with oedema is 2 and 3; that of three places
    # among the other ten rows (0, 1, 4 to 11) is 2, 8 and 4, thus rows 4, 10 and 6.
    number_of = {key: int(item.patient_id[-2:]) for key, item in items.items()}
    splits = {
        split: sorted(number_of[key] for key, item in items.items() if item.split == split)
        for split in ("train", "val", "unused")
    }
    assert splits["val"] == [4, 6, 10]
    # Rows 2, 8 and 4 of the whole table are dropped from training; 2 and 3 are those of 5x200.
    assert splits["train"] == [0, 1, 5, 6, 7, 9, 10, 11]
    assert splits["unused"] == [2, 3, 8]
    assert [key.rpartition("#")[2] for key in items if "#" in key] == ["val", "val"]
    leaks = count_leaks((item.patient_id, item.split) for item in items.values())
    assert leaks == {"val": 2, "test": 0}


def test_the_leak_of_mgca_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(chexpert, "MGCA_NUM_VAL", 4)
    miniature.write(tmp_path, masks=False)
    _, items = read(tmp_path, split="mgca_compat")
    frontal = [item for item in items.values() if item.view != "LATERAL"]
    trained = {item.patient_id for item in frontal if item.split == "train"}
    number = sum(item.split == "val" and item.patient_id in trained for item in frontal)
    total = sum(item.split == "val" for item in frontal)
    fields = {"source": str(tmp_path), "split": "mgca_compat"}
    lines = check_dataset("chexpert", fields)
    assert number and (
        f"leak: {number} of {total} images of val are of patients whom train has too" in lines
    )


def test_the_configs_name_rules_options_and_labels_of_the_builder():
    for module in (chexpert_14, chexpert_5x200, chexpert_linear, chexpert_zero_shot):
        config = module.get_config()
        assert config.data.name == "chexpert"
        fields = ChexpertConfig(name="", **config.data.builder.to_dict())
        assert fields.split_rule in chexpert.FACTS.splits
    assert chexpert_5x200.CLASSES == chexpert.COMPETITION
    assert {*chexpert_5x200.CLASSES, *chexpert_5x200.ABSENT, "No Finding"} == {*FINDINGS}
    assert chexpert_linear.LABELS == chexpert_zero_shot.LABELS == chexpert.COMPETITION


# Mistakes ----------------------------------------------------------------------------------------


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no train.csv; download it from stanfordaimi"):
        read(tmp_path)
    with pytest.raises(UserError, match="label_blank 1 of dataset chexpert"):
        ChexpertConfig(name="", label_blank=1)
    miniature.write(tmp_path)
    table = tmp_path / "CheXpert-v1.0-small/train.csv"
    text = table.read_text()
    table.write_text(text.replace("-1.0", "2.0"))
    with pytest.raises(
        UserError, match=r"label '2.0' of Edema in train/patient00002.* is not 1, 0, -1"
    ):
        read(tmp_path)
    table.write_text(text.replace("Path", "File"))
    with pytest.raises(UserError, match="no column 'Path'; its columns are 'File', 'Sex'"):
        read(tmp_path)
    table.unlink()
    with pytest.raises(UserError, match=r"no train.csv"):
        read(tmp_path, split="5x200")
    (tmp_path / "CheXlocalize/gt_segmentations_test.json").write_text("[1]")
    with pytest.raises(UserError, match="gt_segmentations_test.json in .* has no masks by film"):
        read(tmp_path)


def test_columns_may_come_in_another_order(tmp_path):
    miniature.write(tmp_path)
    _, expected = read(tmp_path)
    table = tmp_path / "CheXpert-v1.0-small/train.csv"
    rows = list(csv.reader(table.open()))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([row[::-1] for row in rows])
    assert read(tmp_path)[1] == expected
