"""IU X-ray, report generation in R2Gen's harness: at most 60 tokens, words seen three times.

python -m plan_jax.main --config configs/eval/iu_xray_reports.py --checkpoint runs/plan

The manifest is yours to make from annotation.json: `image` (the frontal one; the original joins the
lateral one's patches), `patient_id`, `split` (2,069 / 296 / 590) and `text`, the findings.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict({"manifest": "iu_xray/manifest.csv", "size": 256})
    config.eval = ConfigDict({"tasks": ("report_generation",), "split": "test", "limit": 590})
    config.eval.report_generation = ConfigDict({"max_length": 60, "min_count": 3, "epochs": 100})
    return config
