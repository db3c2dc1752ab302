"""PLAN on your own images and texts: a folder with a manifest.

python -m plan_jax.main --config configs/pairs.py --config.data.builder.manifest=DIR/manifest.csv

The manifest (CSV, JSON lines or Parquet) needs the columns `image` and `text`; it may have `split`,
`patient_id`, `labels`, `boxes` and `mask`. Other names:
--config.data.builder.columns="{'text': 'report'}".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return small towers at 128 pixels, for hundreds to thousands of pairs."""
    config = base.get_config()
    config.steps = 600
    config.batch = 32
    config.data.name = "pairs"
    config.data.size = 128
    config.data.shift = 8
    config.data.length = 96
    config.data.words = 80
    config.data.builder = ConfigDict({"manifest": "manifest.csv", "size": 160})
    config.optim.rate = 1e-3
    config.checkpoint.every = 200
    config.checkpoint.best = ""
    config.eval.tasks = ("retrieval",)  # and "grounding" if the manifest has boxes or masks
    config.parallel.cpu_devices = 2
    config.eval.split = "val"
    return config
