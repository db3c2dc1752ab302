"""A user's manifest and images become a dataset; rows that cannot be used are reported."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from manifests import (
    NUM_ROWS,
    change_first_row,
    make_image_folder,
    make_rows,
    number_of,
    open_pairs,
    write_mask,
)
from PIL import Image
from radiographs import draw_picture, make_dicom, make_png, make_tiff, save_with_orientation

from plan_jax.data import images
from plan_jax.data.builders.pairs import Pairs
from plan_jax.data.dataset import open_dataset
from plan_jax.data.pairs import manifest
from plan_jax.data.records import open_records
from plan_jax.types import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    return make_image_folder(tmp_path)


# Rows and splits ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_a_manifest_of_any_kind_is_built(folder, name, capfd):
    dataset = open_pairs(folder, make_rows(), name=name)
    assert len(dataset) == 8
    assert dataset[0].image.shape == (24, 32, 1)
    record_of_text = {record.text: record for record in dataset}
    assert record_of_text["Finding number 3. No effusion."].patient_id == "p1"
    assert record_of_text["Finding number 3. No effusion."].image[0, 0, 0] == 60
    output = capfd.readouterr()
    assert output.out == ""
    preparing, *summary = output.err.splitlines()
    assert preparing.startswith("preparing pairs in ") and "train 8, val 2, test 2; " in preparing
    assert summary == [
        f"{name}: 12 studies, 12 images, 6 patients; splits by column 'split'",
        "columns: image, text, split, patient_id",
    ]
    assert len(open_pairs(folder, make_rows(), "test", name=name)) == 2
    assert capfd.readouterr().err == "", "a prepared dataset was prepared again"


def test_splits_by_hash_are_stable_and_keep_patients_together(folder):
    rows = [{key: row[key] for key in ("image", "text", "patient_id")} for row in make_rows()]
    fractions = {"val_fraction": 0.3, "test_fraction": 0.3}
    split_of_patient = {}
    for split in ("train", "val", "test"):
        try:
            dataset = open_pairs(folder, rows, split, **fractions)
        except UserError:  # the hash put no patient into this split
            continue
        for record in dataset:
            assert split_of_patient.setdefault(record.patient_id, split) == split
            assert manifest.assign_split(None, record.patient_id, (0.3, 0.3)) == split
    assert len(split_of_patient) == 6


def test_a_column_of_splits_can_be_ignored(folder):
    no_split = {"columns": {"split": ""}, "val_fraction": 0.0, "test_fraction": 0.0}
    assert len(open_pairs(folder, make_rows(), **no_split)) == NUM_ROWS


def test_without_patients_every_image_is_a_patient(folder):
    rows = [{"image": row["image"], "text": row["text"]} for row in make_rows()]
    dataset = open_pairs(folder, rows, val_fraction=0, test_fraction=0)
    patients = {record.patient_id for record in dataset}
    assert patients == {f"{number}.png" for number in range(NUM_ROWS)}


def test_filters_select_rows(folder):
    rows = make_rows(view="PA")
    rows[0]["view"], rows[1]["text"] = "L", "short"
    assert len(open_pairs(folder, rows, filters={"view": {"not": ["L"]}}, min_words=2)) == 6
    assert len(open_pairs(folder, rows, filters={"view": ["L"]})) == 1


# Annotations --------------------------------------------------------------------------------


def test_labels_are_read_as_lists_and_objects(folder):
    rows = make_rows(labels="")
    rows[0]["labels"] = "oedema; effusion"
    rows[1]["labels"] = json.dumps({"oedema": 0, "effusion": None})
    rows[2]["labels"] = "[]"
    dataset = open_pairs(folder, rows)
    assert dataset.findings == ("effusion", "oedema")
    labels_of_row = {number_of(record): record.labels.tolist() for record in dataset}
    assert labels_of_row["0"] == [1, 1]
    assert labels_of_row["1"] == [-1, 0]
    assert labels_of_row["2"] == [0, 0]
    assert labels_of_row["3"] == [-1, -1]
    selected = open_pairs(folder, rows, findings=("oedema", "nodule"))
    assert selected.findings == ("oedema", "nodule")
    assert sorted(record.labels.tolist() for record in selected)[-1] == [1, -1]


def test_boxes_and_masks_follow_the_resize(folder):
    write_mask(folder / "mask.png")
    rows = make_rows(boxes="", mask="")
    rows[0]["boxes"] = json.dumps(
        [
            {"box": [4, 10, 12, 20], "phrase": "left effusion", "label": "effusion", "by": "a"},
            {"box": [20, 0, 50, 15], "phrase": "left effusion", "label": "effusion", "by": "a"},
            {"box": [1, 1, 2, 2], "phrase": "heart", "label": "heart", "by": "b"},
        ]
    )
    rows[1]["mask"] = "mask.png"
    rows[2]["mask"] = json.dumps({"oedema": "mask.png"})
    rows[2]["boxes"] = "[[4, 10, 12, 20]]"
    dataset = open_pairs(folder, rows, size=80, box_where={"by": {"not": ["b"]}})
    phrases_of_row = {number_of(record): record.phrases for record in dataset}
    (phrase,) = phrases_of_row["0"]
    assert (phrase.text, phrase.bare, phrase.key) == ("left effusion", "effusion", "left effusion")
    assert dataset.findings[phrase.finding] == "effusion"
    assert phrase.boxes == ((8.0, 20.0, 24.0, 40.0), (40.0, 0.0, 80.0, 30.0))
    (whole_text,) = phrases_of_row["1"]
    assert whole_text.text == "Finding number 1. No effusion."
    assert whole_text.mask.shape == (60, 80)
    assert whole_text.mask[24:36, 12:20].all()
    assert whole_text.mask.sum() == pytest.approx(20 * 16, rel=0.1)
    with_box, with_mask = phrases_of_row["2"]
    assert with_box.boxes == ((8.0, 20.0, 24.0, 40.0),) and with_box.mask is None
    assert with_mask.text == "oedema" and with_mask.mask is not None
    assert phrases_of_row["3"] == ()


def test_images_without_text_have_labels_in_columns_and_masks_of_organs(folder):
    write_mask(folder / "mask.png")
    rows = make_rows(text="", Edema="1.0", Mass="", lung_mask="mask.png")
    rows[0] |= {"Edema": "-1", "Mass": "0", "lung_mask": ""}
    columns = {"columns": {"anatomy": "lung_mask"}, "label_columns": ("Edema", "Mass")}
    dataset = open_pairs(folder, rows, size=80, text_optional=True, **columns)
    assert dataset.findings == ("Edema", "Mass") and dataset.anatomy_names == ("lung",)
    records = sorted(dataset, key=lambda record: record.labels.tolist())
    assert [record.labels.tolist() for record in records] == [[-1, 0]] + [[1, -1]] * 7
    assert records[0].anatomy == {} and records[0].text == ""
    lung = records[1].anatomy["lung"]
    assert lung.shape == (60, 80) and lung[24:36, 12:20].all()
    blank_is_absent = open_pairs(folder, rows, text_optional=True, label_blank=0, **columns)
    assert sorted(r.labels.tolist() for r in blank_is_absent) == [[-1, 0]] + [[1, 0]] * 7
    with pytest.raises(UserError, match="12 of 12 rows cannot be used, .*its text is empty"):
        open_pairs(folder, rows, **columns)
    with pytest.raises(UserError, match="'Oedema' of label_columns does not exist; it has|did"):
        open_pairs(folder, rows, text_optional=True, label_columns=("Oedema",))
    without_text = [{key: row[key] for key in row if key != "text"} for row in rows]
    assert len(open_pairs(folder, without_text, text_optional=True)) == 8


# Images and masks ---------------------------------------------------------------------------


def test_boxes_and_masks_refer_to_the_upright_image(folder, capfd):
    upright = np.full((40, 30), 20, np.uint8)
    upright[10:20, 4:12] = 250
    save_with_orientation(upright, folder / "0.png", 6)
    save_with_orientation((upright > 99) * np.uint8(255), folder / "mask.png", 8)
    box = '[{"box": [4, 10, 12, 20], "phrase": "nodule"}]'
    rows = change_first_row(boxes=box, mask=json.dumps({"mass": "mask.png"}))
    record = next(r for r in open_pairs(folder, rows, size=40) if number_of(r) == "0")
    assert record.image.shape == (40, 30, 1)
    with_box, with_mask = record.phrases
    assert with_box.boxes == ((4.0, 10.0, 12.0, 20.0),)
    np.testing.assert_array_equal(record.image[..., 0] > 99, with_mask.mask)
    assert record.image[10:20, 4:12].min() == 250
    assert "turned 1 image (0.png) upright by the EXIF orientation" in capfd.readouterr().err


def test_masks_without_meaning_are_counted_and_broken_ones_listed(folder, capfd):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(folder / "empty.png")
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(folder / "full.png")
    inverse = np.full((30, 40), 255, np.uint8)
    inverse[9:20, 9:20] = 0
    Image.fromarray(inverse).save(folder / "inverse.png")
    write_mask(folder / "mask.png")
    broken = bytearray((folder / "mask.png").read_bytes())
    broken[37:41] = b"IDAX"
    (folder / "broken.png").write_bytes(broken)
    rows = make_rows(mask="mask.png")
    for row, name in zip(
        rows, ("empty.png", "full.png", "broken.png", "inverse.png"), strict=False
    ):
        row["mask"] = name
    open_pairs(folder, rows)
    output = capfd.readouterr().err
    assert "1 mask (empty.png) without any pixel" in output
    assert "1 mask (full.png) of the whole image" in output
    assert "1 mask (inverse.png) with all of the image's border" in output
    assert "skipped 1 of 12 rows: 2.png (mask broken.png is a broken PNG, or a kind that" in output


def test_films_of_several_depths_are_named_and_can_be_read_as_one(folder, capfd):
    for number in range(4):
        film = np.full((30, 40), 4000 if number else 900, np.uint16)
        Image.fromarray(film).save(folder / f"{number}.png")
    dataset = open_pairs(folder, make_rows())
    greys = {number_of(record): record.image[0, 0, 0] for record in dataset}
    assert greys["0"] == round(900 / 1023 * 255) and greys["2"] == round(4000 / 4095 * 255)
    output = capfd.readouterr().err
    assert "(10 bits in 1, 12 bits in 3)" in output and "data.builder.bit_depth=12" in output
    dataset = open_pairs(folder, make_rows(), bit_depth=12)
    assert "bits" not in capfd.readouterr().err
    greys = {number_of(record): record.image[0, 0, 0] for record in dataset}
    assert greys["0"] == round(900 / 4095 * 255)
    with pytest.raises(
        UserError, match="bit_depth 3 of dataset pairs is not a depth of images; use 8"
    ):
        open_pairs(folder, make_rows(), bit_depth=3)


# Whole columns ------------------------------------------------------------------------------


def summary_of(folder, rows, capfd, **config):
    """Returns the lines on the data, after those on their preparation."""
    capfd.readouterr()
    open_pairs(folder, rows, **config)
    return capfd.readouterr().err.splitlines()[1:]


def vary(rows, **columns):
    """Returns rows whose columns have the values of functions of the row's number."""
    return [
        row | {name: value(number) for name, value in columns.items()}
        for number, row in enumerate(rows)
    ]


def test_the_summary_says_what_was_understood(folder, capfd):
    rows = vary(
        make_rows(age=40),
        labels=lambda n: ("Edema|Mass", "edema", "nan")[n % 3],
        boxes=lambda n: "[[3, 3, 39, 29]]" if n < 6 else "[0, 0, 0, 0]",
        patient_id=lambda n: "N/A" if n == 11 else f"p{n // 2}",
    )
    assert summary_of(folder, rows, capfd) == [
        "manifest.csv: 12 studies, 12 images, 7 patients; splits by column 'split'",
        "columns: image, text, split, patient_id (1 missing), labels (4 missing), boxes; "
        "not used: age",
        "findings (1/0/unknown): Edema 8/0/4, Mass 4/4/4",
        "boxes: 6 in 6 images, as x0, y0, x1, y1; 6 of zeros are no box",
        "note: 1 row without a patient is one of its own",
        "note: 'edema' (4) is read as 'Edema' (4)",
    ]


def test_the_summary_says_what_conditions_leave_out(folder, capfd):
    rows = vary(
        make_rows(),
        view=lambda n: "LATERAL" if n < 2 else "PA",
        boxes=lambda n: json.dumps([{"box": [3, 3, 39, 29], "by": "A" if n % 2 else "B"}]),
    )
    config = {"filters": {"view": {"not": ["lateral", "L"]}}, "box_where": {"by": ["a", "C"]}}
    notes = [line for line in summary_of(folder, rows, capfd, **config) if "note: " in line]
    assert notes[:4] == [
        "note: filters leave out 2 of 12 rows",
        "note: filters: no row has 'L' in column 'view'",
        "note: box_where leaves out 5 of 10 boxes",
        "note: box_where: no box has 'C' in column 'by'",
    ]
    lines = summary_of(folder, make_rows(), capfd, filters={"patient_id": ["P0"]}, min_words=2)
    assert "note: filters leave out 10 of 12 rows" in lines


def test_words_that_mean_missing_are_no_text_label_patient_or_box(folder, capfd):
    words = ("nan", "None", "NULL", "N/A")
    rows = vary(make_rows(labels="Edema", boxes="nan"), text=lambda n: words[n] if n < 4 else "Ok.")
    assert len(open_pairs(folder, rows, max_bad=0.5)) == 4
    assert "skipped 4 of 12 rows: 0.png (its text is empty)" in capfd.readouterr().err
    for word in words:
        rows = vary(make_rows(patient_id=word), labels=lambda n, word=word: word if n else "Edema")
        rows = [row | {"split": "train"} for row in rows]
        dataset = open_pairs(folder, rows)
        assert dataset.findings == ("Edema",)
        assert sorted(record.labels.tolist() for record in dataset) == [[-1]] * 11 + [[1]]
        assert len({record.patient_id for record in dataset}) == 12


def test_ids_of_one_patient_are_in_one_split(folder):
    rows = vary(make_rows(), patient_id=lambda n: n // 2 if n % 2 else n // 2 + 0.0)
    no_split = {"columns": {"split": ""}, "val_fraction": 0.4, "test_fraction": 0.4}
    patients = [
        record.patient_id
        for split in ("train", "val", "test")
        for record in open_pairs(folder, rows, split, name="m.jsonl", **no_split)
    ]
    assert sorted(patients) == sorted([str(n // 2) for n in range(12)])


def test_a_text_that_is_a_list_or_an_object_is_read_as_the_options_say(folder):
    rows = make_rows(text=["No effusion", "Clear."])
    with pytest.raises(UserError, match="set data.builder.join_text to True"):
        open_pairs(folder, rows, name="m.jsonl")
    assert open_pairs(folder, rows, name="m.jsonl", join_text=True)[0].text == "No effusion. Clear."
    rows = make_rows(text={"findings": "Clear.", "impression": "No effusion."})
    sections = {"text_sections": ("impression", "findings")}
    assert open_pairs(folder, rows, name="m.parquet", **sections)[0].text == "No effusion. Clear."
    rows = make_rows(text=b"No effusion.")
    assert open_pairs(folder, rows, name="m.parquet")[0].text == "No effusion."


def test_a_column_of_one_finding_may_be_called_labels(folder):
    rows = vary(make_rows(), labels=lambda n: n % 2)
    with pytest.raises(UserError, match="labels are the values 0, 1, not names .*label_columns"):
        open_pairs(folder, rows)
    dataset = open_pairs(folder, rows, label_columns=("labels",))
    assert sorted(record.labels.tolist() for record in dataset) == [[0]] * 4 + [[1]] * 4


def test_findings_are_matched_without_regard_to_case(folder):
    rows = vary(make_rows(), labels=lambda n: ("Edema", "Mass")[n % 2])
    dataset = open_pairs(folder, rows, findings=("edema", "mass"))
    assert sorted(record.labels.tolist() for record in dataset) == [[0, 1]] * 4 + [[1, 0]] * 4


def test_labels_of_boxes_and_phrases_are_findings_in_any_case(folder, capfd):
    boxes = [{"box": [3, 3, 39, 29], "phrase": "p", "label": "EDEMA"}, {"box": [3, 3, 39, 29]}]
    boxes[1]["phrase"] = "edema"
    rows = make_rows(labels="Edema", boxes=json.dumps(boxes))
    first, second = open_pairs(folder, rows)[0].phrases
    assert (first.bare, first.finding) == ("Edema", 0) == (second.bare, second.finding)
    lines = summary_of(folder, rows, capfd, findings=("Mass", "edema"))
    assert "note: 'Edema' (12) is read as 'edema'" in lines
    rows = make_rows(labels="Mass", boxes=json.dumps(boxes))
    lines = summary_of(folder, rows, capfd, findings=("Mass",))
    assert "note: labels of boxes that are not in findings: EDEMA 12" in lines


def test_the_table_of_rsna_is_read_as_it_is(folder):
    """One row a box, x, y, width, height; images without one have empty cells."""
    rows = [
        {"patientId": "0", "x": 4.0, "y": 10.0, "width": 8.0, "height": 10.0, "Target": 1},
        {"patientId": "0", "x": 20.0, "y": 5.0, "width": 10.0, "height": 5.0, "Target": 1},
        {"patientId": "1", "x": "", "y": "", "width": "", "height": "", "Target": 0},
    ]
    dataset = open_pairs(
        folder,
        rows,
        columns={"image": "patientId"},
        image_suffix=".png",
        label_columns=("Target",),
        text_optional=True,
        val_fraction=0,
        test_fraction=0,
        size=80,
    )
    healthy, ill = sorted(dataset, key=lambda record: record.labels.tolist())
    assert healthy.labels.tolist() == [0] and healthy.phrases == ()
    (phrase,) = ill.phrases
    assert phrase.boxes == ((8.0, 20.0, 24.0, 40.0), (40.0, 10.0, 60.0, 20.0))


def test_the_list_of_boxes_of_nih_is_read_as_it_is(folder):
    """Its header has three names more than there are fields, and an image several rows."""
    path = folder / "boxes.csv"
    path.write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "0.png,Effusion,4.0,10.0,8.0,10.0\n0.png,Mass,20.0,5.0,10.0,5.0,,,\n"
    )
    config = {
        "columns": {"image": "Image Index", "labels": "Finding Label"},
        "text_optional": True,
        "val_fraction": 0,
        "test_fraction": 0,
        "size": 80,
    }
    data_dir = str(folder.parent / "data")
    (record,) = open_dataset("pairs", "train", data_dir=data_dir, manifest=str(path), **config)
    assert record.labels.tolist() == [1, 1]
    assert [(phrase.text, phrase.boxes) for phrase in record.phrases] == [
        ("Effusion", ((8.0, 20.0, 24.0, 40.0),)),
        ("Mass", ((40.0, 10.0, 60.0, 20.0),)),
    ]


def test_boxes_in_fractions_or_with_sizes_become_corners(folder):
    expected = ((8.0, 20.0, 24.0, 40.0),)
    for box_format, box in (
        ("normalised_xyxy", [0.1, 1 / 3, 0.3, 2 / 3]),
        ("normalised_cxcywh", [0.2, 0.5, 0.2, 1 / 3]),
        ("xywh", [4, 10, 8, 10]),
    ):
        rows = make_rows(boxes=json.dumps([box]))
        dataset = open_pairs(folder, rows, size=80, box_format=box_format)
        assert np.allclose(dataset[0].phrases[0].boxes, expected, atol=1e-4)


def test_boxes_that_resizing_or_another_size_spoils_are_named(folder, capfd):
    rows = vary(make_rows(), boxes=lambda n: "[[4, 10, 4.5, 20]]" if n < 2 else "[[9, 9, 39, 29]]")
    assert "2 images have a box under a pixel at size 32: 0.png, 1.png" in summary_of(
        folder, rows, capfd
    )
    (noted,) = (folder.parent / "data").rglob("noted_boxes.txt")
    assert len(noted.read_text().splitlines()) == 2
    with pytest.raises(UserError, match="boxes reach beyond 8 of 8 images, as .*.png; give boxes"):
        open_pairs(folder, make_rows(boxes="[[4, 10, 200, 300]]"))
    lines = summary_of(folder, make_rows(boxes="[[2, 2, 9, 9]]"), capfd)
    assert "would fit as x, y, width, height too: set data.builder.box_format" in lines[-1]
    stated = summary_of(folder, make_rows(boxes="[[2, 2, 9, 9]]"), capfd, box_format="xyxy")
    assert not [line for line in stated if "would fit" in line]
    named = summary_of(folder, make_rows(x_min=2, y_min=2, x_max=9, y_max=9), capfd)
    assert not [line for line in named if "would fit" in line]
    rows = [row | {"image": "0.png", "split": "train"} for row in make_rows()[:2]]
    rows = [row | {"text": "A mass.", "boxes": "[[2, 2, 9, 9]]"} for row in rows]
    separate = summary_of(folder, rows, capfd, duplicates="separate")
    assert any("note: 2 rows of boxes share their image and text" in line for line in separate)


def test_copies_of_images_are_counted(folder, capfd):
    (folder / "11.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    expected = (
        "2 images are copies of others, as 11.png of 0.png; 1 in two splits: keep one of them"
    )
    assert expected in summary_of(folder, make_rows(), capfd)


def test_a_split_without_patients_says_how_many_there_are(folder):
    rows = [{key: row[key] for key in ("image", "text")} | {"patient_id": 7} for row in make_rows()]
    message = "none of its 1 patients fell into val with val_fraction 0.1; add rows .* `split`, or"
    with pytest.raises(UserError, match=message):
        open_pairs(folder, rows, "val")


# Mistakes -----------------------------------------------------------------------------------


REPORT = "Mr Miller has a large effusion. " * 20
CELLS_WITH_REPORTS = {
    "image of one row": change_first_row(image=REPORT),
    "image of all rows": make_rows(image=REPORT),
    "image and short text": make_rows(image="Miller: effusion"),
    "embedded image": make_rows(image={"bytes": "x" * 9000, "path": REPORT}),
    "labels": make_rows(labels=REPORT),
    "label": make_rows(labels={REPORT: 1}),
    "value of a label": make_rows(labels={"Edema": REPORT}),
    "split": make_rows(split=REPORT),
    "patient in two splits": change_first_row(patient_id=REPORT)
    + change_first_row(patient_id=REPORT, split="val"),
    "boxes": make_rows(boxes=REPORT),
    "box": make_rows(boxes=[{"box": REPORT}]),
    "coordinate": make_rows(boxes=[[1, 2, 3, REPORT]]),
    "regions": make_rows(regions={REPORT: REPORT}),
    "mask": make_rows(mask=REPORT),
    "short mask": make_rows(mask=REPORT[:31]),
    "anatomy": make_rows(anatomy=REPORT),
    "column": [{REPORT: "a", "image": "0.png"}],
    "texts of one image": change_first_row() + change_first_row(text=REPORT),
}


@pytest.mark.parametrize("kind", CELLS_WITH_REPORTS)
def test_no_message_and_no_list_shows_a_report(folder, kind, capfd):
    rows = CELLS_WITH_REPORTS[kind]
    try:
        open_pairs(folder, rows, name="m.jsonl", max_bad=0.5)
        message = ""
    except UserError as error:
        message = str(error)
    shown = message + capfd.readouterr().err
    for path in (folder.parent / "data").rglob("*.txt"):
        shown += path.read_text("utf-8")
    assert "Miller" not in shown and len(shown) < 1500
    assert message or "skipped 1 of 12 rows" in shown


def test_unusable_rows_are_skipped_counted_and_named(folder, capfd):
    rows = make_rows()
    (folder / "0.png").write_bytes(b"not an image")
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes()[:60])
    rows[2]["image"] = "absent.png"
    rows[3]["text"] = " . "
    assert len(open_pairs(folder, rows, max_bad=0.5)) == 4
    output = capfd.readouterr().err
    assert "skipped 4 of 12 rows: absent.png (does not exist), 3.png (its text is empty)" in output
    assert "0.png (is not an image that can be read)" in output and "1.png (" in output
    (list_of_skipped,) = (folder.parent / "data").rglob("skipped_rows.txt")
    assert len(list_of_skipped.read_text().splitlines()) == 4
    with pytest.raises(UserError, match=r"4 of 12 rows cannot be used.*absent.png.*max_bad"):
        open_pairs(folder, rows, max_bad=0.3)
    assert not list((folder.parent / "data").rglob("incomplete.*"))


TWO_PHRASES = '[[1, 1, 9, 9], {"box": [1, 1, 9, 9], "phrase": "a"}]'
MISTAKES = {
    "image outside": (
        change_first_row(image="../secret.png"),
        {},
        "path '../secret.png' of row 1 leaves the images folder .*; move it inside",
    ),
    "absolute path": (
        change_first_row(image="/etc/hostname"),
        {},
        "path '/etc/hostname' of row 1 leaves the images folder .*; move it inside",
    ),
    "patient in two splits": (
        change_first_row(split="val"),
        {},
        "patient 'p0' is in splits 'val' and 'train'; put all rows of a patient into one",
    ),
    "unknown split": (
        change_first_row(split="held out"),
        {},
        "split 'held out' is unknown; use train, val, test",
    ),
    "empty split": (
        change_first_row(split=""),
        {},
        "row 1 has no split in column 'split'; fill it or drop the column",
    ),
    "missing column": (
        make_rows(),
        {"columns": {"text": "report"}},
        r"column 'report' \(text\) is not in the manifest; it has|did you mean",
    ),
    "unknown role": (
        make_rows(),
        {"columns": {"txt": "text"}},
        "columns has the unknown role 'txt'; use image, text, ",
    ),
    "unknown column of filters": (
        make_rows(),
        {"filters": {"veiw": ["L"]}},
        "column 'veiw' of filters does not exist; it has|did you mean",
    ),
    "condition is a string": (
        make_rows(),
        {"filters": {"text": "L"}},
        "filters of 'text' is 'L'; write {\"in\": ",
    ),
    "unknown rule": (
        make_rows(),
        {"filters": {"text": {"is": ["L"]}}},
        "filters of 'text' is .*; write {\"in\": ",
    ),
    "no rows": (
        make_rows(),
        {"min_words": 99},
        r"has no row left \(min_words leaves out 12 rows\); loosen filters or min_words",
    ),
    "filter of an absent value": (
        make_rows(),
        {"filters": {"patient_id": ["XX"]}},
        "has no row left .*no row has 'XX' in column 'patient_id'.; loosen filters",
    ),
    "size": (make_rows(), {"size": 2}, "size 2 of .* is too small; use at least 8 pixels"),
    "fraction": (make_rows(), {"max_bad": 3}, "max_bad 3.0 is not a fraction; use 0 to 1"),
    "sum of fractions": (
        make_rows(),
        {"val_fraction": 0.9, "test_fraction": 0.9},
        "val_fraction 0.9 and test_fraction 0.9 are more than all patients; lower one of them",
    ),
    "missing manifest": (
        make_rows(),
        {"manifest": "absent.csv"},
        "manifest absent.csv does not exist; give the path of a file",
    ),
    "no manifest": (
        make_rows(),
        {"manifest": ""},
        "dataset pairs has no manifest; give data.builder.manifest",
    ),
    "missing folder": (
        make_rows(),
        {"images": "absent"},
        "images folder .*absent does not exist; give a folder",
    ),
    "manifest of an unknown user": (
        make_rows(),
        {"manifest": "~nobody_x/m.csv"},
        "manifest ~nobody_x/m.csv does not exist; give the path of a file",
    ),
    "folder of an unknown user": (
        make_rows(),
        {"images": "~nobody_x/images"},
        "images folder .*~nobody_x/images does not exist; give a folder",
    ),
    "no text": (
        make_rows(text=""),
        {},
        "12 of 12 rows cannot be used, .*its text is empty.*; fix them or raise max_bad",
    ),
    "labels": (
        make_rows(labels="{x"),
        {},
        "12 of 12 rows cannot be used, .*; fix them or raise max_bad",
    ),
    "boxes": (
        make_rows(boxes="[[1, 2, 3]]"),
        {},
        r"12 of 12 rows cannot be used, .*is not \[x0, y0, x1, y1\].* raise max_bad",
    ),
    "box outside": (
        make_rows(boxes="[[50, 2, 60, 4]]"),
        {},
        "rows cannot be used.*lies outside of its 40 x 30 image.*; fix them or raise max_bad",
    ),
    "mask of two phrases": (
        make_rows(mask="0.png", boxes=TWO_PHRASES),
        {},
        "12 of 12 rows cannot be used, .*mask is neither one path for one phrase nor",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(folder, mistake):
    rows, config, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as raised:
        open_pairs(folder, rows, **config)
    assert "\n" not in str(raised.value)
    assert not list((folder.parent / "data").rglob("*.json"))


def make_files_of_many_kinds():
    """Returns name -> content of images, one of each kind of pixels."""
    picture = draw_picture()
    twelve_bits = np.round(picture * 4095).astype(np.uint16)
    sixteen_bits = np.round(picture * 65535).astype(np.uint16)[..., None]
    colour = np.stack([picture, picture**2, 1 - picture], axis=-1)
    window = {"WindowCenter": 1500, "WindowWidth": 2000, "BitsStored": 12}
    return {
        "grey.png": make_png(np.round(picture * 255).astype(np.uint8)[..., None], 0, 8),
        "12_bits.png": make_png(twelve_bits[..., None], 0),
        "16_bits.png": make_png(sixteen_bits, 0),
        "colour.png": make_png(np.round(colour * 255).astype(np.uint8), 2, 8),
        "16_bits_colour.png": make_png(np.round(colour * 65535).astype(np.uint16), 2),
        "unit.tif": make_tiff(picture[..., None]),
        "white_zero.tif": make_tiff(sixteen_bits, photometric=0),
        "window.dcm": make_dicom(twelve_bits, **window),
        "bits_stored.dcm": make_dicom(twelve_bits, BitsStored=12),
        "no_depth.dcm": make_dicom(twelve_bits),
    }


# The version of the records, and digests of the pixels that it stands for.
PIXELS_OF_VERSION = "1.6.0"
PIXELS = {
    "grey.png": "69ef3132",
    "12_bits.png": "69ef3132",
    "16_bits.png": "69ef3132",
    "colour.png": "3c2da97b",
    "16_bits_colour.png": "6669a10c",
    "unit.tif": "69ef3132",
    "white_zero.tif": "2c05da7d",
    "window.dcm": "b0249816",
    "bits_stored.dcm": "69ef3132",
    "no_depth.dcm": "69ef3132",
}


def test_other_pixels_are_another_version_of_the_records(tmp_path):
    """Records that an earlier decoder has prepared must not be taken for those of this one."""
    digests = {}
    for name, content in make_files_of_many_kinds().items():
        (tmp_path / name).write_bytes(content)
        pixels, _ = images.read_image(tmp_path / name, 24)
        digests[name] = hashlib.sha256(pixels.tobytes()).hexdigest()[:8]
    assert (str(Pairs.VERSION), digests) == (PIXELS_OF_VERSION, PIXELS), (
        "raise Pairs.VERSION, and write it and the new digests into this file"
    )


# Real data ----------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason=f"the real radiographs are not at {SHARED}")
def test_real_radiographs_build(tmp_path):
    config = {
        "manifest": str(SHARED / "covid_cxr" / "manifest.csv"),
        "size": 64,
        "columns": {"text": "text_findings", "labels": "finding"},
        "min_words": 4,
        "filters": {"view": {"not": ["L"]}, "overlay_marks": {"in": ["0"]}},
        "box_where": {"group": ["pathology"], "level": ["component", "whole"]},
    }
    train = open_dataset("pairs", "train", data_dir=str(tmp_path), **config)
    val = open_dataset("pairs", "val", data_dir=str(tmp_path), **config)
    assert (len(train), len(val)) == (104, 10)
    assert not {record.patient_id for record in train} & {record.patient_id for record in val}
    records = [*train, *val]
    assert all(max(record.image.shape) == 64 for record in records)
    assert all(np.ptp(record.image) > 100 for record in records)
    grounded = [record for record in records if record.phrases]
    assert len(grounded) == 34
    for record in grounded:
        rows, columns = record.image.shape[:2]
        for box in (box for phrase in record.phrases for box in phrase.boxes):
            assert 0 <= box[0] < box[2] <= columns and 0 <= box[1] < box[3] <= rows


def test_cached_records_are_read_for_evaluation(folder):
    dataset = open_pairs(folder, make_rows(), cache=True)
    assert dataset.read_pair(2) is dataset.read_pair(2)
    assert len(open_records(dataset, None, 32)) == 8
