"""RSNA pneumonia, linear probe at 1, 10 and 100 % of the labels: MGCA's protocol.

python -m plan_jax.main --config configs/eval/rsna_linear.py --checkpoint runs/plan

The manifest is yours to make: `image`, `patient_id`, `split` (MGCA: 18,678 / 4,003 / 4,003) and a
column `pneumonia` of 1 and 0.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "rsna/manifest.csv",
            "text_optional": True,
            "size": 256,
            "label_columns": ("pneumonia",),
        }
    )
    config.eval = ConfigDict({"tasks": ("classification",), "split": "test", "limit": 4003})
    config.eval.classification = ConfigDict({"labels": ("pneumonia",)})
    return config
