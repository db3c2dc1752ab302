"""MS-CXR: both versions as CSV and as JSON, phrases of several boxes, films elsewhere."""

import json
import zipfile

import numpy as np
import pytest
from miniatures import mimic_cxr as mimic_miniature
from miniatures import ms_cxr as miniature

from plan_jax.data.builders import ms_cxr
from plan_jax.data.builders.ms_cxr import FACTS, MsCxrConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public import summary
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError

FIRST, SECOND, ABSENT = (
    film.dicom_id for film in (miniature.FIRST, miniature.SECOND, miniature.ABSENT)
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic_cxr_jpg")
    mimic_miniature.write(folder, reports="none")
    return folder


def read(folder, images="", **fields):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, FACTS.page)
    config = MsCxrConfig(name="", source=str(folder), images=str(images), **fields)
    return source, {item.image_id: item for item in ms_cxr.read_items(source, config)}


@pytest.mark.parametrize("version", ["0.1", "1.1.0"])
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_each_version_has_the_same_phrases(tmp_path, images, version, suffix):
    miniature.write(tmp_path, version, suffix)
    source, items = read(tmp_path, images)
    assert list(items) == [FIRST, SECOND, ABSENT]
    phrases = [(box.phrase, box.label, box.corners) for box in items[FIRST].boxes]
    assert phrases == [
        ("left basal edema", "Edema", (4, 10, 14, 30)),
        ("left basal edema", "Edema", (20, 12, 28, 18)),
        ("left basal edema", "Edema", (5, 11, 14, 30)),
        ("large heart", "Cardiomegaly", (0, 0, 47, 59)),
    ]
    assert [box.corners for box in items[SECOND].boxes] == [(8, 0, 24, 12)]
    assert source.dropped == {"a box has no area": [SECOND]}
    assert source.notes == [
        "phrases that are listed under two categories, and count for the first: 1"
    ]
    first = items[FIRST]
    assert (first.patient_id, first.study_id) == (mimic_miniature.MS_CXR_PATIENT, "50000004")
    assert first.shape == (mimic_miniature.ROWS, mimic_miniature.COLUMNS)
    assert first.labels == {"Edema": 1, "Lung Opacity": 1, "Cardiomegaly": 1}
    assert {item.split for item in items.values()} == {"test"}


def test_a_packed_table_is_read(tmp_path, images):
    miniature.write(tmp_path, "1.1.0", "json")
    path = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json"
    with zipfile.ZipFile(f"{path}.zip", "w") as archive:
        archive.write(path, path.name)
    path.unlink()
    assert list(read(tmp_path, images)[1]) == [FIRST, SECOND, ABSENT]


def test_films_lie_in_the_folder_of_mimic_cxr(tmp_path, images):
    miniature.write(tmp_path)
    _, items = read(tmp_path, images)
    config = MsCxrConfig(name="", source=str(tmp_path), images=str(images))
    assert (config.image_root / items[FIRST].image).is_file()
    assert not (config.image_root / items[ABSENT].image).exists()
    assert MsCxrConfig(name="", source=str(images)).image_root == images


@pytest.mark.parametrize("part", ["", "files"])
def test_the_folder_of_films_may_be_named_with_or_without_files(tmp_path, images, part):
    miniature.write(tmp_path)
    _, items = read(tmp_path, images / part)
    assert (images / part / items[FIRST].image).is_file()


def test_without_films_the_option_is_named(tmp_path, images):
    miniature.write(tmp_path)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    sentence = str(error.value)
    assert "has no folder files/p10 to files/p19 of images; download MIMIC-CXR-JPG" in sentence
    assert "data.builder.images" in sentence
    with pytest.raises(UserError, match="has no MS_CXR_Local_Alignment_v1.1.0.csv"):
        read(images, images)


def test_the_official_split_is_that_of_version_1_1_0(tmp_path, images):
    miniature.write(tmp_path / "new")
    _, items = read(tmp_path / "new", images, split="official")
    assert {name: item.split for name, item in items.items()} == {
        FIRST: "test",
        SECOND: "train",
        ABSENT: "val",
    }
    table = tmp_path / "new/MS_CXR_Local_Alignment_v1.1.0.csv"
    table.write_text(table.read_text().replace(",val", ",dev"))
    with pytest.raises(UserError, match="split 'dev' of .* is none of train, val, test"):
        read(tmp_path / "new", images, split="official")
    _, items = read(tmp_path / "new", images, split="hash")
    assert {item.split for item in items.values()} == {""}
    miniature.write(tmp_path / "old", "0.1")
    with pytest.raises(UserError, match=r"has no split of every film; download version 1.1.0"):
        read(tmp_path / "old", images, split="official")


def test_a_table_of_another_format_is_refused(tmp_path, images):
    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json").write_text('{"categories": [], "images": []}')
    with pytest.raises(UserError, match="lacks 'annotations' of COCO's format"):
        read(tmp_path, images)


def test_a_path_of_another_image_is_dropped(tmp_path, images):
    miniature.write(tmp_path)
    table = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv"
    table.write_text(table.read_text().replace(f"/{SECOND}.jpg", "/../../x.jpg"))
    source, items = read(tmp_path, images)
    assert SECOND not in items
    assert source.dropped["a path does not name its image"] == [SECOND]


def test_the_patients_of_a_table_are_read(tmp_path):
    for version, suffix in (("1.1.0", "csv"), ("0.1", "json")):
        miniature.write(tmp_path, version, suffix)
        patients = ms_cxr.find_patients(SourceFolder(tmp_path), "")
        assert patients == {film.patient_id for film, *_ in miniature.BOXES}


def test_boxes_of_records_go_back_to_the_original(tmp_path, images):
    miniature.write(tmp_path / "ms_cxr")
    records = open_dataset(
        "ms_cxr",
        "test",
        data_dir=str(tmp_path / "data"),
        source=str(tmp_path / "ms_cxr"),
        images=str(images),
        size=30,
        max_bad=0.5,
    )
    assert records.findings == FACTS.findings
    by_name = {record.record_id: record for record in records}
    assert set(by_name) == {FIRST, SECOND}
    first = by_name[FIRST]
    phrases = {phrase.text: phrase for phrase in first.phrases}
    assert list(phrases) == ["left basal edema", "large heart"]
    assert phrases["large heart"].finding == FACTS.findings.index("Cardiomegaly")
    boxes = first.geometry.to_original(np.asarray(phrases["left basal edema"].boxes))
    expected = np.asarray([(4, 10, 14, 30), (20, 12, 28, 18), (5, 11, 14, 30)])
    assert np.abs(boxes - expected).max() < 1
    content = json.loads((records.folder / summary.SUMMARY_FILE).read_text())
    assert content["dropped"] == {"a box has no area": 1, "image is missing or empty": 1}


def test_a_film_of_another_size_than_its_boxes_is_left_out(tmp_path, images):
    miniature.write(tmp_path / "ms_cxr")
    table = tmp_path / "ms_cxr/MS_CXR_Local_Alignment_v1.1.0.csv"
    lines = table.read_text().splitlines(keepends=True)
    lines = [line.replace(",48,60,", ",480,600,") if SECOND in line else line for line in lines]
    table.write_text("".join(lines))
    fields = {"source": str(tmp_path / "ms_cxr"), "images": str(images), "size": 30}
    records = open_dataset("ms_cxr", "test", data_dir=str(tmp_path / "data"), max_bad=0.5, **fields)
    assert [record.record_id for record in records] == [FIRST]
    content = json.loads((records.folder / summary.SUMMARY_FILE).read_text())
    assert content["dropped"]["image has another size than its table states"] == 1
