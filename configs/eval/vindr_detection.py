"""VinDr-CXR, boxes of 22 findings by a YOLOv3 head on a frozen tower: mAP, and AP by finding.

plan-jax --config eval/vindr_detection --config.data.source=vindr --checkpoint runs/plan

The source is the folder as downloaded from PhysioNet. The split is BenchX's, 12,000 / 3,000 / 3,000
films; the head and its training are those of MGCA's protocol for RSNA. In train, boxes of several
readers that overlap by an IoU of 0.5 are replaced by their mean, as by weighted box fusion, and a
finding of any reader counts.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("vindr_cxr", split="benchx", min_readers=1)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"classes": "each", "learning_rate": 5e-4, "batch": 16}
    return benchmark("detection", DATA, limit=3000, options=options)
