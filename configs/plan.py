"""PLAN, at the size of MGCA (its own settings are not public); with `:phantom`, on a laptop.

plan-jax --config plan:phantom
plan-jax --config plan --config.data.source=MIMIC_CXR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Returns the experiment; all of it is ours except what `base.get_paper_config` provides."""
    config = base.get_sized_config(size)
    config.method = "plan"
    config.fine_map = True  # rounds on the coarse map do not help, see docs/plan.md
    config.hyper = ConfigDict({"guide_round_steps": 1})  # maps cover findings, not their edges
    return config
