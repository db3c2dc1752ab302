"""MGCA, as its code trains it on MIMIC-CXR; with `:phantom`, on a laptop.

plan-jax --config mgca:phantom
plan-jax --config mgca --config.data.source=MIMIC_CXR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Returns the experiment; `base.get_paper_config` has the sources."""
    config = base.get_sized_config(size)
    config.method = "mgca"
    if size == "phantom":
        config.hyper = ConfigDict(
            {"num_prototypes": 64, "freeze_prototype_steps": 128}
        )  # one epoch of 4,096 pairs
    else:
        config.vision = ConfigDict({"name": "vit_b16"})
        config.weights.vision = "timm/deit_base_patch16_224.fb_in1k"
        config.hyper = ConfigDict({"freeze_prototype_steps": 1500})  # one epoch of 217,000 pairs
    return config
