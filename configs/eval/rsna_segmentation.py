"""RSNA pneumonia, segmentation of the filled boxes with a frozen tower: MGCA's protocol, Dice.

plan-jax --config eval/rsna_segmentation --checkpoint runs/plan

You create the manifest from stage_2_train_labels.csv, one row a patient. Its columns are `image`,
`patient_id`, `split` (16,010 / 5,337 / 5,337) and `boxes`, JSON [[x0, y0, x1, y1], ..].
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

DATA = manifest("rsna_boxes/manifest.csv")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"targets": ("findings",), "batch": 16, "learning_rate": 5e-4}
    return benchmark("segmentation", DATA, limit=5337, options=options)
