"""PLAN on phantoms, in minutes on a laptop.

plan-jax --config demo
"""

from ml_collections import ConfigDict

from configs import plan


def get_config() -> ConfigDict:
    """Returns PLAN on 4,096 phantoms of 96 pixels."""
    config = plan.get_config("phantom")
    config.steps = 1800
    config.parallel.cpu_devices = 2
    return config
