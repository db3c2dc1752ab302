"""Object-CXR, foreign objects by a YOLOv3 head on a frozen tower: MGCA's protocol, mAP.

plan-jax --config eval/object_cxr_detection --checkpoint runs/plan

You create the manifest from train.csv and dev.csv. Its columns are `image`, `split` (7,200 / 800;
dev is the test) and `boxes`, JSON [[x0, y0, x1, y1], ..]; an ellipse or polygon becomes the box
around it.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

DATA = manifest("object_cxr/manifest.csv")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"learning_rate": 5e-4, "batch": 16}
    return benchmark("detection", DATA, limit=1000, options=options)
