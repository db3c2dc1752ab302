"""CheXpert 5x200, zero-shot classification of five classes: GLoRIA's protocol, MGCA's films.

plan-jax --config eval/chexpert_5x200 --config.data.source=chexpert --checkpoint runs/plan

The source is the folder as downloaded, of which train.csv and train/ are used: 200 frontal films of
each of the five classes. A film counts if one of the five is 1 and the other four are 0, and the
eight findings of `ABSENT` are 0 as well. A blank label is 0; an uncertain one (-1) leaves the film
out; "No Finding" is not asked. The films are those that MGCA's code draws, with seed 0. GLoRIA's
own draw had no seed and its list is not published, so figures compare with MGCA's list only.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

CLASSES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
ABSENT = (
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Lung Opacity",
    "Pneumonia",
    "Pneumothorax",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
DATA = public("chexpert", split="5x200")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "max", "kind": "multiclass", "labels": CLASSES, "absent": ABSENT}
    return benchmark("zero_shot", DATA, limit=1000, prompts="gloria", options=options)
