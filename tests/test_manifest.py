"""Manifests of every kind are read, and their mistakes are named."""

import json

import pyarrow.parquet
import pytest
from manifests import NUM_ROWS, make_rows, write_manifest

from plan_jax.data.pairs import manifest
from plan_jax.types import UserError


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_a_manifest_of_any_kind_is_read(tmp_path, name):
    rows = make_rows()
    assert manifest.read_manifest(tmp_path / write_manifest(tmp_path, rows, name)) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"image,text\n", "has no rows; list at least one image and its text"),
        (
            "m.csv",
            b"image,text\na,b,c\n",
            "line 2 does not have as many fields as the header; fix the",
        ),
        ("m.csv", b"image,text\na\n", "line 2 does not have as many fields as the header; fix the"),
        ("m.csv", b"image,text\n\xff,b\n", "is not UTF-8; save it as UTF-8"),
        ("m.csv", b"image,text, text\na,b,c\n", "column 'text' is there twice; rename or drop"),
        ("m.csv", b"img/1.png,Mr Miller has an effusion.\n", "it has no header; write the names"),
        ("m.jsonl", b'{"text": "a", "text": "b"}', "line 1: the name 'text' is there twice"),
        ("m.jsonl", b'{"text": "a", "text ": "b"}', "column 'text' is there twice; rename or drop"),
        ("m.csv", b'image,text\na,b\nb,"c"d\n', "line 3: "),
        (
            "m.json",
            b'{\n "train": [\n {"image": "a.png"}],\n "val": []\n}',
            "it is an object with lists of rows .train, val.; write one list, with .* `split`",
        ),
        (
            "m.jsonl",
            b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "line 1 is nested too deep",
        ),
        ("m.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: Exceeds the limit"),
        ("m.json", b"[1]", "item 1 is not a JSON object"),
        ("m.jsonl", b'{"image": 1}\n{', "line 2 is not JSON: .*; fix the file"),
        ("m.jsonl", b"[1]\n", "line 1 is not a JSON object; fix the file"),
        ("m.parquet", b"nothing", "cannot be read: .*; fix the file"),
        ("m.xlsx", b"", "is not CSV, JSONL or Parquet; use one of .csv, .tsv, .jsonl"),
    ],
)
def test_a_malformed_manifest_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"manifest .*{name} .*{message}"):
        manifest.read_manifest(tmp_path / name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["m.csv", "M.CSV"])
def test_the_delimiter_of_the_header_is_used(tmp_path, delimiter, name):
    """Spreadsheets write `;` where the decimal mark is a comma, and declare it."""
    lines = [
        delimiter.join(("image", " text ", "", "")),
        delimiter.join(("a.png", "No, clear", "", "")),
    ]
    if delimiter == ",":
        lines[1] = 'a.png, "No, clear",,'
    for declaration in ("", f"sep={delimiter}\r\n", "\ufeff", f"\ufeffsep={delimiter}\n"):
        (tmp_path / name).write_text(declaration + "\r\n".join(lines), "utf-8")
        assert manifest.read_manifest(tmp_path / name) == [{"image": "a.png", "text": "No, clear"}]
    (tmp_path / "m.tsv").write_text("image\ttext;a;b\na.png\tClear\n")
    assert manifest.read_manifest(tmp_path / "m.tsv") == [{"image": "a.png", "text;a;b": "Clear"}]


@pytest.mark.parametrize("name", ["m.JSONL", "m.ndjson", "m.json", "lines.json", "m.Parquet"])
def test_a_suffix_in_any_case_and_json_of_any_kind_is_read(tmp_path, name):
    rows = make_rows()
    if name == "m.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        source = "m.parquet" if name == "m.Parquet" else "m.jsonl"
        (tmp_path / write_manifest(tmp_path, rows, source)).rename(tmp_path / name)
    assert manifest.read_manifest(tmp_path / name) == rows


def test_columns_without_a_name_are_ignored(tmp_path):
    """pandas writes its index so, once more with each time that a file is saved."""
    (tmp_path / "m.csv").write_text(",,image,text,\n0,0,a.png,Clear,\n")
    (row,) = manifest.read_manifest(tmp_path / "m.csv")
    assert (row["image"], row["text"]) == ("a.png", "Clear")


def test_lines_of_delimiters_only_are_no_rows(tmp_path):
    (tmp_path / "m.csv").write_text("image,text\na.png,Clear\n,\n , \n,,\n")
    assert manifest.read_manifest(tmp_path / "m.csv") == [{"image": "a.png", "text": "Clear"}]


def test_a_parquet_column_that_is_there_twice_is_named(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(UserError, match="column 'text' is there twice; rename or drop one"):
        manifest.read_manifest(tmp_path / "m.parquet")


def test_no_message_shows_a_report_that_stands_for_a_name():
    report = "Mr Miller has a large effusion on the left"
    with pytest.raises(UserError, match="it has a text of 42 characters, b") as raised:
        manifest.match_columns([{report: 1, "b": 2}], {}, ("image",), ("image",))
    assert "Miller" not in str(raised.value)
    with pytest.raises(UserError, match="split a text of 42 characters is unknown"):
        manifest.assign_split(report, "p", (0.0, 0.0))


def test_accents_of_columns_may_be_composed_in_another_way(tmp_path):
    path = write_manifest(tmp_path, [{"E\u0301panchement": 1}], "m.jsonl")
    assert manifest.read_manifest(tmp_path / path) == [{"\u00c9panchement": 1}]


def test_half_a_character_of_json_is_replaced(tmp_path):
    cell = '{"text": "cut \\ud83d", "labels": {"a\\udc00": ["\\ud83d\\ude00"]}}'
    (tmp_path / "m.jsonl").write_text(cell)
    (row,) = manifest.read_manifest(tmp_path / "m.jsonl")
    assert row == {"text": "cut \ufffd", "labels": {"a\ufffd": ["\U0001f600"]}}


def test_a_date_out_of_range_is_named(tmp_path):
    dates = pyarrow.array([2**50], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"date": dates}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="manifest .*m.parquet cannot be read: .*; fix the file"):
        manifest.read_manifest(tmp_path / "m.parquet")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.csv does not exist; give the path of a file"):
        manifest.read_manifest(tmp_path / "absent.csv")


def test_columns_are_matched_by_name_unless_a_role_is_assigned():
    rows = [{"image": "a.png", "report": "x", "split": "val"}]
    roles = ("image", "text", "split", "labels")
    columns = manifest.match_columns(rows, {"text": "report", "split": ""}, ("image",), roles)
    assert columns == {"image": "image", "text": "report", "split": None, "labels": None}
    with pytest.raises(UserError, match=r"column 'text' \(text\) is not in the manifest; it has"):
        manifest.match_columns(rows, {}, ("image", "text"), roles)
    with pytest.raises(UserError, match="column 'repot' .*; did you mean 'report'"):
        manifest.match_columns(rows, {"text": "repot"}, (), roles)
    with pytest.raises(UserError, match="unknown role 'txt'; use image, text, split, labels"):
        manifest.match_columns(rows, {"txt": "report"}, (), roles)


def test_conditions_are_checked_and_filter_rows():
    rows = [{"view": "PA", "age": 40}, {"view": "L", "age": None}, {"view": "AP"}]
    assert manifest.filter_rows(rows, {"view": ["PA", "L"]}) == rows[:2]
    assert manifest.filter_rows(rows, {"view": {"not": ["L"]}, "age": {"in": [40, ""]}}) == [
        rows[0],
        rows[2],
    ]
    words = [{"view": "nan"}, {"view": None}, {"view": "PA"}]
    assert manifest.filter_rows(words, {"view": ["nan"]}) == words[:1]
    assert manifest.filter_rows(words, {"view": {"not": [""]}}) == words[2:]
    manifest.check_conditions({"view": {"in": ["PA"], "not": ["L"]}}, rows, "filters")
    with pytest.raises(UserError, match="column 'veiw' of filters does not exist; did you mean"):
        manifest.check_conditions({"veiw": ["L"]}, rows, "filters")
    for condition in ("L", {"is": ["L"]}, {"in": "L"}):
        with pytest.raises(UserError, match="filters of 'view' is .*; write {\"in\": "):
            manifest.check_conditions({"view": condition}, rows, "filters")


def test_conditions_compare_numbers_and_names_in_any_case():
    rows = [{"view": "PA", "flag": 0.0}, {"view": "LATERAL", "flag": 1.0}, {"view": None}]
    assert manifest.filter_rows(rows, {"view": {"not": ["lateral"]}}) == [rows[0], rows[2]]
    assert manifest.filter_rows(rows, {"flag": {"not": [1]}}) == [rows[0], rows[2]]
    assert manifest.filter_rows(rows, {"flag": ["0"]}) == rows[:1]
    signs = [{"a": -1}, {"a": "1"}, {"a": 2**60}, {"a": 2**60 + 1}]
    assert manifest.filter_rows(signs, {"a": [1]}) == signs[1:2]
    assert manifest.filter_rows(signs, {"a": [str(2**60)]}) == signs[2:3]


def test_a_condition_that_matches_nothing_is_remarked():
    rows = [{"view": "PA"}, {"view": "LATERAL"}]
    assert manifest.remark_conditions({}, rows, 2, "filters", "row") == []
    conditions = {"view": {"not": ["L", "pa", ""]}}
    assert manifest.remark_conditions(conditions, rows, 1, "filters", "row") == [
        "filters leave out 1 of 2 rows",
        "filters: no row has 'L' in column 'view'",
    ]


def test_splits_by_hash_have_the_requested_fractions():
    splits = [manifest.assign_split(None, str(number), (0.2, 0.1)) for number in range(4000)]
    assert abs(splits.count("val") / 4000 - 0.2) < 0.02
    assert abs(splits.count("test") / 4000 - 0.1) < 0.02


def test_an_unknown_split_is_named():
    assert manifest.assign_split("Dev", "p0", (0.0, 0.0)) == "val"
    with pytest.raises(UserError, match="split 'held out' is unknown; use train, val, test"):
        manifest.assign_split("held out", "p0", (0.0, 0.0))


def test_a_patient_in_two_splits_is_named():
    assignments = [(row["patient_id"], row["split"]) for row in make_rows()]
    assert len(assignments) == NUM_ROWS
    manifest.check_patient_leaks(assignments)
    with pytest.raises(UserError, match="'p0' is in splits 'train' and 'test'; put all rows of"):
        manifest.check_patient_leaks([*assignments, ("p0", "test")])
