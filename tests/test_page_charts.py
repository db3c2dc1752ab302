"""Charts of the page: one figure as SVG and PNG, and which curves are drawn."""

import io

import numpy as np
from PIL import Image

from plan_jax.page import charts
from plan_jax.page.charts import Panel
from plan_jax.types import Curve, Metric

HOSTILE = "$\\bad$ </pre><script>alert(1)</script><img src=x onerror=\"f('&')\">"
CATALOGUE = {
    "grounding": {
        "cnr": Metric(
            "CNR", "", baselines={"prior": "prior/cnr", "random": "r/cnr"}, headline=True
        ),
        "miou": Metric("mIoU", ""),
    }
}


def test_a_chart_is_one_figure_in_two_forms():
    history = [{"step": i, "loss": 1.0 / (i + 1), "other": 2.0} for i in range(40)]
    history.append({"step": 41, "loss": 0.01})
    panels = [Panel("Loss", {HOSTILE: "loss"}, {"chance": 0.5}), Panel("o", {"o": "other"})]
    svg, png = charts.training_chart(history, panels)
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert svg.startswith("<svg") and "http" not in svg and "currentColor" in svg
    assert "<script" not in svg and charts.INK not in svg
    assert charts.training_chart(history, panels)[0] == svg


def test_classifier_curves_are_drawn_by_kind():
    x = np.linspace(0, 1, 5)
    svg, png = charts.classifier_chart(
        [Curve("roc", "a", x, x**0.5), Curve("calibration", "a", x, x)]
    )
    assert svg.startswith("<svg") and png.startswith(b"\x89PNG")
    assert "ROC" in svg and "Calibration" in svg and "http" not in svg


def test_panels_are_losses_then_headlines_then_other_keys():
    history = [
        {
            "step": i,
            "loss": 1.0,
            "loss_local": 0.5,
            "grounding/cnr": 0.1,
            "val/grounding/cnr": 0.2,
            "grounding/miou": 0.3,
            "grad_norm": 1.0,
            "comment": "text",
        }
        for i in range(2)
    ]
    history[0]["logged_once"] = 1.0
    metrics = {"grounding/cnr": 0.5, "grounding/prior/cnr": 0.4, "grounding/r/cnr": 0.0}
    panels = charts.training_panels(history, metrics, CATALOGUE, {"grounding": "Grounding"})
    assert panels == [
        Panel("Loss", {"loss": "loss", "loss_local": "loss_local"}),
        Panel(
            "Grounding: CNR",
            {"grounding/cnr": "grounding/cnr", "val/grounding/cnr": "val/grounding/cnr"},
            {"prior": 0.4},
        ),
        Panel("grad_norm", {"grad_norm": "grad_norm"}),
    ]
    assert charts.training_panels(history, {}, CATALOGUE, {})[1].levels == {}
    assert charts.training_panels([], metrics, CATALOGUE, {}) == []
