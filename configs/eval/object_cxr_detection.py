"""Object-CXR, foreign objects by a YOLOv3 head on a frozen tower: MGCA's protocol, mAP.

python -m plan_jax.main --config configs/eval/object_cxr_detection.py --checkpoint runs/plan

The manifest is yours to make from train.csv and dev.csv: `image`, `split` (7,200 / 800, dev is the
test) and `boxes`, JSON [[x0, y0, x1, y1], ..], of ellipses and polygons the box around them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {"manifest": "object_cxr/manifest.csv", "text_optional": True, "size": 256}
    )
    config.eval = ConfigDict({"tasks": ("detection",), "split": "test", "limit": 1000})
    config.eval.detection = ConfigDict({"learning_rate": 5e-4, "batch": 16})
    return config
