"""MIMIC-CXR, report generation in R2Gen's harness: at most 100 tokens, words seen ten times.

python -m plan_jax.main --config configs/eval/mimic_reports.py --checkpoint runs/plan

The manifest is yours to make: `image`, `patient_id`, `split` (270,790 / 2,130 / 3,858) and `text`,
the findings.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict({"manifest": "mimic_cxr/manifest.csv", "size": 256})
    config.eval = ConfigDict({"tasks": ("report_generation",), "split": "test", "limit": 3858})
    config.eval.report_generation = ConfigDict({"max_length": 100, "min_count": 10, "epochs": 30})
    return config
