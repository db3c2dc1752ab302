"""COVIDx, linear probe of three classes at 1, 10 and 100 %: MGCA's protocol, accuracy.

python -m plan_jax.main --config configs/eval/covidx_linear.py --checkpoint runs/plan

The manifest is yours to make from the lists of train and test: `image`, `patient_id`, `split` and
`labels`, one of the three classes.
"""

from ml_collections import ConfigDict

CLASSES = ("normal", "pneumonia", "COVID-19")


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "covidx/manifest.csv",
            "text_optional": True,
            "size": 256,
            "findings": CLASSES,
        }
    )
    config.eval = ConfigDict({"tasks": ("classification",), "split": "test", "limit": 10_000})
    config.eval.classification = ConfigDict({"labels": CLASSES, "kind": "multiclass"})
    return config
