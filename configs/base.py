"""Every field of an experiment and its default; the other configs change some of them.

A number that belongs to a method lives in that method's `Hyper`; `hyper` here holds only what an
experiment overrides.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the defaults: PLAN with small towers on the procedural phantoms."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 3000  # updates of the parameters; 0 evaluates what `weights` names
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
    # Where towers and heads start, instead of at random: a file, a folder, a hub id, package:NAME.
    config.weights = ConfigDict({"vision": "", "text": "", "heads": ""})
    config.optim = ConfigDict(
        {
            "rate": 3e-3,
            "warmup": 0.1,
            "end": 0.02,
            "weight_decay": 1e-3,
            "b1": 0.9,
            "b2": 0.98,
            "clip": 1.0,
            "accumulate": 1,
            "freeze": (),
        }
    )
    config.ema = 0.0  # decay of a moving average of the parameters; 0 keeps none
    config.parallel = ConfigDict(
        {"implementation": "shard_map", "devices": 0, "cpu_devices": 1, "cache": ""}
    )  # devices 0: all; cpu_devices: how many to make of a CPU that is alone; cache: the folder of
    # compiled programs, by default `programs` beside the run
    config.checkpoint = ConfigDict({"every": 500, "keep": 2, "best": "grounding/cnr_signed"})
    config.eval = ConfigDict(
        {
            "every": 0,
            "tasks": ("grounding", "retrieval", "zero_shot"),
            "split": "test",
            "limit": 300,
            "prior": 1000,
            "batch": 64,
            "train": 0,
            "random": False,
            "prompts": "",
        }
    )
    # eval.prior: training records whose mean masks are baselines of grounding (0: none);
    # eval.train: records that heads are fitted to (0: all); eval.random: fit them to a tower of
    # random weights as well; eval.prompts: a set of data/prompts.py. Options of a task, as
    # eval.classification.epochs, are fields of its `Options`.
    return config


def sized(size: str) -> ConfigDict:
    """Return where an experiment begins: `paper`, or `phantom`, the small towers of `get_config`.

    Raises:
      ValueError: for another size.
    """
    if size not in ("paper", "phantom"):
        raise ValueError(f"size {size!r} is unknown; use paper or phantom")
    return paper() if size == "paper" else get_config()


def paper() -> ConfigDict:
    """Return what MGCA's code does with MIMIC-CXR, which ASG and others took over.

    Source: github.com/HKU-MedAI/MGCA at 680fe4a (argparse of its training, configs, datasets). The
    manifest is yours to make from MIMIC-CXR-JPG: frontal images, impression and findings joined.
    Deviations: its image is a random crop of 224 from 256 pixels, ours the whole image moved by up
    to 16; it also decays biases and norms.
    """
    config = get_config()
    config.steps = 75_000  # 50 epochs of 217,000 pairs
    config.batch = 144  # 72 on each of 2 GPUs
    config.log_every = 50
    config.data.update(
        name="pairs",
        size=224,
        shift=16,
        length=112,
        words=110,
        workers=8,
        cache=False,
        tokenizer="emilyalsentzer/Bio_ClinicalBERT",
        builder=ConfigDict({"manifest": "mimic_cxr/manifest.csv", "size": 256}),
    )
    config.vision = ConfigDict({"name": "resnet50", "resize": 299}, allow_dotted_keys=False)
    config.text = ConfigDict({"name": "bert_base_6", "dropout": 0.1})
    config.weights.update(vision="timm/resnet50.tv_in1k", text="emilyalsentzer/Bio_ClinicalBERT")
    for head in config.heads:
        config.heads[head] = "mlp"
    config.dim, config.hidden = 128, 2048
    config.standard, config.channels, config.fine = "fixed", 3, False
    config.optim.update(rate=2e-5, warmup=0.4, end=5e-4, weight_decay=0.05, b2=0.999, clip=0.0)
    config.checkpoint.update(every=1500, best="retrieval/i2t_r5")
    config.eval.update(every=1500, tasks=("retrieval",), split="val")
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
