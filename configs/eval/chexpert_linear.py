"""CheXpert's five competition labels, linear probe on 1, 10 and 100 %: MGCA's protocol.

plan-jax --config eval/chexpert_linear --config.data.source=chexpert --checkpoint runs/plan

The source is the folder as downloaded, of which the frontal films are used. The 202 of valid.csv
are test. Of the patients of train.csv, 2.2 % validate, with about as many films as MGCA's 5,000
rows. `--config.data.builder.split=mgca_compat` takes MGCA's own rows, of which 98 % are trained on
as well. A blank label is 0. An uncertain one becomes what MGCA makes of it.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
DATA = public("chexpert", split="valid_is_test", val_fraction=0.022, label_blank=0)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"labels": LABELS, "uncertain": "mgca"}
    return benchmark("classification", DATA, limit=5000, options=options)
