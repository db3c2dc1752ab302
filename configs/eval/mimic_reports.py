"""MIMIC-CXR, report generation: R2Gen's protocol, at most 100 tokens, words that occur 10 times.

plan-jax --config eval/mimic_reports --config.data.source=mimic_cxr --checkpoint runs/plan

The official splits of MIMIC-CXR, every view, the findings as the report. R2Gen counts 270,790 /
2,130 / 3,858 images with findings; the metric `reports_empty` counts those without. Patients of
MS-CXR and of Chest ImaGenome's gold annotations are left out of train, unless
`data.builder.keep_evaluated` is true.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = public("mimic_cxr", views="all") | {"caption": "findings"}
    options = {"max_length": 100, "min_count": 10, "epochs": 30}
    return benchmark("report_generation", data, limit=5159, options=options)
