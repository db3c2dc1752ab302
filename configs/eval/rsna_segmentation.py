"""RSNA pneumonia, segmentation of the filled boxes with a frozen tower: MGCA's protocol, Dice.

plan-jax --config eval/rsna_segmentation --config.data.source=rsna --checkpoint runs/plan

The source is the folder as downloaded from Kaggle. The split is MGCA's for boxes, 16,010 / 5,337 /
5,337 images, in which 3,579 of the test images share an NIH patient with train. With RSNA's file of
NIH names in the folder, `--config.data.builder.split=hash` divides patients.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("rsna_pneumonia", split="mgca_compat_boxes")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"targets": ("findings",), "batch": 16, "learning_rate": 5e-4}
    return benchmark("segmentation", DATA, limit=5337, options=options)
