"""IU X-ray, report generation: R2Gen's protocol, at most 60 tokens, words that occur 3 times.

plan-jax --config eval/iu_xray_reports --config.data.source=iu_xray --checkpoint runs/plan

The source is the folder of R2Gen's annotation.json, whose lists have 2,069 / 296 / 590 reports. The
text is the findings. The image is the first of a report, mostly the frontal one; the original joins
the patches of two.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("openi", split="r2gen", first_only=True) | {"caption": "findings"}


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"max_length": 60, "min_count": 3, "epochs": 100}
    return benchmark("report_generation", DATA, limit=590, options=options)
