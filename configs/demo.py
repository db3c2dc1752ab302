"""PLAN on procedural phantoms: words find their pixels in minutes on a laptop.

python -m plan_jax.main --config configs/demo.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the demo: 4,096 phantoms of 96 pixels."""
    config = base.get_config()
    config.steps = 1800
    config.parallel.cpu_devices = 2
    return config
