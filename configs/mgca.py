"""MGCA, as its code trains it on MIMIC-CXR; with `:phantom`, on a laptop.

python -m plan_jax.main --config configs/mgca.py:phantom
python -m plan_jax.main --config configs/mgca.py --config.data.builder.manifest=DIR/manifest.csv
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Return the experiment; sources in `base.paper`. Prototypes are frozen for one epoch."""
    config = base.sized(size)
    config.method = "mgca"
    config.fine = False
    if size == "phantom":
        config.hyper = ConfigDict({"prototypes": 64, "freeze": 128})
    else:
        config.vision = ConfigDict({"name": "vit_b16"})
        config.weights.vision = "timm/deit_base_patch16_224.fb_in1k"
        config.hyper = ConfigDict({"freeze": 1500})
    return config
