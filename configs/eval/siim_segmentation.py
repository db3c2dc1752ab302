"""SIIM pneumothorax, segmentation with a frozen tower: MGCA's protocol, Dice.

plan-jax --config eval/siim_segmentation --config.data.source=siim --checkpoint runs/plan

The source is the folder as downloaded, with train-rle.csv. The split is MGCA's, 70 / 15 / 15 of the
rows of that table: 154 of its 1,903 test images are in train too, with other masks of the same
image. `--config.data.builder.split=hash` divides images.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("siim_pneumothorax", split="mgca_compat")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"targets": ("findings",), "balance": True, "batch": 8, "learning_rate": 5e-4}
    return benchmark("segmentation", DATA, limit=2000, options=options)
