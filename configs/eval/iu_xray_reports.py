"""IU X-ray, report generation: R2Gen's protocol, at most 60 tokens, words that occur 3 times.

plan-jax --config eval/iu_xray_reports --checkpoint runs/plan

You create the manifest from annotation.json. Its columns are `image` (the frontal one; the original
joins the patches of the lateral one), `patient_id`, `split` (2,069 / 296 / 590) and `text`, the
findings.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = manifest("iu_xray/manifest.csv", has_text=True)
    options = {"max_length": 60, "min_count": 3, "epochs": 100}
    return benchmark("report_generation", data, limit=590, options=options)
