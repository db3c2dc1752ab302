"""Rows of one image become one study, unless they contradict each other."""

import dataclasses

import pytest

from plan_jax.data.pairs.annotations import Labels
from plan_jax.data.pairs.studies import Study, count_split_texts, merge_duplicates
from plan_jax.types import UserError

ROW = Study(1, "a.png", "train", "p", "Effusion.", Labels({}), [], {}, {}, {})


def make_rows(*changes):
    return [
        dataclasses.replace(ROW, number=number, **change)
        for number, change in enumerate(changes, 1)
    ]


def listed(*names, **fields):
    """Returns the change of a row whose labels are a list of names."""
    return {"labels": Labels(dict.fromkeys(names, 1), 0), **fields}


def valued(reader="", **values):
    """Returns the change of a row whose labels are values."""
    return {"labels": Labels(values), "reader": reader}


def test_one_row_a_finding_is_one_study():
    box = {"box": (1.0, 2.0, 3.0, 4.0), "label": "Mass", "phrase": "mass"}
    rows = make_rows(listed("Mass", boxes=[box]), listed("Edema"), listed("Mass", boxes=[box]))
    (study,) = merge_duplicates([*rows, *make_rows({"path": "b.png"})], "merge")[:-1]
    assert study.labels == Labels({"Mass": 1, "Edema": 1}, 0) and study.boxes == [box]
    (study,) = merge_duplicates(make_rows(valued(a=1, b=-1), valued(b=0)), "merge")
    assert study.labels == Labels({"a": 1, "b": 0})
    (study,) = merge_duplicates(make_rows({"text": ""}, {"text": "No  mass."}), "merge")
    assert study.text == "No  mass."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            (valued(a=1), valued(a=0)),
            "with contradictory labels .'a' is 1 and 0.; set .*duplicates to 'any",
        ),
        (
            (listed("No Finding"), listed("Mass")),
            "with contradictory labels .'No Finding' and 'Mass'",
        ),
        (
            (listed("a", reader="R1"), listed("b", reader="R2")),
            "with contradictory labels .'a' is 1 and",
        ),
        (
            ({"text": "Secret."}, {}),
            "with different texts; set data.builder.duplicates to 'by_text",
        ),
        (
            ({"masks": {"a": "1.png"}}, {"masks": {"a": "2.png"}}),
            "with different masks; save their union",
        ),
        (({}, {"split": "val"}), "of split 'train' and 'val'; put all of its rows into one"),
        (({}, {"patient_id": "q"}), "of patient 'p' and 'q'; put all of its rows into one"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=f"image a.png is in rows 1, 2 {message}") as raised:
        merge_duplicates(make_rows(*changes), "merge")
    assert "Secret" not in str(raised.value)


def test_readers_who_disagree_are_counted_or_any_of_them_decides():
    rows = make_rows(*(valued(f"R{n}", a=int(n < 1), b=int(n < 2)) for n in range(3)))
    assert merge_duplicates(rows, "majority")[0].labels.values == {"a": 0, "b": 1}
    assert merge_duplicates(rows, "any")[0].labels.values == {"a": 1, "b": 1}
    assert merge_duplicates(rows, "separate") == rows
    normal = make_rows(listed("Mass", reader="R1"), listed("No finding", reader="R2"))
    assert merge_duplicates(normal, "any")[0].labels.values == {"Mass": 1, "No finding": 0}


def test_boxes_go_with_the_finding_that_the_majority_denies():
    box = {"box": (1.0, 2.0, 3.0, 4.0), "label": "Mass", "phrase": "mass"}
    rows = make_rows(
        listed("Mass", "Edema", reader="R1", boxes=[box]),
        listed("Edema", reader="R2"),
        listed("Edema", reader="R3"),
    )
    (study,) = merge_duplicates(rows, "majority")
    assert study.labels.values == {"Mass": 0, "Edema": 1} and study.boxes == []
    with pytest.raises(UserError, match="'majority' counts readers, and rows with lists"):
        merge_duplicates(make_rows(listed("Mass"), listed("Edema")), "majority")


def test_rows_of_one_image_and_one_text_share_their_boxes_and_other_texts_stay_apart():
    """MS-CXR has a row for each box of a phrase, and several phrases for an image."""
    texts = ("left effusion", "left  effusion", "right nodule")
    changes = [
        {"text": text, "boxes": [{"box": (x, 1.0, 90.0, 90.0), "label": "", "phrase": text}]}
        for text, x in zip(texts, (10.0, 60.0, 40.0), strict=True)
    ]
    rows = make_rows(*changes)
    assert count_split_texts(rows) == 2 and count_split_texts(rows[1:]) == 0
    effusion, nodule = merge_duplicates(rows, "by_text")
    assert [box["box"][0] for box in effusion.boxes] == [10.0, 60.0]
    assert {box["phrase"] for box in effusion.boxes} == {effusion.text}
    assert [box["box"][0] for box in nodule.boxes] == [40.0]
    with pytest.raises(UserError, match="with contradictory labels .'a' is 1 and 0"):
        merge_duplicates(make_rows(valued(a=1), valued(a=0)), "by_text")


def test_an_image_in_two_splits_is_refused_even_if_rows_stay_separate():
    with pytest.raises(UserError, match="of split 'train' and 'test'"):
        merge_duplicates(make_rows({}, {"split": "test"}), "separate")
