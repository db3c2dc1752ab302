"""RSNA pneumonia, boxes by a YOLOv3 head on a frozen tower: MGCA's protocol, mAP.

plan-jax --config eval/rsna_detection --config.data.source=rsna --checkpoint runs/plan

Source and split are those of `rsna_segmentation.py`. On 1 % of the labels MGCA uses learning rate
2e-4 and batch 8.
"""

from ml_collections import ConfigDict

from configs.eval import rsna_segmentation
from configs.eval.benchmark import benchmark


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"learning_rate": 5e-4, "batch": 16}
    return benchmark("detection", rsna_segmentation.DATA, limit=5337, options=options)
