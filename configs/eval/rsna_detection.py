"""RSNA pneumonia, boxes by a YOLOv3 head on a frozen tower: MGCA's protocol, mAP.

python -m plan_jax.main --config configs/eval/rsna_detection.py --checkpoint runs/plan

The manifest is that of `rsna_segmentation.py`. MGCA takes rate 2e-4 and batch 8 at 1 % of labels.
"""

from ml_collections import ConfigDict

from configs.eval import rsna_segmentation


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = rsna_segmentation.get_config()
    config.eval = ConfigDict({"tasks": ("detection",), "split": "test", "limit": 5337})
    config.eval.detection = ConfigDict({"learning_rate": 5e-4, "batch": 16})
    return config
