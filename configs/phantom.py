"""The longer run on phantoms: three times the images and steps of the demo.

python -m plan_jax.main --config configs/phantom.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the demo's model on 12,288 phantoms."""
    config = base.get_config()
    config.steps = 5000
    config.data.builder = ConfigDict({"train": 12288})
    config.checkpoint.every = 1000
    config.parallel.cpu_devices = 2
    return config
