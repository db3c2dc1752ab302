"""SIIM pneumothorax, segmentation with a frozen tower: MGCA's protocol, Dice.

plan-jax --config eval/siim_segmentation --checkpoint runs/plan

You create the manifest from train-rle.csv, one row an image. Its columns are `image`, `patient_id`,
`split` (70 / 15 / 15) and `mask`, the path of a mask drawn from the RLE; empty: no pneumothorax.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

DATA = manifest("siim/manifest.csv")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"targets": ("findings",), "balance": True, "batch": 8, "learning_rate": 5e-4}
    return benchmark("segmentation", DATA, limit=2000, options=options)
