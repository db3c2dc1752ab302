"""Object-CXR, foreign objects by a YOLOv3 head on a frozen tower: MGCA's protocol, mAP.

plan-jax --config eval/object_cxr_detection --config.data.source=object_cxr --checkpoint runs/plan

The source is the folder as downloaded. The split is MGCA's: of train.csv 7,200 films are train and
800 val, and dev.csv is test. The box of an ellipse or polygon is the one around it, where MGCA
centres that of a polygon elsewhere.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("object_cxr", split="mgca_compat")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"learning_rate": 5e-4, "batch": 16}
    return benchmark("detection", DATA, limit=1000, options=options)
