"""RSNA pneumonia from miniatures of both layouts, and the published divisions of its images."""

import json

import numpy as np
import pytest
from miniatures import rsna_pneumonia as miniature

from plan_jax.data.builders import rsna_pneumonia
from plan_jax.data.builders.rsna_pneumonia import RsnaPneumoniaConfig, read_items
from plan_jax.data.dataset import open_dataset
from plan_jax.data.preparation import check_dataset
from plan_jax.data.public.items import Box
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError

FIRST, SECOND, *_ = miniature.FILMS


def read(folder, **options):
    source = SourceFolder(folder, rsna_pneumonia.FACTS.page)
    items = list(read_items(source, RsnaPneumoniaConfig(name="test", **options)))
    return {item.image_id: item for item in items}, source


def write_table(folder, rows, header="patientId,x,y,width,height,Target"):
    folder.mkdir(exist_ok=True)
    (folder / "stage_2_train_labels.csv").write_text("\n".join([header, *rows]) + "\n")


def test_kaggle_has_an_image_a_row_and_a_row_a_box(tmp_path):
    miniature.write_kaggle(tmp_path)
    items, source = read(tmp_path)
    assert sorted(items) == sorted(miniature.FILMS)
    for name, (_, kind, _) in miniature.FILMS.items():
        item = items[name]
        assert [box.corners for box in item.boxes] == miniature.BOXES[name]
        assert {box.label for box in item.boxes} <= {"Pneumonia"}
        assert item.labels == {
            "Pneumonia": int(kind == "Lung Opacity"),
            "Normal": int(kind == "Normal"),
        }
        assert source.has(item.image)
    assert source.dropped == {}


def test_boxes_fit_copies_of_any_size(tmp_path):
    write_table(tmp_path, ["a,256,512,128,64,1", "b,256,512,128,64,1"])
    folder = tmp_path / "stage_2_train_images"
    folder.mkdir()
    for name in ("a.png", "b.dcm", "b.png"):
        (folder / name).write_bytes(b"any")
    items, _ = read(tmp_path)
    assert items["a"].image.endswith("a.png") and items["b"].image.endswith("b.dcm")
    assert items["a"].boxes == [Box((0.25, 0.5, 0.375, 0.5625), "Pneumonia", is_normalised=True)]
    assert items["b"].boxes == [Box((256.0, 512.0, 384.0, 576.0), "Pneumonia")]


def test_without_the_mapping_a_patient_is_an_image_and_this_is_said(tmp_path):
    miniature.write_kaggle(tmp_path, images=False)
    items, source = read(tmp_path)
    assert all(item.patient_id == name for name, item in items.items())
    assert "images are divided, not patients" in " ".join(source.notes)


def test_the_mapping_gives_the_patients_of_nih(tmp_path):
    miniature.write_kaggle(tmp_path, images=False)
    miniature.write_mapping(tmp_path)
    items, _ = read(tmp_path)
    assert {name: item.patient_id for name, item in items.items()} == miniature.PATIENTS
    assert items[FIRST].patient_id == items[SECOND].patient_id


def test_an_image_outside_of_the_mapping_is_dropped(tmp_path):
    miniature.write_kaggle(tmp_path, images=False)
    miniature.write_mapping(tmp_path)
    write_table(tmp_path, [f"{FIRST},1,1,5,5,1", "another,,,,,0"])
    items, source = read(tmp_path)
    assert list(items) == [FIRST]
    assert source.dropped["an image that the mapping to NIH does not have"] == ["another"]


def test_without_classes_an_image_may_be_normal_or_not(tmp_path):
    miniature.write_kaggle(tmp_path, classes=False, images=False)
    items, _ = read(tmp_path)
    assert items[FIRST].labels == {"Pneumonia": 1, "Normal": 0}
    assert items[SECOND].labels == {"Pneumonia": 0, "Normal": -1}


def test_columns_are_found_by_name_and_bad_boxes_are_listed(tmp_path):
    rows = ["0,9,2,1,8,c,3", "1,4,2,1,0,a,3", "1,4,2,,8,b,3", "1,4,2,1,8,b,3", "2,,,,,d,"]
    write_table(tmp_path, rows, "Target,height,width,y,x,patientId,more")
    rows = ["a,Lung Opacity", "b,Normal", "c,Normal", "e,Normal"]
    (tmp_path / "stage_2_detailed_class_info.csv").write_text("\n".join(["patientId,class", *rows]))
    items, source = read(tmp_path)
    # The first has a width of 2 and a height of 4.
    assert [box.corners for box in items["a"].boxes] == [(0, 1, 2, 5)]
    assert [box.corners for box in items["b"].boxes] == [(8, 1, 10, 5)]
    assert items["b"].labels == {"Pneumonia": 1, "Normal": 0}
    assert source.dropped == {
        "a box has no four numbers": ["b"],
        "Target is not 0 or 1": ["d"],
        "a class that contradicts the table of labels": ["b", "e"],
    }
    write_table(tmp_path, ["a,5,5,0,3,1", "a,5,5,3,-1,1"])
    assert read(tmp_path)[1].dropped["a box has no area"] == ["a", "a"]


def test_rsna_org_has_annotations_of_images_and_of_studies(tmp_path):
    miniature.write_rsna_org(tmp_path)
    items, source = read(tmp_path)
    assert len(items) == len(miniature.FILMS)
    for name, (_, kind, _) in miniature.FILMS.items():
        item = items[miniature.uid(name, 4)]
        assert [box.corners for box in item.boxes] == miniature.BOXES[name]
        assert item.labels["Pneumonia"] == int(kind == "Lung Opacity")
        assert item.labels["Normal"] == int(kind == "Normal")
        assert item.study_id == miniature.uid(name, 2)
        assert source.has(item.image)
    assert source.dropped == {
        "an image with administrative labels only": ["1.2.276.0.7230010.3.1.4.8323329.84"]
    }


def test_rsna_org_joins_the_patients_of_nih(tmp_path):
    miniature.write_rsna_org(tmp_path)
    miniature.write_mapping(tmp_path)
    items, _ = read(tmp_path)
    patients = {miniature.uid(name, 4): patient for name, patient in miniature.PATIENTS.items()}
    assert {name: item.patient_id for name, item in items.items()} == patients


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pneumonia-challenge-annotations-adjudicated-kaggle_2018.json", "[]", "not laid out"),
        (
            "pneumonia-challenge-annotations-adjudicated-kaggle_2018.json",
            '{"labelGroups": [{"labels": []}], "datasets": [{"annotations": [{"labelId": "L"}]}]}',
            "not laid out",
        ),
        ("pneumonia-challenge-dataset-mappings_2018.json", '[{"img_id": "1"}]', "subset_img_id"),
        ("unrelated.json", "{}", "stage_2_train_labels.csv"),
    ],
)
def test_what_is_missing_or_damaged_is_said(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_an_unknown_class_is_an_error(tmp_path):
    write_table(tmp_path, ["a,,,,,0"])
    (tmp_path / "stage_2_detailed_class_info.csv").write_text("patientId,class\na,Odd\n")
    with pytest.raises(UserError, match="'Odd' of a"):
        read(tmp_path)


def write_many(folder, count):
    """Writes a table of many images, the last first, a quarter of them positive."""
    names = [f"{index:04d}" for index in range(count)]
    rows = [f"{name},1,1,5,5,1" if int(name) % 4 == 0 else f"{name},,,,,0" for name in names]
    write_table(folder, rows[::-1])
    return names


def split_ids(items):
    return {
        split: [name for name, item in items.items() if item.split == split]
        for split in ("train", "val", "test")
    }


def test_mgca_divides_the_sorted_ids_by_two_permutations(tmp_path):
    names = write_many(tmp_path, 101)
    items, source = read(tmp_path, split="mgca_compat")
    first = np.random.RandomState(0).permutation(101)
    held_out = first[:31]  # 30 %, rounded up
    second = np.random.RandomState(0).permutation(31)
    val, test = held_out[second[:16]], held_out[second[16:]]
    expected = {"train": first[31:], "val": val, "test": test}
    assert split_ids(items) == {
        split: sorted(names[index] for index in indices) for split, indices in expected.items()
    }
    assert "not the published ones" in " ".join(source.notes)


def test_mgca_holds_out_twice_5337_images_for_boxes(tmp_path):
    write_many(tmp_path, 11_000)
    sizes = {
        split: len(ids)
        for split, ids in split_ids(read(tmp_path, split="mgca_compat_boxes")[0]).items()
    }
    assert sizes == {"train": 326, "val": 5337, "test": 5337}


def test_benchx_holds_out_as_many_of_each_class(tmp_path):
    write_many(tmp_path, 400)
    items, _ = read(tmp_path, split="benchx")
    counts = {
        split: (len(ids), sum(items[name].labels["Pneumonia"] for name in ids))
        for split, ids in split_ids(items).items()
    }
    assert counts == {"train": (280, 70), "val": (60, 15), "test": (60, 15)}


@pytest.mark.parametrize("rule", ["mgca_compat", "benchx"])
def test_the_summary_counts_the_test_images_of_trained_patients(tmp_path, rule):
    names = write_many(tmp_path, 240)
    keys = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    films = [
        {"subset_img_id": name, "img_id": f"{index // 4:08d}_{index % 4:03d}.png"}
        | {key: f"{key}.{name}" for key in keys}
        for index, name in enumerate(names)
    ]
    path = tmp_path / "pneumonia-challenge-dataset-mappings_2018.json"
    path.write_text(json.dumps(films))
    items, _ = read(tmp_path, split=rule)
    patients = {split: [int(name) // 4 for name in ids] for split, ids in split_ids(items).items()}
    lines = check_dataset("rsna_pneumonia", {"source": str(tmp_path), "split": rule})
    for split in ("val", "test"):
        count = sum(patient in patients["train"] for patient in patients[split])
        assert count > 30
        assert f"leak: {count} of 36 images of {split} are of patients whom train has too" in lines
    assert "of what was published: 240 of 26,684 images" in lines  # patients are in two splits
    lines = check_dataset("rsna_pneumonia", {"source": str(tmp_path)})
    assert not any(line.startswith("leak") for line in lines)
    assert "of what was published: 240 of 26,684 images, 60 of 11,439 patients" in lines
    path.unlink()
    lines = check_dataset("rsna_pneumonia", {"source": str(tmp_path)})
    assert "of what was published: 240 of 26,684 images" in lines  # patients are not known


def test_published_rules_need_the_list_that_they_divide(tmp_path):
    miniature.write_rsna_org(tmp_path)
    with pytest.raises(UserError, match=r"stage_2_train_labels\.csv"):
        read(tmp_path, split="mgca_compat")


@pytest.mark.parametrize("write", [miniature.write_kaggle, miniature.write_rsna_org])
def test_records_have_images_and_boxes_of_the_original(tmp_path, write):
    write(tmp_path / "source")
    miniature.write_mapping(tmp_path / "source")
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "source": str(tmp_path / "source")}
    dataset = open_dataset("rsna_pneumonia", "train", data_dir=str(tmp_path), size=32, **options)
    assert dataset.findings == ("Pneumonia", "Normal")
    records = {record.record_id: record for record in dataset}
    assert len(records) == 5
    for name, (_, kind, _) in miniature.FILMS.items():
        record = records.get(name) or records[miniature.uid(name, 4)]
        assert record.patient_id == miniature.PATIENTS[name]
        assert record.labels.tolist() == [kind == "Lung Opacity", kind == "Normal"]
        pixels = miniature.draw_film(name).reshape(32, 2, 32, 2).mean((1, 3))
        assert np.abs(record.image[..., 0] - pixels).mean() < 3
        boxes = [box for phrase in record.phrases for box in phrase.boxes]
        boxes = record.geometry.to_original(np.reshape(boxes, (-1, 4)))
        np.testing.assert_allclose(
            np.sort(boxes, 0), np.sort(np.reshape(miniature.BOXES[name], (-1, 4)), 0), atol=1
        )


def test_the_summary_says_whether_patients_are_known(tmp_path):
    miniature.write_kaggle(tmp_path / "source")
    options = {"data_dir": str(tmp_path), "source": str(tmp_path / "source")}
    options |= {"val_fraction": 0.0, "test_fraction": 0.0}
    open_dataset("rsna_pneumonia", "train", **options)
    miniature.write_mapping(tmp_path / "source")
    open_dataset("rsna_pneumonia", "train", **options, size=64)
    paths = sorted(tmp_path.glob("rsna_pneumonia/**/summary.json"))
    summaries = [json.loads(path.read_text()) for path in paths]
    patients = {content["splits"]["train"]["patients"]: content for content in summaries}
    assert patients[5]["is_split_by_image"] and not patients[4]["is_split_by_image"]


def test_rows_of_an_image_that_contradict_each_other_are_listed(tmp_path):
    write_table(tmp_path, ["a,1,1,5,5,1", "a,,,,,0", "b,,,,,0", "b,1,1,5,5,1"])
    items, source = read(tmp_path)
    assert {name: item.labels["Pneumonia"] for name, item in items.items()} == {"a": 1, "b": 0}
    assert (len(items["a"].boxes), len(items["b"].boxes)) == (1, 0)
    assert source.dropped == {"a row that contradicts an earlier one of its image": ["a", "b"]}
