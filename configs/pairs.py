"""PLAN on your own images and reports: a folder with a manifest.

plan-jax --config pairs --config.data.builder.manifest=DIR/manifest.csv

The manifest (CSV, JSON Lines or Parquet) needs the columns `image` and `text`; docs/data.md lists
the optional ones. Map other names with --config.data.builder.columns="{'text': 'report'}".
"""

from ml_collections import ConfigDict

from configs import plan


def get_config() -> ConfigDict:
    """Returns small encoders at 128 pixels, for hundreds to thousands of pairs."""
    config = plan.get_config("phantom")
    config.steps = 600
    config.batch = 32
    config.data.name = "pairs"
    config.data.size = 128
    config.data.max_shift = 8
    config.data.max_tokens = 96
    config.data.max_words = 80
    config.data.builder = ConfigDict({"manifest": "manifest.csv", "size": 160})
    config.optim.name = "adamw"  # muon was not tried on radiographs
    config.optim.learning_rate = 1e-3
    config.checkpoint.every = 200
    config.checkpoint.best = ""
    config.eval.tasks = ("retrieval",)  # and "grounding" if the manifest has boxes or masks
    config.eval.split = "val"
    config.parallel.cpu_devices = 2
    return config
