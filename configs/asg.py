"""ASG, as its code trains it on MIMIC-CXR; with `:phantom`, on a laptop.

plan-jax --config asg:phantom
plan-jax --config asg --config.data.source=CHEST_IMAGENOME --config.data.builder.images=MIMIC_CXR

Regions and findings are those of Chest ImaGenome on the films of MIMIC-CXR: ASG's own 23 regions
and 40 findings are not published.
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
        config.data.name = "chest_imagenome"
        config.vision = ConfigDict({"name": "vit_b16"})
        config.weights.vision = "timm/deit_base_patch16_224.fb_in1k"
        config.normalisation = "imagenet"
        config.batch = 288  # 72 on each of 4 GPUs
        config.steps = 37_500
        config.optim.learning_rate = 4e-5
    return config
