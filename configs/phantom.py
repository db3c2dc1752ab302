"""PLAN on phantoms, a longer run: three times the images and steps of the demo.

plan-jax --config phantom
"""

from ml_collections import ConfigDict

from configs import plan


def get_config() -> ConfigDict:
    """Returns the demo's model on 12,288 phantoms."""
    config = plan.get_config("phantom")
    config.steps = 5000
    config.data.builder = ConfigDict({"train": 12288})
    config.checkpoint.every = 1000
    config.parallel.cpu_devices = 2
    return config
