"""The longer run on phantoms: four times the images and steps of the demo, within an hour.

python -m plan_jax.main --config configs/phantom.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the demo's model on 16,384 phantoms."""
    config = base.get_config()
    config.steps = 6000
    config.data.builder = ConfigDict({"train": 16384})
    config.checkpoint.every = 1000
    config.parallel.cpu_devices = 2
    return config
