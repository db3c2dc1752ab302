"""Open-I in the three layouts in which it is published, and all of the real reports."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from miniatures import openi as miniature

from configs.eval import iu_xray_reports
from plan_jax.data.builders import openi
from plan_jax.data.builders.openi import OpeniConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError

ARCHIVE = Path(__file__).resolve().parents[2] / "shared/data/openi_reports/NLMCXR_reports.tgz"
DROPPED = {
    "a report has no image": ["CXR4"],
    "a report has neither findings nor impression": ["CXR5"],
}


def read(folder, **fields):
    """Returns the folder as it was read, and its items by id."""
    source = SourceFolder(folder, openi.FACTS.page)
    config = OpeniConfig(name="", source=str(folder), **fields)
    return source, {item.image_id: item for item in openi.read_items(source, config)}


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("dicom", [False, True])
def test_the_files_of_the_nlm(tmp_path, archive, dicom):
    miniature.write_nlm(tmp_path, archive, dicom)
    source, items = read(tmp_path)
    truth = miniature.list_truth()
    assert {name: item.patient_id for name, item in items.items()} == {
        name: f"CXR{number}" for name, number in truth.items()
    }
    assert all(source.has(item.image) for item in items.values())
    assert all(item.image.endswith(".dcm" if dicom else ".png") for item in items.values())
    assert {item.view for item in items.values()} == {""}
    assert source.dropped == DROPPED
    assert source.notes == ["no table tells frontal from lateral films, so all of them are kept"]


def test_sections_and_labels(tmp_path):
    miniature.write_nlm(tmp_path)
    _, items = read(tmp_path)
    assert items["CXR2_IM-0652-1001"].sections == {
        "indication": "XXXX",
        "findings": "Large effusion.\nNo edema.",
        "impression": "Effusion.",
    }
    assert items["CXR40_IM-2050-2001"].sections == {"findings": "Nodule > 3 mm & scar."}
    labels = items["CXR2_IM-0652-1001"].labels
    assert tuple(labels) == openi.FACTS.findings
    assert {name for name, value in labels.items() if value} == {"Effusion", "Fracture"}
    assert set(items["CXR1_IM-0001-3001"].labels.values()) == {0}
    # Reports without terms say nothing on findings.
    assert not items["CXR3_IM-1384-0001-0001"].labels
    assert not items["CXR400_IM-2052-1001"].labels


def test_kaggles_tables_have_the_same_images_with_views(tmp_path):
    (tmp_path / "nlm").mkdir()
    (tmp_path / "kaggle").mkdir()
    miniature.write_nlm(tmp_path / "nlm")
    miniature.write_kaggle(tmp_path / "kaggle")
    _, published = read(tmp_path / "nlm")
    source, items = read(tmp_path / "kaggle")
    assert items.keys() == published.keys() and source.dropped == DROPPED and not source.notes
    for name, item in items.items():
        assert source.has(item.image)
        assert item.view == ("LATERAL" if name in miniature.LATERAL else "FRONTAL")
        assert (item.patient_id, item.labels) == (
            published[name].patient_id,
            published[name].labels,
        )
    assert items["CXR1_IM-0001-3001"].sections == published["CXR1_IM-0001-3001"].sections


def test_kaggles_table_of_views_beside_the_files_of_the_nlm_is_used(tmp_path):
    miniature.write_nlm(tmp_path)
    miniature.write_views(tmp_path)
    source, items = read(tmp_path)
    views = {name for name, item in items.items() if item.view == "LATERAL"}
    assert views == set(miniature.LATERAL) and not source.notes


def test_only_the_first_image_of_a_report_that_is_not_lateral(tmp_path):
    miniature.write_nlm(tmp_path)
    miniature.write_views(tmp_path)
    _, items = read(tmp_path, first_only=True)
    assert list(items) == [
        *("CXR1_IM-0001-3001", "CXR2_IM-0652-2001", "CXR3_IM-1384-0001-0001"),
        *("CXR40_IM-2050-2001", "CXR400_IM-2052-1001", "CXR6_IM-2192-1001"),
    ]
    _, items = read(tmp_path, first_only=True, views="all")
    assert "CXR2_IM-0652-1001" in items


def test_r2gens_lists_and_images(tmp_path):
    miniature.write_r2gen(tmp_path)
    source, items = read(tmp_path, split="r2gen")
    truth = miniature.list_truth("r2gen")
    assert {name: item.patient_id for name, item in items.items()} == {
        name: f"CXR{number}" for name, number in truth.items()
    }
    for item in items.values():
        assert source.has(item.image)
        assert int(item.patient_id.removeprefix("CXR")) in miniature.R2GEN[item.split]
    assert items["CXR1_IM-0001-1"].image == "images/CXR1_IM-0001/1.png"
    assert items["CXR40_IM-2050-0"].sections == {"findings": "nodule > 3 mm & scar."}
    _, items = read(tmp_path, split="r2gen", first_only=True)
    assert [name for name, item in items.items() if item.split == "test"] == [
        "CXR40_IM-2050-0",
        "CXR400_IM-2052-0",
    ]


def test_r2gens_lists_divide_the_files_of_the_nlm(tmp_path):
    miniature.write_nlm(tmp_path)
    miniature.write_r2gen(tmp_path, images=False)
    _, items = read(tmp_path, split="r2gen")
    assert {item.patient_id: item.split for item in items.values()} == {
        "CXR1": "train",
        "CXR2": "train",
        "CXR3": "unused",
        "CXR6": "val",
        "CXR40": "test",
        "CXR400": "test",
    }
    # Without the rule, a hash of the patient decides.
    _, items = read(tmp_path)
    assert {item.split for item in items.values()} == {""}


def test_lists_of_r2gen_that_are_empty_or_share_a_report_are_refused(tmp_path):
    miniature.write_r2gen(tmp_path)
    path = tmp_path / "annotation.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"test": content["train"][:1]}))
    with pytest.raises(UserError, match=r"report CXR1 is in two lists of annotation.json in "):
        read(tmp_path, split="r2gen")
    path.write_text(json.dumps(dict.fromkeys(content, [])))
    with pytest.raises(UserError, match=r"annotation.json in .* lists no report; download it"):
        read(tmp_path, split="r2gen")


def open_split(folder, split, /, **fields):
    fields = {"source": str(folder / "source"), "size": 20, "val_fraction": 0.0} | fields
    return list(open_dataset("openi", split, data_dir=str(folder / "data"), **fields))


@pytest.mark.parametrize("dicom", [False, True])
def test_the_dataset_is_prepared(tmp_path, dicom):
    (tmp_path / "source").mkdir()
    miniature.write_nlm(tmp_path / "source", dicom=dicom)
    miniature.write_views(tmp_path / "source")
    records = open_split(tmp_path, "train", test_fraction=0.0)
    truth = miniature.list_truth()
    # Laterals are left out, as the table of films says which they are.
    assert {record.record_id for record in records} == truth.keys() - set(miniature.LATERAL)
    for record in records:
        number = truth[record.record_id]
        assert record.patient_id == record.study_id == f"CXR{number}"
        assert record.geometry.shape == miniature.SHAPE and record.image.shape == (20, 16, 1)
        expected = miniature.draw(number)[::2, ::2]
        is_inside = np.ones_like(expected, bool)
        is_inside[4:6, :6] = is_inside[:6, 4:6] = False  # the edge of the corner
        error = np.abs(record.image[..., 0].astype(int) - expected)
        assert error[is_inside].max() <= 1
        assert "findings" in record.sections or "impression" in record.sections


def test_a_report_that_changes_is_noticed(tmp_path):
    """Reports of the NLM are files of their own: another content, or a file more, is other data."""
    (tmp_path / "source").mkdir()
    miniature.write_nlm(tmp_path / "source")

    def prepare():
        fields = {"source": str(tmp_path / "source"), "size": 8, "val_fraction": 0.0, "workers": 1}
        return open_dataset("openi", "train", data_dir=str(tmp_path / "data"), **fields).fingerprint

    fingerprints = [prepare()]
    report = tmp_path / "source" / openi.REPORTS / "2.xml"
    report.write_text(report.read_text().replace("Large", "Small"))
    fingerprints.append(prepare())
    shutil.copy(report, report.with_name("77.xml"))
    fingerprints += [prepare(), prepare()]
    assert len(set(fingerprints[:3])) == 3 and fingerprints[2] == fingerprints[3]


def test_r2gens_lists_are_prepared(tmp_path):
    (tmp_path / "source").mkdir()
    miniature.write_r2gen(tmp_path / "source")
    fields = {"split": "r2gen", "first_only": True}
    ids = {
        split: {record.patient_id for record in open_split(tmp_path, split, **fields)}
        for split in miniature.R2GEN
    }
    assert ids == {
        split: {f"CXR{number}" for number in numbers} for split, numbers in miniature.R2GEN.items()
    }


def test_the_protocol_of_r2gen_reads_the_findings_of_one_image_a_report(tmp_path):
    (tmp_path / "source").mkdir()
    miniature.write_r2gen(tmp_path / "source")
    data = iu_xray_reports.get_config().to_dict()["data"]
    fields = data["builder"] | {"size": 20, "caption": data["caption"]}
    texts = {
        record.patient_id: record.text
        for split in miniature.R2GEN
        for record in open_split(tmp_path, split, **fields)
    }
    findings = {number: sections[2].lower() for number, _, sections, _ in miniature.REPORTS}
    listed = [number for numbers in miniature.R2GEN.values() for number in numbers]
    assert texts == {f"CXR{number}": findings[number] for number in listed}


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"has no ecgen-radiology.* download the reports from openi"
    ):
        read(tmp_path)
    miniature.write_nlm(tmp_path)
    (tmp_path / "ecgen-radiology/40.xml").write_text("<eCitation>Miller")
    source, items = read(tmp_path)
    assert source.dropped["a report cannot be read"] == ["ecgen-radiology/40.xml"]
    assert len(items) == len(miniature.list_truth()) - 1
    with pytest.raises(UserError, match=r"has no annotation.json"):
        read(tmp_path, split="r2gen")
    (tmp_path / "annotation.json").write_text('{"train": [{"id": "CXR1"}]}')
    with pytest.raises(UserError, match="is not R2Gen's annotation.json: it needs the lists train"):
        read(tmp_path, split="r2gen")
    shutil.rmtree(tmp_path / "ecgen-radiology")
    (tmp_path / "NLMCXR_reports.tgz").write_bytes(b"\x1f\x8b truncated")
    with pytest.raises(UserError, match="NLMCXR_reports.tgz .* is damaged"):
        read(tmp_path)


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the reports of Open-I are not beside the project")
def test_every_published_report_is_an_item_or_is_listed():
    source, items = read(ARCHIVE.parent)
    counts = {reason: len(names) for reason, names in source.dropped.items()}
    assert counts == {
        "a report has no image": 104,
        "a report has neither findings nor impression": 25,  # of 28, of which 3 have no image
    }
    assert len({item.patient_id for item in items.values()}) + sum(counts.values()) == 3955
    images = Counter(item.patient_id for item in items.values())
    assert max(images.values()) == 5


def test_captions_are_made_of_the_stored_sections(tmp_path):
    (tmp_path / "source").mkdir()
    miniature.write_nlm(tmp_path / "source")
    options = {"data_dir": str(tmp_path), "source": str(tmp_path / "source"), "size": 32}
    options |= {"val_fraction": 0.0, "test_fraction": 0.0}

    def read_captions(caption):
        dataset = open_dataset("openi", "train", caption=caption, **options).select_texts()
        return {record.record_id: record.text for record in dataset}

    both, findings = read_captions(""), read_captions("findings")
    assert both["CXR2_IM-0652-1001"] == "Large effusion.\nNo edema.\n\nEffusion."
    assert findings["CXR2_IM-0652-1001"] == "Large effusion.\nNo edema."
    assert read_captions("gloria").keys() < both.keys()
    assert all(both.values()) and len(both) == len(miniature.list_truth())
    with pytest.raises(UserError, match="caption is 'mgca', and dataset nih_cxr14 has no sections"):
        open_dataset("nih_cxr14", "train", caption="mgca", **options)
