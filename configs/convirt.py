"""ConVIRT, as its paper trains it on MIMIC-CXR; with `:phantom`, on a laptop.

plan-jax --config convirt:phantom
plan-jax --config convirt --config.data.source=MIMIC_CXR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Returns the experiment; constants from arXiv 2010.00747, section 3.4 and appendix A.

    Deviation: cosine decay instead of decay on a plateau.
    Deviation: MGCA's heads and width instead of two layers to 512 dimensions.
    Deviation: in mirrored images the words left and right change places.
    """
    config = base.get_sized_config(size)
    config.method = "convirt"
    # The class activation map of ConVIRT applies the global head to each pixel and word.
    config.heads.image_local = "shared"
    config.heads.text_local = "shared"
    if size == "phantom":
        config.vision.pool = "mean"  # the map is only meaningful for a mean over pixels
    else:
        config.vision.local_stage = 3  # the map whose mean the global head is trained on
        config.data.caption = "convirt"  # one random sentence
        config.text.name = "bert_base"
        config.batch = 32
        config.data.augment.name = "convirt"
        config.optim.learning_rate = 1e-4
        config.optim.weight_decay = 1e-6
        config.optim.warmup_fraction = 0.01
    return config
