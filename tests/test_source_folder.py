"""The folder of a public dataset: packed tables, and folders of patients that are not searched."""

import zipfile

import pytest

from plan_jax.data.public import source_folder
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def test_a_table_may_be_alone_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "labels.csv.zip", "w") as archive:
        archive.writestr("labels.csv", "name,label\na,1\n")
        archive.writestr("__MACOSX/._labels.csv", "\0")
    source = SourceFolder(tmp_path)
    table = source.require("labels.csv")
    assert table == "labels.csv.zip"
    assert list(source.read_csv(table, ["label"])) == [{"label": "1"}]


def test_an_archive_of_several_tables_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "labels.csv.zip", "w") as archive:
        archive.writestr("a.csv", "name\n")
        archive.writestr("b.csv", "name\n")
    with pytest.raises(UserError, match=r"labels\.csv\.zip in .* packs 2 files"):
        list(SourceFolder(tmp_path).read_csv("labels.csv.zip", ["name"]))


def test_patients_do_not_hide_the_folders_after_them(tmp_path, monkeypatch):
    monkeypatch.setattr(source_folder, "MAX_BRANCHES", 3)
    monkeypatch.setattr(source_folder, "MAX_FOLDERS", 8)
    for number in range(9):
        (tmp_path / f"a/train/patient{number}").mkdir(parents=True)
    (tmp_path / "b/labels/test").mkdir(parents=True)
    assert SourceFolder(tmp_path).find_folder("test") == "b/labels/test"
