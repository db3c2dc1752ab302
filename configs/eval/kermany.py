"""Kermany's paediatric radiographs, normal or pneumonia: linear probe at 1, 10 and 100 %.

python -m plan_jax.main --config configs/eval/kermany.py --checkpoint runs/demo \
  --config.data.builder.manifest=DIR/manifest.csv

CC BY 4.0, Kermany et al., Mendeley rscbjbr9sj. The manifest has a column `pneumonia` of 1 and 0;
patients are divided by a hash of their names, 70 / 10 / 20.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "kermany/manifest.csv",
            "text_optional": True,
            "size": 224,
            "label_columns": ("pneumonia",),
            "columns": ConfigDict({"split": ""}),
            "test_fraction": 0.2,
        }
    )
    config.eval = ConfigDict(
        {"tasks": ("classification",), "split": "test", "limit": 1000, "random": True}
    )
    config.eval.classification = ConfigDict(
        {"labels": ("pneumonia",), "standardise": True, "learning_rate": 1e-2}
    )
    return config
