"""Pictures and page of downstream tasks: masks, boxes, curves, reports, the table of all tasks."""

import numpy as np
import pytest

from plan_jax import page
from plan_jax.page import downstream, figures, overlays
from plan_jax.types import BoxExample, Curve, MaskExample, ReportExample

HOSTILE = "<script>alert('x')</script>"
METRICS = {
    "classification/1/auroc_macro": 0.7,
    "classification/100/auroc_macro": 0.9,
    "classification/100/auroc_macro_low": 0.85,
    "classification/100/auroc_macro_high": 0.95,
    "classification/random/100/auroc_macro": 0.6,
    "classification/100/nodule/auroc_macro": 0.2,
    "segmentation/lungs/dice": 0.96,
    "segmentation/random/lungs/dice": 0.95,
    "detection/map_strict": 0.3,
    "detection/prior/map_strict": 0.1,
    "report_generation/ce/f1_micro": 0.5,
    "report_generation/retrieval/ce/f1_micro": 0.4,
    "grounding/cnr_signed": 2.0,
    "grounding/nodule/cnr_signed": 3.0,
    "grounding/prior/cnr_signed": 1.0,
    "grounding/round1/cnr_signed": 9.0,
    "detection/seconds": 12.0,
}


def blank(side=32):
    return np.full((side, side, 1), 100, np.uint8)


def square(at, side=32, size=8):
    mask = np.zeros((side, side), bool)
    mask[at : at + size, at : at + size] = True
    return mask


def rows(name="lungs"):
    curve = np.linspace(0, 1, 5)
    return [
        MaskExample(name, blank(), square(4), square(12), 0.5),
        BoxExample(
            blank(),
            np.array([[2.0, 2, 10, 10]]),
            np.array([[20.0, 20, 30, 30]]),
            np.array([0.75], np.float32),
        ),
        BoxExample(blank(), np.zeros((0, 4)), np.array([[4.0, 4, 20, 20]]), np.array([0.1])),
        BoxExample(blank(), np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0)),
        ReportExample(
            blank(), f"reference {name}", f"generated {name}", ("right one",), ("missed one",)
        ),
        Curve("roc", name, curve, curve**0.5),
        Curve("calibration", name, curve, curve),
    ]


def test_what_was_found_is_tinted_and_the_truth_outlined():
    row = rows()[0]
    picture = overlays.mask_picture(row, side=128)
    plain = figures.radiograph(row.image, side=128)
    changed = (picture != plain).any(-1)
    assert picture.shape == (128, 128, 3)
    assert changed[4 * 14, 4 * 14] and not changed[4 * 6, 4 * 6] and not changed[4 * 28, 4 * 28]
    assert (picture == np.uint8(figures.OUTLINE)).all(-1).any()


def test_boxes_lie_where_they_are():
    picture = overlays.box_picture(rows()[1], side=128)
    truth = (picture == np.uint8(figures.OUTLINE)).all(-1)
    found = (picture == np.uint8(overlays.FOUND)).all(-1)
    assert truth[8:40, 8:40].any() and not truth[44:].any()
    assert found[80:120, 80:120].any() and not found[:76].any()
    faint = overlays.box_picture(rows()[2], side=128)
    assert not (faint == np.uint8(overlays.FOUND)).all(-1).any()
    assert overlays.box_picture(rows()[3], side=64).shape == (64, 64, 3)


def test_curves_are_drawn_by_kind():
    text, png = overlays.line_chart([row for row in rows() if isinstance(row, Curve)])
    assert text.startswith("<svg") and png.startswith(b"\x89PNG")
    assert "ROC" in text and "Calibration" in text and "http" not in text


def test_the_table_has_one_row_for_each_headline():
    table = page.markdown(METRICS).splitlines()[2:]
    assert table == [
        "| Phrase grounding | CNR, signed | 2.000 |  | lung prior 1.000 |",
        "| Classification | 1 % of labels, AUROC | 0.700 |  |  |",
        "| Classification | 100 % of labels, AUROC | 0.900 | 0.85 to 0.95 | random encoder 0.600 |",
        "| Segmentation | lungs, Dice | 0.960 |  | random encoder 0.950 |",
        "| Detection | mAP .40:.75, strict | 0.300 |  | usual boxes 0.100 |",
        "| Report generation | F1 of findings, micro | 0.500 |  | nearest image's report 0.400 |",
    ]


def test_the_page_shows_every_task_and_hostile_text_stays_text(tmp_path):
    path = page.write(tmp_path, config={"method": "plan"}, metrics=METRICS, rows=rows(HOSTILE))
    text = path.read_text()
    assert "<script" not in text
    for title in ("All tasks", "Segmented", "Detected", "Generated reports", "Classifier by"):
        assert title in text
    assert "missed one" in text and "Detection 12 s" in text
    assert "1 true, best score 0.75" in text and "0 true, best score none" in text


@pytest.mark.parametrize("part", ["masks", "boxes", "texts", "lines"])
def test_nothing_is_shown_of_nothing(part):
    assert getattr(downstream, part)([]) is None
    assert downstream.summary({"grounding/cnr_signed": 1.0}) is None
