"""BRAX: both names of its table, views, strips, accession numbers of two patients."""

import pytest
from miniatures import brax as miniature

from plan_jax.data.builders import brax
from plan_jax.data.builders.brax import FACTS, BraxConfig
from plan_jax.data.dataset import list_splits, open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **fields):
    """Returns the folder as it was read, and its items."""
    source = SourceFolder(folder, FACTS.page)
    config = BraxConfig(name="", source=str(folder), **fields)
    return source, list(brax.read_items(source, config))


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_each_version_has_the_same_films(tmp_path, version):
    paths = miniature.write(tmp_path, version)
    source, items = read(tmp_path)
    assert [item.image for item in items] == paths[:5] and all(map(source.has, paths))
    strip = paths[5].removeprefix("images/").removesuffix(".png")
    assert source.dropped == {"an image is a strip": [strip]}
    assert [item.view for item in items] == ["PA", "LATERAL", "AP", "UNKNOWN", "OTHER"]
    assert [item.patient_id for item in items] == ["100", "100", "200", "300", "400"]
    assert [item.study_id for item in items] == ["100/7", "100/7", "200/7", "300/8", "400/9"]
    assert {item.split for item in items} == {""} and FACTS.default_split == "hash"
    assert FACTS.findings == miniature.LABELS


def test_labels_keep_doubt_and_blanks_apart(tmp_path):
    miniature.write(tmp_path)
    for blank in (-1, 0):
        _, items = read(tmp_path, label_blank=blank)
        labels = items[0].labels
        assert (labels["Cardiomegaly"], labels["Pneumonia"], labels["Edema"]) == (1, 0, -1)
        assert labels["Fracture"] == blank
    with pytest.raises(UserError, match="label_blank 2 of dataset brax"):
        BraxConfig(name="", label_blank=2)


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_dicom_files_are_read_where_there_is_no_png(tmp_path, version):
    paths = miniature.write(tmp_path / "brax", version, dicom=True)
    assert paths[0].endswith(".dcm") == (version == "1.1.0")
    source, items = read(tmp_path / "brax")
    assert [item.image for item in items] == paths[:5] and all(map(source.has, paths))
    fields = {"source": str(tmp_path / "brax"), "size": 25, "views": "all"}
    fields |= {"data_dir": str(tmp_path / "data"), "val_fraction": 0.0, "test_fraction": 0.0}
    records = {record.record_id: record for record in open_dataset("brax", "train", **fields)}
    for number, item in enumerate(items):
        grey = records[item.image_id].image[..., 0]
        rows, columns = miniature.draw(number).shape
        assert grey.shape == (25 * rows // 50, 25 * columns // 50)
        # The square is bright in an inverted film too.
        assert grey[5:11, :3].min() == 255 and abs(int(grey[18, 10]) - 30 * number) <= 1


def test_a_row_without_a_patient_is_dropped(tmp_path):
    miniature.write(tmp_path)
    table = tmp_path / "master_spreadsheet_update.csv"
    table.write_text(table.read_text().replace(".png,400,", ".png,,"))
    source, items = read(tmp_path)
    assert [item.patient_id for item in items] == ["100", "100", "200", "300"]
    (name,) = source.dropped["a row has no patient id"]
    assert name.startswith("id_400/")


def test_a_missing_table_or_column_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no master_spreadsheet_update.csv \(or"):
        read(tmp_path)
    (tmp_path / "master_spreadsheet_update.csv").write_text("PngPath,PatientID\n")
    with pytest.raises(UserError, match="has no column 'AccessionNumber', 'ViewPosition'"):
        read(tmp_path)


def test_frontal_films_become_records(tmp_path):
    miniature.write(tmp_path / "brax")
    fields = {"data_dir": str(tmp_path / "data"), "source": str(tmp_path / "brax"), "size": 25}
    splits = list_splits("brax", **fields)
    records = [record for split in splits for record in open_dataset("brax", split, **fields)]
    assert {(record.patient_id, record.view) for record in records} == {
        ("100", "PA"),
        ("200", "AP"),
    }
    assert {record.image.shape for record in records} == {(20, 25, 1)}
