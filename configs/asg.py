"""ASG, as its code trains it on MIMIC-CXR; with `:phantom`, on a laptop.

plan-jax --config asg:phantom
plan-jax --config asg --config.data.builder.manifest=DIR/manifest.csv

The manifest needs the columns `labels` and `regions` (JSON, {region: [x0, y0, x1, y1]}, pixels).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Returns the experiment; constants from github.com/ASGMVLP/ASGMVLP_CODE at 088e896."""
    config = base.get_sized_config(size)
    config.method = "asg"
    if size == "phantom":
        config.hyper = ConfigDict({"num_layers": 2, "hidden_dim": 128})
    else:
        config.vision = ConfigDict({"name": "vit_b16"})
        config.weights.vision = "timm/deit_base_patch16_224.fb_in1k"
        config.normalisation = "imagenet"
        config.batch = 288  # 72 on each of 4 GPUs
        config.steps = 37_500
        config.optim.learning_rate = 4e-5
    return config
