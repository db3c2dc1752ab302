"""GLoRIA, as its code trains it; with `:phantom`, on a laptop.

plan-jax --config gloria:phantom
plan-jax --config gloria --config.data.source=MIMIC_CXR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Returns the experiment; constants from github.com/marshuang80/gloria at 416466a.

    Deviation: reports of MIMIC-CXR instead of CheXpert's, which were private.
    Deviation: the vector of a text is the mean of its pieces instead of all slots.
    Deviation: cosine decay instead of decay on a plateau.
    Deviation: linear heads on the text side, where the code has none.
    """
    config = base.get_sized_config(size)
    config.method = "gloria"
    if size == "phantom":
        config.hyper = ConfigDict(
            {"normalise_attention": True}
        )  # raw products saturate in 64 dimensions
    else:
        config.data.caption = "gloria"  # one random sentence of the impression
        config.text.name = "bert_base"
        config.text.pool = "mean"
        config.text.sum_last_layers = 4
        for head in config.heads:
            config.heads[head] = "linear"
        config.embed_dim = 768
        config.batch = 48
        config.data.max_tokens = 97
        config.data.max_words = 95
        config.optim.learning_rate = 5e-5
        config.optim.weight_decay = 1e-6
        config.optim.warmup_fraction = 0.01
        config.optim.b1 = 0.5
        config.optim.clip_norm = 0.25
    return config
