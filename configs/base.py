"""Every field of an experiment with its default; the other configs change some of them.

Constants of a method live in its `Hyper`, options of a task in its `Options`, and settings of a
dataset in its builder; `hyper`, `eval.<task>` and `data.builder` hold only what an experiment
overrides. `plan_jax/config.py` checks types and ranges.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults: ConVIRT with small encoders on phantoms."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 3000  # updates of the parameters; 0 evaluates what `weights` loads
    config.batch = 32  # pairs per step over all devices; they are each other's negatives
    config.microbatch = 0  # pairs that one device encodes at a time; 0: all. docs/devices.md
    config.dtype = "float32"  # bfloat16 halves the memory of the encoders on a TPU or GPU
    config.log_every = 20  # steps
    config.method = "convirt"
    config.hyper = ConfigDict()

    config.data = ConfigDict()
    config.data.name = "phantom"
    config.data.dir = "data"  # folder of prepared datasets
    config.data.source = ""  # folder of a public dataset as downloaded, until it is prepared
    config.data.size = 96  # pixels; small findings vanish below about 64
    config.data.max_shift = 3  # pixels; random translation, where `augment` moves no pixels
    config.data.augment = ConfigDict()
    config.data.augment.name = ""  # convirt, mgca or chexpert_moco; docs/data.md lists the fields
    config.data.max_tokens = 48  # word pieces with [CLS] and [SEP]; longer reports lose sentences
    config.data.max_words = 40  # word slots; at most max_tokens - 2
    config.data.tokenizer = "phantom"  # must be that of pretrained text weights, if any
    config.data.workers = 0  # reader processes; use 4 to 8 for large images
    config.data.cache = True  # keep decoded images in memory; turn off for large datasets
    config.data.fingerprint = ""  # of the files; a run stores it and then accepts no other data
    config.data.caption = ""  # mgca, gloria, convirt, findings, ...: docs/data.md lists the rules
    config.data.builder = ConfigDict()

    config.vision = ConfigDict()
    config.vision.name = "resnet_small"
    config.vision.position = True  # a position embedding helps small encoders trained from scratch
    config.vision.pool = "mean_max"  # maximum pooling keeps small findings visible
    config.text = ConfigDict()
    config.text.name = "bert_small"
    config.text.block_diagonal = True  # attention within sentences, whose order is random
    config.text.pool = "attention"
    config.heads = ConfigDict()  # docs/weights.md lists the kinds; shared uses the global head
    config.heads.image_global = "norm"
    config.heads.image_local = "mlp"
    config.heads.text_global = "norm"
    config.heads.text_local = "norm"
    config.embed_dim = 64  # width of the shared space
    config.head_hidden_dim = 128  # of heads of kind mlp
    config.normalisation = "image"  # per image; "weights": that of the published weights
    config.channels = 1  # 3 for encoders pretrained on colour images
    config.fine_map = False  # also project the map one stage earlier, for PLAN's later rounds
    config.weights = ConfigDict()  # a file, a folder, a hub id or package:NAME; "" is random
    config.weights.vision = ""
    config.weights.text = ""
    config.weights.heads = ""  # "towers": in the files of `vision` and `text`
    config.weights.any_normalisation = False  # accept another than theirs, for fine-tuning

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # muon learns faster from scratch; docs/plan.md
    config.optim.learning_rate = 3e-3  # peak; use 2e-5 to 1e-4 for pretrained encoders
    config.optim.warmup_fraction = 0.1  # of all steps; too short, and the first steps diverge
    config.optim.end_lr_factor = 0.02  # last learning rate, relative to the peak
    config.optim.weight_decay = 1e-3  # of matrices and kernels only
    config.optim.b1 = 0.9  # not of the kernels that Muon updates
    config.optim.b2 = 0.98  # 0.999 forgets too slowly for runs of a few thousand steps
    config.optim.clip_norm = 1.0  # 0 does not clip
    config.optim.accumulate_steps = 1  # batches per update; negatives stay within a batch
    config.optim.freeze = ()  # `vision`, `text`, `text:6` (first layers), or paths of parameters
    config.ema_decay = 0.0  # of a moving average of the parameters; 0 keeps none

    config.hard_negatives = ConfigDict()  # false variants of the reports as further negatives
    config.hard_negatives.kinds = ()  # some of laterality, negation, severity, region
    config.hard_negatives.weight = 1.0
    config.hard_negatives.tau = 0.1

    config.parallel = ConfigDict()
    config.parallel.implementation = "shard_map"  # or pmap; both give the same numbers
    config.parallel.devices = 0  # 0 is all
    config.parallel.cpu_devices = 1  # virtual devices of a lone CPU; its number of cores is best
    config.parallel.cache = ""  # folder of compiled programs; "" is `programs` beside the run

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 500  # steps; what a crash costs at most
    config.checkpoint.minutes = 15.0  # after the last save, a run saves too; 0 saves by steps only
    config.checkpoint.keep = 2  # newest checkpoints, beside the best one
    config.checkpoint.best = "grounding/cnr_signed"  # validation metric; "" keeps no best one

    config.eval = ConfigDict()
    config.eval.every = 0  # steps between validations; 0 never validates
    config.eval.tasks = ("grounding", "retrieval", "zero_shot")
    config.eval.split = "test"
    config.eval.limit = 300  # records
    config.eval.batch = 64  # records that a device encodes at a time; memory grows with it
    config.eval.num_prior_records = 1000  # training records for the mean masks; 0 has none
    config.eval.max_fit_records = 0  # training records that heads are fitted to; 0 is all
    config.eval.random_baseline = False  # also fit heads to an image tower of random weights
    config.eval.prompts = ""  # a prompt set of data/prompts.py; "" uses the dataset's own
    return config


def get_sized_config(size: str) -> ConfigDict:
    """Returns the start of an experiment: `paper`, or `phantom`, which is `get_config()` by Muon.

    Raises:
      ValueError: another size.
    """
    if size not in ("paper", "phantom"):
        raise ValueError(f"size {size!r} is unknown; use paper or phantom")
    if size == "paper":
        return get_paper_config()
    config = get_config()
    config.optim.name = "muon"
    config.optim.learning_rate = 6e-3
    return config


def get_paper_config() -> ConfigDict:
    """Returns the settings of MGCA's code on MIMIC-CXR, which ASG and others took over.

    Source: github.com/HKU-MedAI/MGCA at 680fe4a (argparse of its training, configs, datasets).

    Deviation: in evaluation the whole image is fitted to 224 pixels; the code cuts the central 224
    of 256.
    Deviation: the code also decays biases and norms.
    Deviation: the code validates on the official test split too; `data.builder.split=mgca_compat`
    does so. Here patients of MS-CXR and of Chest ImaGenome's gold annotations are left out.
    """
    config = get_config()
    config.steps = 75_000  # 50 epochs of 217,000 pairs
    config.batch = 144  # 72 on each of 2 GPUs
    config.log_every = 50
    config.data.name = "mimic_cxr"
    config.data.caption = "mgca"
    config.data.size = 224
    config.data.max_shift = 0
    config.data.augment.name = "mgca"
    config.data.max_tokens = 112
    config.data.max_words = 110
    config.data.workers = 8
    config.data.cache = False
    config.data.tokenizer = "emilyalsentzer/Bio_ClinicalBERT"
    config.data.builder = ConfigDict({"size": 256})
    config.vision = ConfigDict({"name": "resnet50", "resize": 299})
    config.text = ConfigDict({"name": "bert_base_6", "dropout": 0.1})
    config.weights.vision = "timm/resnet50.tv_in1k"
    config.weights.text = "emilyalsentzer/Bio_ClinicalBERT"
    for head in config.heads:
        config.heads[head] = "mlp"
    config.embed_dim = 128
    config.head_hidden_dim = 2048
    config.normalisation = "fixed"
    config.channels = 3
    config.optim.learning_rate = 2e-5
    config.optim.warmup_fraction = 0.4
    config.optim.end_lr_factor = 5e-4
    config.optim.weight_decay = 0.05
    config.optim.b2 = 0.999
    config.optim.clip_norm = 0.0
    config.checkpoint.every = 1500
    config.checkpoint.best = "retrieval/i2t_r5"
    config.eval.every = 1500
    config.eval.tasks = ("retrieval",)
    config.eval.split = "val"
    return config
