"""PLACE, at the size of MGCA (its own settings are not public); with `:phantom`, on a laptop.

plan-jax --config place:phantom
plan-jax --config place --config.data.source=MIMIC_CXR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Returns the experiment; all of it is ours except what `base.get_paper_config` provides."""
    config = base.get_sized_config(size)
    config.method = "place"
    if size == "phantom":
        config.hyper = ConfigDict({"match": "soft"})
    else:
        config.vision = ConfigDict({"name": "vit_b16"})
        config.weights.vision = "timm/deit_base_patch16_224.fb_in1k"
    return config
