"""The folder of a public dataset: tables by name, packed or not, and what is not there."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest

from plan_jax.data.public import source_folder
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def write_gzip(path, content):
    """Writes a packed file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(content)


def test_columns_are_found_by_name_in_any_order(tmp_path):
    (tmp_path / "a.csv").write_text(" b , a,,a\n 1 ,x\u00e9,9,other\n,,,\n2,y,8,other\n", "utf-8")
    rows = list(SourceFolder(tmp_path).read_csv("a.csv", ("a", "b"), optional=("c",)))
    assert rows == [{"a": "x\u00e9", "b": "1", "c": ""}, {"a": "y", "b": "2", "c": ""}]


def test_a_row_may_have_more_or_fewer_cells_than_the_header(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,c\n1,2,3,4,5\n1,2\n1\n")
    source = SourceFolder(tmp_path)
    assert [row["b"] for row in source.read_csv("a.csv", ("a", "b"))] == ["2", "2"]
    assert source.dropped == {"a row of a table is cut off": ["a.csv:4"]}


@pytest.mark.parametrize("packed", [False, True])
def test_tables_are_found_below_the_folder_packed_or_not(tmp_path, packed):
    content = b"\xef\xbb\xbfa\n1\n"
    path = tmp_path / "physionet.org/files/x/2.0.0"
    path.mkdir(parents=True)
    (path / "index.html").write_text("<html>")
    if packed:
        write_gzip(path / "a.csv.gz", content)
    else:
        (path / "a.csv").write_bytes(content)
    source = SourceFolder(tmp_path)
    name = source.require("b.csv", "a.csv")
    assert name == f"physionet.org/files/x/2.0.0/a.csv{'.gz' * packed}"
    assert list(source.read_csv(name, ("a",))) == [{"a": "1"}]
    assert list(source.tables) == [name]


def test_a_packed_table_is_recognised_without_its_suffix(tmp_path):
    write_gzip(tmp_path / "a.csv", b"a\n1\n")
    assert list(SourceFolder(tmp_path).read_csv("a.csv", ("a",))) == [{"a": "1"}]


def test_what_is_missing_is_named_with_the_page(tmp_path):
    source = SourceFolder(tmp_path, "example.org/data")
    with pytest.raises(UserError, match=r"has no a.csv \(or b.csv\); download it from example.org"):
        source.require("a.csv", "b.csv")
    with pytest.raises(UserError, match="is not a folder; pass the folder"):
        SourceFolder(tmp_path / "nowhere")


def test_a_missing_column_shows_the_header(tmp_path):
    (tmp_path / "a.csv").write_text("ImageID,Report\n1,secret\n")
    with pytest.raises(UserError, match="no column 'image_id'; its columns are 'ImageID', 'Rep"):
        list(SourceFolder(tmp_path).read_csv("a.csv", ("image_id",)))


def test_damaged_files_are_one_sentence(tmp_path):
    whole = gzip.compress(b"a\n" + b"1\n" * 9000)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.csv").write_bytes(b"a\n\xe9\n")
    (tmp_path / "a.json").write_text('{"a": [1,')
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a"\n')
    (tmp_path / "list.json").write_text("[1]\n")
    (tmp_path / "a.zip").write_text("not a zip")
    source = SourceFolder(tmp_path)
    for name in ("cut.csv.gz", "latin.csv"):
        with pytest.raises(UserError, match=f"{name} in .* is damaged .*; download it again"):
            list(source.read_csv(name, ("a",)))
    with pytest.raises(UserError, match="a.json in .* is damaged"):
        source.read_json("a.json")
    with pytest.raises(UserError, match="lines.json line 2 in .* is damaged"):
        list(source.read_json_lines("lines.json"))
    with pytest.raises(UserError, match="line 1 of list.json .* is not an object"):
        list(source.read_json_lines("list.json"))
    with pytest.raises(UserError, match="a.zip in .* is damaged"):
        source.open_zip("a.zip")


def test_a_stray_quotation_mark_does_not_swallow_rows(tmp_path):
    (tmp_path / "end.csv").write_text('a,b\n1,x\n2,"y\n3,z\n')
    (tmp_path / "middle.csv").write_text('a,b\n1,"x\n' + f"2,{'y' * 1022}\n" * 1024 + '3,"z\n')
    (tmp_path / "inch.csv").write_text('a,b\n1,5" scar\n2,"two\nlines ""and"" a third"\n3,x\n')
    source = SourceFolder(tmp_path)
    for name in ("end.csv", "middle.csv"):
        with pytest.raises(UserError, match=f"{name} in .* is damaged"):
            list(source.read_csv(name, ("a",)))
    rows = source.read_csv("inch.csv", ("b",))
    assert [row["b"] for row in rows] == ['5" scar', 'two\nlines "and" a third', "x"]


def test_an_archive_with_a_password_is_one_sentence(tmp_path):
    path = tmp_path / "a.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of encryption, in the file and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.csv.zip in .* is damaged \(.*password"):
        list(SourceFolder(tmp_path).read_csv("a.csv.zip", ("a",)))


def test_a_header_that_is_a_report_is_not_shown(tmp_path):
    (tmp_path / "a.csv").write_text("17,There is a large effusion on the left.\n")
    with pytest.raises(UserError, match="its columns are '17', a text of 38 characters$"):
        list(SourceFolder(tmp_path).read_csv("a.csv", ("a",)))


def test_json_and_texts_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "\u00e9"}))
    (tmp_path / "lines.json").write_text('{"a": 1}\n\n{"a": 2}')
    (tmp_path / "a.txt").write_text(" FINAL REPORT")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    source = SourceFolder(tmp_path)
    assert source.read_json("a.json") == {"a": "\u00e9"}
    assert list(source.read_json_lines("lines.json")) == [{"a": 1}, {"a": 2}]
    assert source.read_text("a.txt") == " FINAL REPORT"
    assert source.read_text("b.txt") is None
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        source.read_text("latin.txt")


@pytest.mark.parametrize("path", ["../a.csv", "/etc/passwd", "b/../../a.csv", "a\0b"])
def test_no_path_leaves_the_folder(tmp_path, path):
    source = SourceFolder(tmp_path)
    for read in (source.resolve, source.has, source.read_text):
        with pytest.raises(UserError, match="leaves the source folder"):
            read(path)


def test_an_empty_file_is_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "full.png").write_text("x")
    (tmp_path / "folder").mkdir()
    source = SourceFolder(tmp_path)
    assert [source.has(name) for name in ("empty.png", "full.png", "none.png", "none/a.png")] == [
        *(False, True, False, False),
    ]


def test_what_is_dropped_never_shows_a_text(tmp_path):
    source = SourceFolder(tmp_path)
    source.drop("no image", "There is a large effusion on the left side of the patient")
    assert source.dropped == {"no image": ["a text of 57 characters"]}


def test_small_files_of_a_packed_archive_are_read_without_unpacking(tmp_path):
    contents = {
        "a/1.xml": b"<a/>",
        "a/2.txt": b"text",
        "a/3.xml": bytes(2**20 + 1),
        "../4.xml": b"4",
    }
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("a/5.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    source = SourceFolder(tmp_path)
    assert dict(source.read_tar("a.tgz", ".xml")) == {"a/1.xml": b"<a/>", "../4.xml": b"4"}
    assert source.dropped == {"a file of an archive is too large": ["a/3.xml"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]
    whole = (tmp_path / "a.tgz").read_bytes()
    (tmp_path / "a.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a.tgz in .* is damaged"):
        list(source.read_tar("a.tgz", ".xml"))


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


def test_tables_without_rows_are_named(tmp_path):
    (tmp_path / "films.csv").write_text("\ufeffid,path\r\n\r\n")
    (tmp_path / "list.txt").write_text("\n")
    source = SourceFolder(tmp_path)
    for _ in range(2):
        assert list(source.read_csv("films.csv", ["id"])) == []
        assert list(source.read_lines("list.txt")) == []
    assert source.notes == ["films.csv has no rows", "list.txt has no rows"]
    (tmp_path / "films.csv").write_text("")
    with pytest.raises(UserError, match=r"films\.csv in .* is empty; download it again$"):
        list(source.read_csv("films.csv", ["id"]))
