"""A user's own pairs: manifests, images, splits, and what is said of mistakes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plan_jax.data import dataset as datasets
from plan_jax.data import loader
from plan_jax.data.pairs import manifest
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def grey(path, y=30, x=40, value=None):
    pixels = np.add.outer(np.arange(y), np.arange(x)) if value is None else np.full((y, x), value)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve images, two of each of six patients, and their rows."""
    where = tmp_path / "pairs"
    where.mkdir()
    for i in range(12):
        grey(where / f"{i}.png", value=i * 20)
    return where


def rows(**changed):
    made = [
        {
            "image": f"{i}.png",
            "text": f"Finding number {i}. No effusion.",
            "patient_id": f"p{i // 2}",
            "split": ["train", "train", "train", "train", "val", "test"][i // 2],
        }
        for i in range(12)
    ]
    for row in made:
        row.update(changed)
    return made


def write(folder, rows, name="manifest.csv"):
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def opened(folder, rows, split="train", name="manifest.csv", **config):
    path = write(folder, rows, name)
    config = {"manifest": path, "size": 32} | config
    return datasets.open_dataset("pairs", split, data_dir=str(folder.parent / "data"), **config)


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_a_manifest_of_any_kind_is_read(folder, name, capfd):
    found = opened(folder, rows(), name=name)
    assert len(found) == 8
    assert found[0].image.shape == (24, 32, 1)
    by_text = {r.text: r for r in found}
    assert by_text["Finding number 3. No effusion."].patient_id == "p1"
    assert by_text["Finding number 3. No effusion."].image[0, 0, 0] == 60
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("preparing pairs in ") and said.err.count("\n") == 1
    assert "train 8, val 2, test 2; " in said.err
    assert len(opened(folder, rows(), "test", name=name)) == 2
    assert capfd.readouterr().err == ""  # it is there


def test_another_configuration_or_manifest_is_another_folder(folder):
    opened(folder, rows())
    opened(folder, rows(), size=16)
    opened(folder, rows(text="Other text."))
    found = [p for p in (folder.parent / "data" / "pairs").iterdir() if p.is_dir()]
    assert len(found) == 3
    assert opened(folder, rows(), size=16)[0].image.shape == (12, 16, 1)


def test_cached_rows_train(folder):
    found = opened(folder, rows(), cache=True)
    assert found.image_text(2) is found.image_text(2)
    assert len(loader.records(found, size=32)) == 8


def test_splits_by_hash_are_stable_and_keep_patients_together(folder):
    plain = [{k: row[k] for k in ("image", "text", "patient_id")} for row in rows()]
    shares = {"val_fraction": 0.3, "test_fraction": 0.3}
    seen = {}
    for split in ("train", "val", "test"):
        try:
            found = opened(folder, plain, split, **shares)
        except UserError:
            continue
        for record in found:
            assert seen.setdefault(record.patient_id, split) == split
        for record in found:
            assert manifest.split_of(None, record.patient_id, (0.3, 0.3)) == split
    assert len(seen) == 6
    many = [manifest.split_of(None, str(i), (0.2, 0.1)) for i in range(4000)]
    assert abs(many.count("val") / 4000 - 0.2) < 0.02
    assert abs(many.count("test") / 4000 - 0.1) < 0.02


def test_a_column_of_splits_can_be_passed_over(folder):
    found = opened(folder, rows(), columns={"split": ""}, val_fraction=0.0, test_fraction=0.0)
    assert len(found) == 12


def test_without_patients_the_image_decides(folder):
    plain = [{"image": row["image"], "text": row["text"]} for row in rows()]
    found = opened(folder, plain, val_fraction=0, test_fraction=0)
    assert {record.patient_id for record in found} == {f"{i}.png" for i in range(12)}


def test_labels_are_read_as_lists_and_objects(folder):
    made = rows(labels="")
    made[0]["labels"] = "oedema; effusion"
    made[1]["labels"] = json.dumps({"oedema": 0, "effusion": None})
    made[2]["labels"] = "[]"
    found = opened(folder, made)
    assert found.findings == ("effusion", "oedema")
    by_text = {record.text.split(".")[0][-1]: record.labels.tolist() for record in found}
    assert by_text["0"] == [1, 1]
    assert by_text["1"] == [-1, 0]
    assert by_text["2"] == [0, 0]
    assert by_text["3"] == [-1, -1]
    chosen = opened(folder, made, findings=("oedema", "nodule"))
    assert chosen.findings == ("oedema", "nodule")
    assert sorted(record.labels.tolist() for record in chosen)[-1] == [1, -1]


def test_boxes_and_masks_follow_the_resize(folder):
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 4:12] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    made = rows(boxes="", mask="")
    made[0]["boxes"] = json.dumps(
        [
            {"box": [4, 10, 12, 20], "phrase": "left effusion", "label": "effusion", "by": "a"},
            {"box": [20, 0, 50, 15], "phrase": "left effusion", "label": "effusion", "by": "a"},
            {"box": [1, 1, 2, 2], "phrase": "heart", "label": "heart", "by": "b"},
        ]
    )
    made[1]["mask"] = "mask.png"
    made[2]["mask"] = json.dumps({"oedema": "mask.png"})
    made[2]["boxes"] = "[[4, 10, 12, 20]]"
    found = opened(folder, made, size=80, box_where={"by": {"not": ["b"]}})
    by_text = {record.text.split(".")[0][-1]: record.phrases for record in found}
    (phrase,) = by_text["0"]
    assert (phrase.text, phrase.bare, phrase.key) == ("left effusion", "effusion", "left effusion")
    assert found.findings[phrase.finding] == "effusion"
    assert phrase.boxes == ((8.0, 20.0, 24.0, 40.0), (40.0, 0.0, 80.0, 30.0))
    (whole,) = by_text["1"]
    assert whole.text == "Finding number 1. No effusion."
    assert whole.mask.shape == (60, 80)
    assert whole.mask[24:36, 12:20].all() and whole.mask.sum() == pytest.approx(20 * 16, rel=0.1)
    boxed, masked = by_text["2"]
    assert boxed.boxes == ((8.0, 20.0, 24.0, 40.0),) and boxed.mask is None
    assert masked.text == "oedema" and masked.mask is not None
    assert by_text["3"] == ()


def test_images_without_text_have_labels_in_columns_and_masks_of_organs(folder):
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 4:12] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    made = rows(text="", Edema="1.0", Mass="", lung_mask="mask.png")
    made[0] |= {"Edema": "-1", "Mass": "0", "lung_mask": ""}
    columns = {"columns": {"anatomy": "lung_mask"}, "label_columns": ("Edema", "Mass")}
    found = opened(folder, made, size=80, text_optional=True, **columns)
    assert found.findings == ("Edema", "Mass") and found.anatomy_names == ("lung",)
    by_first = sorted(((r.labels.tolist(), r) for r in found), key=lambda pair: pair[0])
    assert [labels for labels, _ in by_first] == [[-1, 0]] + [[1, -1]] * 7
    assert by_first[0][1].anatomy == {} and by_first[0][1].text == ""
    lung = by_first[1][1].anatomy["lung"]
    assert lung.shape == (60, 80) and lung[24:36, 12:20].all()
    blank = opened(folder, made, text_optional=True, label_blank=0, **columns)
    assert sorted(r.labels.tolist() for r in blank) == [[-1, 0]] + [[1, 0]] * 7
    with pytest.raises(UserError, match="8 of 12 rows|12 of 12 rows"):
        opened(folder, made, **columns)
    with pytest.raises(UserError, match="column 'Oedema' of label_columns does not exist"):
        opened(folder, made, text_optional=True, label_columns=("Oedema",))
    without = [{k: v for k, v in row.items() if k != "text"} for row in made]
    assert len(opened(folder, without, text_optional=True)) == 8


def test_filters_choose_rows(folder):
    made = rows(view="PA")
    made[0]["view"], made[1]["text"] = "L", "short"
    found = opened(folder, made, filters={"view": {"not": ["L"]}}, min_words=2)
    assert len(found) == 6
    assert len(opened(folder, made, filters={"view": ["L"]})) == 1


def test_unusable_rows_are_named_counted_and_left_out(folder, capfd):
    made = rows()
    (folder / "0.png").write_bytes(b"not an image")
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes()[:60])
    made[2]["image"] = "absent.png"
    made[3]["text"] = " . "
    found = opened(folder, made, max_bad=0.5)
    assert len(found) == 4
    said = capfd.readouterr().err
    assert "left out 4 of 12 rows: absent.png (does not exist), 3.png (its text is empty)" in said
    assert "0.png (is no image)" in said and "1.png (" in said
    (listed,) = (folder.parent / "data").rglob("left_out.txt")
    assert len(listed.read_text().splitlines()) == 4
    with pytest.raises(UserError, match=r"4 of 12 rows cannot be used.*absent.png"):
        opened(folder, made, max_bad=0.3)
    assert not list((folder.parent / "data").rglob("incomplete.*"))


def broken(**first):
    made = rows()
    made[0].update(first)
    return made


@pytest.mark.parametrize(
    ("made", "config", "message"),
    [
        (broken(image="../secret.png"), {}, "path '../secret.png' of row 1 leaves the images"),
        (broken(image="/etc/hostname"), {}, "path '/etc/hostname' of row 1 leaves"),
        (broken(split="val"), {}, "patient 'p0' is in splits 'val' and 'train'"),
        (broken(split="held out"), {}, "split 'held out' is unknown"),
        (broken(split=""), {}, "row 1 has no split"),
        (rows(), {"columns": {"text": "report"}}, "column 'report' .text. is not in the manifest"),
        (rows(), {"columns": {"txt": "text"}}, "unknown role 'txt'"),
        (rows(), {"filters": {"veiw": ["L"]}}, "column 'veiw' of filters does not exist"),
        (rows(), {"filters": {"text": "L"}}, "filters of 'text' is 'L'; write"),
        (rows(), {"filters": {"text": {"is": ["L"]}}}, "filters of 'text' is .*; write"),
        (rows(), {"min_words": 99}, "has no row left"),
        (rows(), {"size": 2}, "size 2"),
        (rows(), {"max_bad": 3}, "max_bad 3.0 is no share"),
        (rows(), {"size": "32"}, "field 'size' of dataset pairs is '32'; give a whole number"),
        (rows(), {"findings": "a"}, "field 'findings' of dataset pairs is 'a'; give a list"),
        (rows(), {"sise": 2}, "field 'sise' of dataset pairs is unknown; did you mean size"),
        (rows(), {"manifest": "absent.csv"}, "manifest absent.csv does not exist"),
        (rows(), {"manifest": ""}, "no manifest"),
        (rows(), {"images": "absent"}, "images folder .*absent does not exist"),
        (rows(text=""), {}, "12 of 12 rows cannot be used"),
        (rows(labels="{x"), {}, "12 of 12 rows cannot be used"),
        (rows(boxes="[[1, 2, 3]]"), {}, "12 of 12 rows cannot be used"),
        (rows(boxes="[[50, 2, 60, 4]]"), {}, "rows cannot be used.*outside of its 40 x 30"),
        (rows(mask="0.png", boxes='[[1,1,9,9],{"box":[1,1,9,9],"phrase":"a"}]'), {}, "mask is nei"),
    ],
)
def test_mistakes_are_named_and_nothing_is_left(folder, made, config, message):
    with pytest.raises(UserError, match=message) as raised:
        opened(folder, made, **config)
    assert "\n" not in str(raised.value)
    assert not list((folder.parent / "data").rglob("*.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"image,text\n", "has no rows"),
        ("m.csv", b"image,text\na,b,c\n", "line 2 has not as many fields"),
        ("m.csv", b"image,text\n\xff,b\n", "is not UTF-8"),
        ("m.jsonl", b'{"image": 1}\n{', "line 2 is no JSON"),
        ("m.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("m.parquet", b"nothing", "cannot be read"),
        ("m.xlsx", b"", "is not CSV, JSONL or Parquet"),
    ],
)
def test_a_malformed_manifest_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path / name)


def test_unknown_names_are_told(folder):
    with pytest.raises(
        UserError, match="dataset 'phantoms' is unknown; choose from phantom, pairs"
    ):
        datasets.open_dataset("phantoms", "train")
    with pytest.raises(UserError, match="split 'trian' is not in dataset pairs; choose from train"):
        opened(folder, rows(), "trian")
    with pytest.raises(UserError, match="split 'train.:x.' cannot be read"):
        opened(folder, rows(), "train[:x]")
    assert len(opened(folder, rows(), "train[:50%]")) == 4
    (folder.parent / "data2").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        datasets.open_dataset(
            "pairs",
            "train",
            data_dir=str(folder.parent / "data2"),
            manifest=write(folder, rows()),
        )


PREPARE = """
import sys, time
from plan_jax.data import images, dataset
read = images.read_image
def slowly(path, size):
    time.sleep(float(sys.argv[3]))
    return read(path, size)
images.read_image = slowly
folder, manifest = sys.argv[1:3]
found = dataset.open_dataset("pairs", "train", data_dir=folder, manifest=manifest, size=32)
print(len(found))
assert "tensorflow" not in sys.modules
"""


def preparing(folder, path, pause):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(folder.parent / "data"), path, str(pause)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_at_once_prepare_it_once_after_one_was_killed(folder):
    path = write(folder, rows())
    killed = preparing(folder, path, 60)
    begun = time.monotonic()
    while not list((folder.parent / "data").rglob("incomplete.*")):
        assert killed.poll() is None and time.monotonic() - begun < 60
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list((folder.parent / "data").rglob("incomplete.*"))

    both = [preparing(folder, path, 0.02) for _ in range(2)]
    said = [each.communicate() for each in both]
    assert [out.strip() for out, _ in said] == ["8", "8"], said
    assert sum("preparing" in err for _, err in said) == 1
    assert not list((folder.parent / "data").rglob("incomplete.*"))


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
    train = datasets.open_dataset("pairs", "train", data_dir=str(tmp_path), **config)
    val = datasets.open_dataset("pairs", "val", data_dir=str(tmp_path), **config)
    assert (len(train), len(val)) == (104, 10)
    assert not {r.patient_id for r in train} & {r.patient_id for r in val}
    every = [*train, *val]
    assert all(max(r.image.shape) == 64 and np.ptp(r.image) > 100 for r in every)
    grounded = [r for r in every if r.phrases]
    assert len(grounded) == 34
    for record in grounded:
        y, x = record.image.shape[:2]
        for box in (box for phrase in record.phrases for box in phrase.boxes):
            assert 0 <= box[0] < box[2] <= x and 0 <= box[1] < box[3] <= y
