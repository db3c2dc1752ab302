"""PadChest-GR, phrase grounding of the sentences of its test patients: CNR, mIoU, pointing game.

plan-jax --config eval/padchest_gr_grounding --config.data.source=padchest_gr --checkpoint runs/plan

The source is the folder as downloaded, with the images unpacked. A phrase is an abnormal sentence
of a report, its truth the boxes of the first reader; `--config.data.builder.extra_boxes=true` adds
those of the second, and `--config.data.builder.language=es` takes the Spanish sentences. No paper
has fixed how contrastive models are scored on this set: maps are smoothed as for MS-CXR, and whole
images are seen. A model must not have been trained on these patients' films in PadChest.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("padchest_gr", size=512)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    return benchmark("grounding", DATA, limit=1000, num_prior_records=0, options={"smooth": 1.5})
