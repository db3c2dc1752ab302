"""Every field of an experiment and its default; the other configs change some of them.

A number that belongs to a method lives in that method's `Hyper`; `hyper` here holds only what an
experiment overrides.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the defaults: PLAN with small towers on the procedural phantoms."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 3000  # updates of the parameters
    config.batch = 32  # pairs a step, over all devices and hosts
    config.dtype = "float32"  # or "bfloat16": what the towers compute in
    config.log_every = 20
    config.data = data()
    config.vision = ConfigDict(
        {"name": "resnet_small", "position": True, "pool": "mean_max"}, allow_dotted_keys=False
    )
    config.text = ConfigDict({"name": "bert_small", "blocked": True, "pool": "attention"})
    config.heads = ConfigDict(
        {"image_global": "norm", "image_local": "mlp", "text_global": "norm", "text_local": "norm"}
    )
    config.dim = 64  # of the shared space
    config.hidden = 128  # of the heads of kind mlp
    config.standard = "image"  # grey values: each image to mean 0, variance 1; or "fixed"
    config.channels = 1
    config.fine = True  # also give the map one stage earlier, for the later rounds
    config.method = "plan"
    config.hyper = ConfigDict()
    config.optim = ConfigDict(
        {
            "rate": 3e-3, "warmup": 0.1, "end": 0.02, "weight_decay": 1e-3, "b1": 0.9, "b2": 0.98,
            "clip": 1.0, "accumulate": 1, "freeze": (),
        }
    )  # fmt: skip
    config.ema = 0.0  # decay of a moving average of the parameters; 0 keeps none
    config.parallel = ConfigDict(
        {"implementation": "shard_map", "devices": 0, "cpu_devices": 1}
    )  # devices 0: all; cpu_devices: how many to make of a CPU that is alone
    config.checkpoint = ConfigDict({"every": 500, "keep": 2, "best": "grounding/cnr_signed"})
    config.eval = ConfigDict(
        {
            "every": 0, "tasks": ("grounding", "retrieval", "zero_shot"), "split": "test",
            "limit": 300, "prior": 1000, "batch": 64,
        }
    )  # fmt: skip
    return config


def data() -> ConfigDict:
    """Return where the pairs come from and how they become arrays."""
    return ConfigDict(
        {
            "name": "phantom",
            "dir": "data",
            "size": 96,  # pixels of the square image a tower sees
            "shift": 3,  # largest random shift in training, in pixels
            "length": 48,  # word-pieces of a text, [CLS] and [SEP] included
            "words": 40,
            "tokenizer": "phantom",
            "workers": 0,
            "cache": True,  # keep decoded training rows in memory
            "builder": ConfigDict(),  # settings of the dataset's builder
        }
    )
