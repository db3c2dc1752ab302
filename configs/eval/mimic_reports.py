"""MIMIC-CXR, report generation: R2Gen's protocol, at most 100 tokens, words that occur 10 times.

plan-jax --config eval/mimic_reports --checkpoint runs/plan

You create the manifest. Its columns are `image`, `patient_id`, `split` (270,790 / 2,130 / 3,858)
and `text`, the findings.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = manifest("mimic_cxr/manifest.csv", has_text=True)
    options = {"max_length": 100, "min_count": 10, "epochs": 30}
    return benchmark("report_generation", data, limit=3858, options=options)
