"""MIMIC-CXR: both versions, every place of the reports, splits, and who is left out of train."""

import json
from collections import Counter

import numpy as np
import pytest
from miniatures import chest_imagenome as imagenome_miniature
from miniatures import mimic_cxr as miniature
from miniatures import ms_cxr as ms_cxr_miniature

from plan_jax.data.builders import mimic_cxr
from plan_jax.data.builders.mimic_cxr import FACTS, MimicCxrConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.preparation import check_dataset
from plan_jax.data.public import summary
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.sections import mimic
from plan_jax.types import UserError

# MS-CXR's patients in train, and Chest ImaGenome's gold patient.
EVALUATED_PATIENTS = {miniature.MS_CXR_PATIENT, miniature.GOLD_PATIENT}


def read(folder, **fields):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, FACTS.page)
    config = MimicCxrConfig(name="", source=str(folder), **fields)
    return source, {item.image_id: item for item in mimic_cxr.read_items(source, config)}


def count_splits(items):
    return dict(Counter(item.split for item in items.values()))


@pytest.mark.parametrize("version", ["2.0.0", "2.1.0"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "physionet.org/files/mimic-cxr-jpg/2.0.0"])
def test_each_layout_has_the_same_films(tmp_path, version, packed, below):
    films = miniature.write(tmp_path, version, packed=packed, below=below)
    source, items = read(tmp_path)
    assert source.notes[0] == f"version {version} of MIMIC-CXR-JPG" and not source.dropped
    assert list(items) == [film.dicom_id for film in films]
    for film in films:
        item = items[film.dicom_id]
        assert (item.patient_id, item.study_id) == (film.patient_id, film.study_id)
        assert item.split == {"validate": "val"}.get(film.split, film.split)
        assert source.has(item.image) and item.image.endswith(film.path)
    views = ["PA", "AP", "LATERAL", "LATERAL", "UNKNOWN", "AP", "PA", "AP", "PA", "AP", "OTHER"]
    assert [item.view for item in items.values()] == views


@pytest.mark.parametrize("place", ["tree", "zip", "folder", "archive", "patients", "mirror"])
def test_reports_are_found_in_every_place(tmp_path, place):
    root, other = tmp_path / "jpg", tmp_path / "reports"
    option = {"folder": other, "patients": other / "files", "archive": tmp_path / "r.zip"}
    where = {"patients": other, "mirror": root / "mimic-cxr/2.0.0"}.get(place, option.get(place))
    miniature.write(root, reports=where or place)
    source, items = read(root, reports=str(option.get(place, "")))
    texts = {study: row[-1] for study, row in miniature.STUDIES.items()}
    for item in items.values():
        assert item.sections.get("report") == texts[item.study_id]
    assert not source.dropped
    assert [note for note in source.notes if note.startswith("studies without a report: 1; ")]


def test_reports_are_split_into_sections(tmp_path):
    miniature.write(tmp_path)
    _, items = read(tmp_path)
    sections = {item.study_id: item.sections for item in items.values()}
    assert (
        " ".join(sections["50000001"]["findings"].split())
        == "The left base is hazy. No pneumothorax."
    )
    assert sections["50000001"]["impression"] == "Left basal ___ opacity."
    assert sections["50000003"]["findings"] == "Clear lungs."
    assert "catheter" in sections["50000003"]["addendum"]
    assert sections["50000005"]["impression"] == "Second reading."
    assert sections["50000006"]["last_paragraph"] == "No effusion."
    assert sections["50000004"] == {}


def test_conclusions_found_by_hand_are_an_option(tmp_path, monkeypatch):
    monkeypatch.setattr(mimic, "HAND_LISTED_STUDIES", {"s50000006"})
    monkeypatch.setattr(mimic, "_CONCLUSION_SECTIONS", {"s50000006": "full report"})
    miniature.write(tmp_path)
    for options, name, text in (
        ({}, "last_paragraph", "No effusion."),
        ({"hand_listed": True}, "impression", "FINAL REPORT\n The heart is large."),
    ):
        _, items = read(tmp_path, **options)
        (sections,) = (item.sections for item in items.values() if item.study_id == "50000006")
        assert sections.keys() - {"report", "full report"} == {name}
        assert sections[name] == text


def test_a_folder_without_reports_says_where_they_are(tmp_path):
    miniature.write(tmp_path, reports="none")
    source, items = read(tmp_path)
    assert not any(item.sections for item in items.values())
    note = next(note for note in source.notes if "without a report" in note)
    assert ": 9; " in note and "physionet.org/content/mimic-cxr/2.1.0" in note
    with pytest.raises(UserError, match=r"absent does not exist; correct data.builder.reports"):
        read(tmp_path, reports=str(tmp_path / "absent"))


def test_damaged_reports_are_dropped_without_their_text(tmp_path):
    miniature.write(tmp_path)
    (tmp_path / "files/p10/p10000001/s50000001.txt").write_bytes(b" FINDINGS:  \xff\xfe secret\n")
    source, items = read(tmp_path)
    assert source.dropped == {"a report is not UTF-8": ["s50000001"]}
    assert len(items) == len(miniature.FILMS)


def test_labels_are_those_of_the_study(tmp_path):
    miniature.write(tmp_path, "2.1.0")
    labels = {item.study_id: item.labels for item in read(tmp_path)[1].values()}
    first = labels["50000001"]
    assert (first["Lung Opacity"], first["Pneumothorax"]) == (1, 0)
    assert (first["Pneumonia"], first["Edema"]) == (-1, -1)
    assert labels["50000005"] == {}  # without a row
    labels = {item.study_id: item.labels for item in read(tmp_path, label_blank=0)[1].values()}
    first = labels["50000001"]
    assert (first["Pneumonia"], first["Edema"], labels["50000005"]) == (-1, 0, {})
    labels = {
        item.study_id: item.labels for item in read(tmp_path, labeller="radiologists")[1].values()
    }
    assert [study for study, values in labels.items() if values] == ["50000006"]
    assert [name for name, value in labels["50000006"].items() if value] == ["Lung Opacity"]


def test_studies_without_labels_are_counted(tmp_path):
    miniature.write(tmp_path, packed=False)
    source, _ = read(tmp_path)
    assert "studies that the table of labels does not list: 1" in source.notes
    table = tmp_path / "mimic-cxr-2.0.0-chexpert.csv"
    table.write_text(table.read_text().splitlines()[0])
    source, items = read(tmp_path)
    assert f"{table.name} lists no study, so no image has labels" in source.notes
    assert not any(item.labels for item in items.values())


def test_options_out_of_range_are_refused(tmp_path):
    with pytest.raises(UserError, match="label_blank 1 of dataset mimic_cxr is not a label"):
        MimicCxrConfig(name="", label_blank=1)
    with pytest.raises(
        UserError, match="labeller 'me' of dataset mimic_cxr is unknown; use one of"
    ):
        MimicCxrConfig(name="", labeller="me")
    miniature.write(tmp_path)
    with pytest.raises(UserError, match="has no mimic-cxr-2.1.0-test-set-labeled.csv; download it"):
        read(tmp_path, labeller="radiologists")


def test_a_label_that_is_none_is_refused(tmp_path):
    films = miniature.FILMS[:1]
    miniature.write_tables(tmp_path, films, {films[0].study_id: {"Edema": "maybe"}})
    with pytest.raises(
        UserError, match="label 'maybe' of Edema in study 50000001 of mimic-cxr-2.0"
    ):
        read(tmp_path)


@pytest.mark.parametrize("table", ["metadata", "split"])
def test_a_missing_table_is_named_with_its_page(tmp_path, table):
    miniature.write(tmp_path)
    (tmp_path / f"mimic-cxr-2.0.0-{table}.csv.gz").unlink()
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert f"has no mimic-cxr-2.0.0-{table}.csv; download it from physionet" in str(error.value)


def test_an_image_in_one_table_only_is_dropped(tmp_path):
    films = miniature.FILMS[:3]
    miniature.write_tables(tmp_path, films, {}, packed=False)
    split = tmp_path / "mimic-cxr-2.0.0-split.csv"
    split.write_text(split.read_text().replace(films[1].dicom_id, "another"))
    source, items = read(tmp_path)
    assert list(items) == [films[0].dicom_id, films[2].dicom_id]
    assert source.dropped == {
        "the table of splits does not list an image": [films[1].dicom_id],
        "the metadata do not list an image": ["another"],
    }


def test_another_split_than_the_three_is_refused(tmp_path):
    miniature.write_tables(tmp_path, miniature.FILMS[:1], {}, packed=False)
    split = tmp_path / "mimic-cxr-2.0.0-split.csv"
    split.write_text(split.read_text().replace(",train", ",dev"))
    with pytest.raises(UserError, match="split 'dev' of .* is none of train, validate, test"):
        read(tmp_path)


# Splits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["source", "folder", "table"])
def test_patients_of_evaluation_sets_are_left_out_of_train(tmp_path, place):
    root = tmp_path / "jpg"
    miniature.write(root)
    other = root if place == "source" else tmp_path
    ms_cxr_miniature.write(other / "ms-cxr/1.1.0")
    imagenome_miniature.write(other / "chest-imagenome")
    fields = {
        "source": {},
        "folder": {"ms_cxr": "ms-cxr", "chest_imagenome": "chest-imagenome"},
        "table": {
            "ms_cxr": "ms-cxr/1.1.0/MS_CXR_Local_Alignment_v1.1.0.csv",
            "chest_imagenome": "chest-imagenome/silver_dataset/splits/images_to_avoid.csv",
        },
    }[place]
    fields = {name: str(tmp_path / path) for name, path in fields.items()}
    evaluated = [film for film in miniature.FILMS if film.patient_id in EVALUATED_PATIENTS]
    source, items = read(root, **fields)
    assert source.dropped == {mimic_cxr.EVALUATED: [film.dicom_id for film in evaluated]}
    assert count_splits(items) == {"train": 7, "val": 1, "test": 1}
    source, items = read(root, split="hash", val_fraction=0.0, test_fraction=0.0, **fields)
    assert not {item.patient_id for item in items.values()} & EVALUATED_PATIENTS
    _, items = read(root, keep_evaluated=True, **fields)
    assert count_splits(items) == {"train": 9, "val": 1, "test": 1}


def test_absent_lists_of_evaluation_sets_are_noted(tmp_path):
    miniature.write(tmp_path)
    source, _ = read(tmp_path)
    notes = [note for note in source.notes if "train may have patients of" in note]
    assert len(notes) == 2 and "physionet.org/content/ms-cxr" in notes[1]
    with pytest.raises(UserError, match="has no silver_dataset/splits/images_to_avoid.csv"):
        read(tmp_path, chest_imagenome=str(tmp_path))


def test_tables_of_evaluation_sets_that_name_no_patient_are_refused(tmp_path):
    miniature.write(tmp_path)
    path = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv"
    path.write_text(",".join(ms_cxr_miniature.HEADER) + "\n")
    with pytest.raises(UserError, match=r"MS_CXR_Local_Alignment_v1.1.0.csv in .* names no pat"):
        read(tmp_path)


def test_the_rule_of_mgca_validates_on_the_test_split(tmp_path):
    miniature.write(tmp_path)
    ms_cxr_miniature.write(tmp_path / "ms-cxr")
    _, items = read(tmp_path, split="mgca_compat")
    expected = {
        film.dicom_id: "train" if film.split == "train" else "val" for film in miniature.FILMS
    }
    assert {name: item.split for name, item in items.items()} == expected
    study = min(mimic.HAND_LISTED_STUDIES).removeprefix("s")
    film = miniature.Film("00000000", study, "10000001", "train", "AP")
    miniature.write_tables(tmp_path, [film, miniature.FILMS[0]], {})
    _, items = read(tmp_path, split="mgca_compat")
    assert [item.split for item in items.values()] == ["unused", "train"]


def test_the_rule_of_chexzero_trains_on_everything(tmp_path):
    miniature.write(tmp_path)
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    _, items = read(tmp_path, split="chexzero_compat")
    assert count_splits(items) == {"train": len(miniature.FILMS)}


@pytest.mark.parametrize("rule", ["official", "mgca_compat", "hash", "5x200"])
def test_no_patient_is_in_two_splits(tmp_path, rule):
    films, labels = make_pool()
    miniature.write_tables(tmp_path, films, labels)
    _, items = read(tmp_path, split=rule, val_fraction=0.3, test_fraction=0.3)
    splits = {(item.patient_id, item.split) for item in items.values()} - {
        (item.patient_id, "unused") for item in items.values()
    }
    assert len(splits) == len({patient for patient, _ in splits}) > 3


def make_pool():
    """Returns films and labels of 60 studies of 20 patients: candidates of 5x200, and others."""
    films, labels = [], {}
    for number in range(60):
        study, patient = f"{51000000 + number}", f"{10000000 + number % 20}"
        split = {18: "validate", 19: "test"}.get(number % 20, "train")
        view = "LATERAL" if number % 7 == 0 else "PA"
        name = miniature.name_image(study, number)
        films.append(miniature.Film(name, study, patient, split, view))
        labels[study] = {mimic_cxr.CLASSES[number % 4]: "1.0", "No Finding": "0.0"}
        if number % 5 == 0:
            labels[study]["Fracture"] = "-1.0" if number % 2 else "1.0"
        if number % 11 == 0:
            labels[study] = {mimic_cxr.CLASSES[number % 4]: "-1.0"}
    return films, labels


def test_5x200_is_drawn_by_its_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(mimic_cxr, "PER_CLASS", 2)
    films, labels = make_pool()
    miniature.write_tables(tmp_path, films, labels)
    source, items = read(tmp_path, split="5x200")
    expected = set()
    for name in mimic_cxr.CLASSES:
        # One label of 1, no doubt about another, frontal, of the official training split.
        pool = sorted(
            film.dicom_id
            for film in films
            if film.view == "PA"
            and film.split == "train"
            and labels[film.study_id].get(name) == "1.0"
            and "Fracture" not in labels[film.study_id]
        )
        assert name == "Pleural Effusion" or len(pool) > 2
        count = min(2, len(pool))
        expected |= {
            pool[index]
            for index in np.random.RandomState(0).choice(len(pool), count, replace=False)
        }
    drawn = {name for name, item in items.items() if item.split == "test"}
    assert drawn == expected and len(drawn) == 8
    assert "5x200 has only 0 films of Pleural Effusion" in source.notes
    patients = {items[name].patient_id for name in drawn}
    for film in films:
        if film.dicom_id in drawn:
            continue
        is_left_out = film.patient_id in patients or film.split == "test"
        split = {"validate": "val"}.get(film.split, film.split)
        assert items[film.dicom_id].split == ("unused" if is_left_out else split)


def test_records_depend_on_whether_reports_are_named_but_not_on_where_they_are():
    def digest(**fields):
        return MimicCxrConfig(name="", **fields).digest()

    assert digest(reports="a") == digest(reports="b", source="c", workers=3)
    assert len({digest(), digest(reports="a"), digest(ms_cxr="a"), digest(label_blank=0)}) == 4


# From the folder to records -----------------------------------------------------------------------


def test_records_have_images_reports_and_labels(tmp_path):
    root = tmp_path / "jpg"
    films = {film.dicom_id: film for film in miniature.write(root, reports="zip")}
    fields = {"data_dir": str(tmp_path / "data"), "source": str(root), "size": 30, "max_bad": 0.5}
    splits = {
        split: open_dataset("mimic_cxr", split, **fields) for split in ("train", "val", "test")
    }
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 4,
        "val": 1,
        "test": 1,
    }
    names = set()
    for split, records in splits.items():
        assert records.findings == FACTS.findings
        for record in records:
            film = films[record.record_id]
            names.add(film.study_id)
            assert {"validate": "val"}.get(film.split, film.split) == split
            assert (record.patient_id, record.study_id) == (film.patient_id, film.study_id)
            assert record.view == film.view and record.geometry.shape == (60, 48)
            assert record.image.shape == (30, 24, 1)
            assert record.image[6:14, 5:11].min() > 200 > record.image[16:, 13:].max()
            assert record.sections.get("report") == miniature.STUDIES[film.study_id][-1]
            labels = dict(zip(FACTS.findings, record.labels.tolist(), strict=True))
            cells = miniature.STUDIES[film.study_id][3] or {}
            assert labels == {name: int(float(cells.get(name, -1))) for name in miniature.LABELS}
    assert names == {"50000001", "50000004", "50000005", "50000006", "50000007"}
    content = json.loads((records.folder / summary.SUMMARY_FILE).read_text())
    assert content["splits"]["train"] == {"images": 4, "patients": 3, "studies": 3}
    assert content["leaks"] == {"val": 0, "test": 0}
    assert sum(content["dropped"].values()) == 5  # laterals, without a view, turned, cut off
    dropped = (records.folder / summary.DROPPED_FILE).read_text()
    cut_off = next(film for film in films.values() if film.study_id == miniature.TRUNCATED)
    assert any(cut_off.dicom_id in line and "broken image" in line for line in dropped.splitlines())


def test_a_check_needs_no_images(tmp_path):
    miniature.write_tables(tmp_path, miniature.FILMS, {})
    lines = check_dataset("mimic_cxr", {"source": str(tmp_path)})
    assert "train: 5 images, 4 studies, 4 patients" in lines
    assert any(line.startswith("7 of 7 images are missing") for line in lines)
    lines = check_dataset("mimic_cxr", {"source": str(tmp_path), "split": "chexzero_compat"})
    assert f"leak of the rule chexzero_compat: {FACTS.leaks['chexzero_compat']}" in lines


def test_a_damaged_archive_is_named_and_a_damaged_member_is_dropped(tmp_path):
    miniature.write(tmp_path, reports="zip")
    archive = tmp_path / "mimic-cxr-reports.zip"
    content = bytearray(archive.read_bytes())
    start = content.index(b"s50000007.txt") + len(b"s50000007.txt")
    content[start : start + 8] = b"\xff" * 8
    archive.write_bytes(content)
    source, items = read(tmp_path)
    assert source.dropped == {"a report cannot be unpacked": ["s50000007"]}
    assert len(items) == len(miniature.FILMS)
    archive.write_bytes(content[:100])
    with pytest.raises(UserError, match="mimic-cxr-reports.zip in .* is damaged"):
        read(tmp_path)
