"""Kermany's paediatric radiographs, normal or pneumonia: linear probe on 1, 10 and 100 %.

plan-jax --config eval/kermany --checkpoint runs/demo \
  --config.data.builder.manifest=DIR/manifest.csv

CC BY 4.0, Kermany et al., Mendeley rscbjbr9sj. The manifest has a column `pneumonia`, which is 1 or
0. Patients are divided by a hash of their names, 70 / 10 / 20.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = manifest(
        "kermany/manifest.csv",
        size=224,
        label_columns=("pneumonia",),
        columns={"split": ""},  # no column: divided by patient
        test_fraction=0.2,
    )
    options = {"labels": ("pneumonia",), "standardise": True, "learning_rate": 1e-2}
    return benchmark("classification", data, limit=1000, random_baseline=True, options=options)
