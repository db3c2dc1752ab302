"""The typed config of a run: frozen dataclasses that check themselves when they are built.

Everything that can be known before anything is computed is checked here, so that a mistake costs a
second and leaves nothing behind. Sections that depend on a choice take their fields from it:
`hyper` from the method's `Hyper`, `vision` and `text` from the encoder, `data.builder` from the
dataset's builder, and `eval.<task>` from the task's `Options`.
"""

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from plan_jax import parallel
from plan_jax.data.augmentation import PRESETS, Augmentation, preset_fields
from plan_jax.data.preparation import BUILDERS, builder_fields
from plan_jax.data.prompts import PROMPT_SETS
from plan_jax.data.sections.captions import CAPTIONS
from plan_jax.encoders.bert import BERTS, Bert
from plan_jax.encoders.dual_encoder import HEAD_KINDS, NORMALISATIONS, PLAIN_KINDS
from plan_jax.encoders.resnet import RESNETS, ResNet
from plan_jax.encoders.vit import VITS, ViT, check_patches
from plan_jax.methods import METHODS
from plan_jax.tasks import TASKS
from plan_jax.types import VARIANT_KINDS, UserError, check_local

SPLITS = ("train", "val", "test")
# The kinds of heads without parameters that each head may have.
PLAIN_CHOICES = {
    "image_global": ("mean",),
    "image_local": ("shared",),
    "text_global": ("none",),
    "text_local": ("shared", "none"),
}
# The value of `normalisation` that leaves the choice to the published weights of the image tower.
BY_WEIGHTS = "weights"
# The value of `weights.heads` for heads that are stored with their towers.
WITH_TOWERS = "towers"


def check_that(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raises UserError, naming a field, its value and the remedy, unless the condition holds."""
    if not condition:
        raise UserError(f"config.{name} is {value!r}; {remedy}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless the value is one of the choices."""
    choices = tuple(choices)
    # A tuple compares by equality, so a list from a config file is no TypeError.
    check_that(value in choices, name, value, f"use one of {listed(choices)}")


def check_section(name: str, value: Any, fields: Iterable[str]) -> None:
    """Raises UserError unless the value of a section is a dict of its fields."""
    remedy = f"it is a section: set one of its fields {listed(fields)}"
    check_that(isinstance(value, Mapping), name, value, remedy)


class Section:
    """Base class of the sections: range checks that name the field in full."""

    PREFIX: ClassVar[str] = ""

    def at_least(self, low: int | float, *names: str) -> None:
        """Checks that fields are at least `low`."""
        for name in names:
            value = getattr(self, name)
            check_that(value >= low, self.PREFIX + name, value, f"use at least {low}")

    def between(self, low: int | float, high: int | float, *names: str) -> None:
        """Checks that fields are in [low, high]."""
        for name in names:
            value = getattr(self, name)
            check_that(low <= value <= high, self.PREFIX + name, value, f"use {low} to {high}")

    def decay(self, *names: str) -> None:
        """Checks that fields are in [0, 1): with 1 a moving average would never move."""
        for name in names:
            value = getattr(self, name)
            remedy = "use 0 or more, below 1"
            check_that(0 <= value < 1, self.PREFIX + name, value, remedy)


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the image-text pairs come from, and how they become arrays."""

    PREFIX: ClassVar[str] = "data."

    name: str = "phantom"  # a dataset with a builder
    dir: str = "data"  # folder of prepared datasets, or its address, as gs://bucket/data
    source: str = ""  # folder of a public dataset as downloaded; needed until it is prepared
    size: int = 96  # pixels; side of the square image an encoder sees
    max_shift: int = 3  # pixels; random translation, where `augment` has no geometric part
    augment: Augmentation = field(default_factory=Augmentation)  # of training images
    max_tokens: int = 48  # word pieces of a text with [CLS] and [SEP]; attention is quadratic in it
    max_words: int = 40  # word slots of a text; at most max_tokens - 2
    tokenizer: str = "phantom"  # a folder, a vocabulary file, a hub id or package:NAME
    workers: int = 0  # reader processes; 0 reads in a thread, which suffices for small images
    cache: bool = True  # keep decoded training examples in memory; size**2 bytes per image
    fingerprint: str = ""  # digest of manifest and images that a run stores; "" accepts any data
    caption: str = ""  # rule that makes texts from sections of reports; "" is the stored text
    builder: Mapping[str, Any] = field(default_factory=dict)  # fields of the dataset's builder

    def __post_init__(self) -> None:
        check_choice("data.name", self.name, BUILDERS)
        if self.caption:
            check_choice("data.caption", self.caption, CAPTIONS)
        self.at_least(8, "size")
        self.at_least(0, "max_shift", "workers")
        self.at_least(3, "max_tokens")
        self.at_least(1, "max_words")
        check_that(
            self.max_words <= self.max_tokens - 2,
            "data.max_words",
            self.max_words,
            f"more words than data.max_tokens {self.max_tokens} can hold; "
            f"use at most {self.max_tokens - 2}",
        )


@dataclass(frozen=True)
class HeadsConfig(Section):
    """The kind of each projection head into the shared space; see `encoders.dual_encoder`."""

    PREFIX: ClassVar[str] = "heads."

    image_global: str = "norm"  # of the whole image
    image_local: str = "mlp"  # of each pixel of the map
    text_global: str = "norm"  # of the whole text
    text_local: str = "norm"  # of each word

    def __post_init__(self) -> None:
        for name, kind in vars(self).items():
            check_choice(f"heads.{name}", kind, (*HEAD_KINDS, *PLAIN_CHOICES[name]))
        check_that(
            not (self.image_global == "mean" and self.image_local == "shared"),
            "heads.image_local",
            self.image_local,
            "a mean of projected pixels needs a head for them; set it to mlp_bn, for example",
        )
        check_that(
            not (self.text_global == "none" and self.text_local == "shared"),
            "heads.text_local",
            self.text_local,
            "there is no global head to share; set it to none",
        )


@dataclass(frozen=True)
class WeightsConfig(Section):
    """Published weights to start from: a file, a folder, a hub id or package:NAME; "" is random."""

    PREFIX: ClassVar[str] = "weights."

    vision: str = ""  # of the image encoder
    text: str = ""  # of the text encoder
    heads: str = ""  # projection heads; "towers": from the files of `vision` and `text`
    any_normalisation: bool = False  # accept weights of another normalisation, for fine-tuning


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW or Muon with linear warm-up and cosine decay."""

    PREFIX: ClassVar[str] = "optim."

    name: Literal["adamw", "muon"] = "adamw"  # muon: AdamW too, but for kernels
    learning_rate: float = 3e-3  # peak; 2e-5 to 1e-4 for pretrained encoders
    warmup_fraction: float = 0.1  # of all steps; too short, and norms diverge in the first steps
    end_lr_factor: float = 0.02  # last learning rate, relative to the peak
    weight_decay: float = 1e-3  # of matrices and kernels only
    b1: float = 0.9  # decay of the mean of the gradients; for Muon's kernels it is 0.95
    b2: float = 0.98  # of their squares; 0.999 for batches below about 100 of noisy gradients
    clip_norm: float = 1.0  # largest global norm of the gradient; 0 does not clip
    accumulate_steps: int = 1  # batches averaged into one update; negatives stay within a batch
    freeze: tuple[str, ...] = ()  # `vision`, `text`, `text:6` (first layers) or parameter paths

    def __post_init__(self) -> None:
        remedy = "use a number above 0"
        check_that(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, remedy)
        self.between(0, 1, "warmup_fraction", "end_lr_factor")
        self.at_least(0, "weight_decay", "clip_norm")
        self.decay("b1", "b2")
        self.at_least(1, "accumulate_steps")


@dataclass(frozen=True)
class HardNegativesConfig(Section):
    """A loss against false variants of the reports, see `methods.hard_negatives`."""

    PREFIX: ClassVar[str] = "hard_negatives."

    kinds: tuple[str, ...] = ()  # of variants, one drawn for each report; () has none
    weight: float = 1.0  # of the loss
    tau: float = 0.1  # temperature of the similarities

    def __post_init__(self) -> None:
        unknown = [name for name in self.kinds if name not in VARIANT_KINDS]
        remedy = f"use some of {listed(VARIANT_KINDS)}"
        check_that(not unknown, "hard_negatives.kinds", self.kinds, remedy)
        self.between(0, 1e4, "weight")
        self.between(1e-3, 100, "tau")


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Devices, and the folder of compiled programs."""

    PREFIX: ClassVar[str] = "parallel."

    implementation: str = "shard_map"  # or pmap; both give the same numbers
    devices: int = 0  # devices to use; 0 is all
    cpu_devices: int = (
        1  # virtual devices of a machine with only a CPU; more than its cores is slow
    )
    cache: str = ""  # folder of compiled programs; "" is `programs` beside the run, or on the host

    def __post_init__(self) -> None:
        check_choice("parallel.implementation", self.implementation, parallel.IMPLEMENTATIONS)
        self.at_least(0, "devices")
        self.at_least(1, "cpu_devices")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When to save, and what to keep."""

    PREFIX: ClassVar[str] = "checkpoint."

    every: int = 500  # steps between checkpoints: what a crash costs at most
    minutes: float = 15.0  # after the last save, a run saves too; 0 saves by steps only
    keep: int = 2  # newest checkpoints to keep, beside the best one
    best: str = ""  # validation metric of the best checkpoint, which is kept too; "" keeps none

    def __post_init__(self) -> None:
        self.at_least(1, "every", "keep")
        self.at_least(0, "minutes")


@dataclass(frozen=True)
class EvalConfig(Section):
    """The evaluated tasks, and the records they are evaluated on."""

    PREFIX: ClassVar[str] = "eval."

    every: int = 0  # steps between validations during training; 0 never validates
    tasks: tuple[str, ...] = ("grounding", "retrieval", "zero_shot")  # some of plan_jax/tasks
    split: str = "test"  # or a part of it, as test[:50%]
    limit: int = 300  # evaluated records at most
    batch: int = 64  # records that a device encodes at a time; memory grows with it
    num_prior_records: int = 1000  # training records for the mean masks of grounding; 0 has none
    max_fit_records: int = 0  # training records that heads are fitted to; 0 is all
    random_baseline: bool = False  # also fit the heads to an image tower of random weights
    prompts: str = ""  # a prompt set of data/prompts.py; "" uses the dataset's own
    options: Mapping[str, Any] = field(default_factory=dict)  # task name -> its Options

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in TASKS]
        check_that(not unknown, "eval.tasks", self.tasks, f"use some of {listed(TASKS)}")
        check_choice("eval.split", self.split.partition("[")[0], SPLITS)
        check_choice("eval.prompts", self.prompts, ("", *PROMPT_SETS))
        self.at_least(0, "every", "num_prior_records", "max_fit_records")
        self.at_least(2, "limit")
        self.at_least(1, "batch")


@dataclass(frozen=True)
class Config(Section):
    """A whole experiment; `configs/base.py` documents the fields for those who write configs."""

    seed: int = 0  # of initial parameters and of all that is drawn at random
    steps: int = 3000  # updates of the parameters; 0 evaluates what `weights` loads
    batch: int = 32  # pairs per step, over all devices and hosts; they are each other's negatives
    microbatch: int = 0  # pairs that one device encodes at a time, to save memory; 0: all
    dtype: str = "float32"  # or bfloat16: what the encoders compute in
    log_every: int = 20  # steps
    method: str = "convirt"  # what is trained: asg, convirt, gloria, mgca, place or plan
    hyper: Any = None  # the method's Hyper
    data: DataConfig = field(default_factory=DataConfig)
    # The image encoder, and options of its class.
    vision: Mapping[str, Any] = field(default_factory=lambda: {"name": "resnet_small"})
    # The text encoder, and options of its class.
    text: Mapping[str, Any] = field(default_factory=lambda: {"name": "bert_small"})
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    embed_dim: int = 64  # width of the shared space
    head_hidden_dim: int = 128  # hidden width of heads of kind mlp
    normalisation: str = "image"  # of grey values (`DualEncoder`); "weights": as theirs
    channels: int = 1  # grey values repeated; 3 for encoders pretrained on colour images
    fine_map: bool = False  # also project the map one stage earlier, for PLAN's later rounds
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema_decay: float = 0.0  # of a moving average of the parameters, used in evaluation; 0 has none
    hard_negatives: HardNegativesConfig = field(default_factory=HardNegativesConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        self.between(0, 2**31 - 1, "seed")
        self.at_least(0, "steps", "microbatch")
        self.at_least(2, "batch")
        self.at_least(1, "log_every", "embed_dim", "head_hidden_dim")
        self.between(1, 3, "channels")
        self.decay("ema_decay")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("normalisation", self.normalisation, (*NORMALISATIONS, BY_WEIGHTS))
        check_that(
            self.normalisation != "imagenet" or self.channels == 3,
            "channels",
            self.channels,
            "normalisation imagenet has a mean for each of 3 colours; set channels to 3",
        )
        check_that(
            not (self.fine_map and self.vision["name"] in VITS),
            "fine_map",
            self.fine_map,
            f"{self.vision['name']} has maps of one size only; set it to False",
        )
        guide_steps = getattr(self.hyper, "guide_round_steps", 0)
        check_that(
            not guide_steps or (self.fine_map and self.hyper.rounds > 0),
            "hyper.guide_round_steps",
            guide_steps,
            "it guides rounds on the finer map; set it to 0, or set fine_map to True and "
            "hyper.rounds to 1",
        )
        if self.vision["name"] in VITS:
            sizes = {**VITS[self.vision["name"]], **self.vision}
            check_patches(self.data.size, sizes["patch"])
        check_that(
            self.normalisation != BY_WEIGHTS or bool(self.weights.vision),
            "weights.vision",
            self.weights.vision,
            f"normalisation {BY_WEIGHTS} is that of published weights; name them, or set it to"
            f" one of {listed(NORMALISATIONS)}",
        )
        self._check_heads()

    def _check_heads(self) -> None:
        """Checks the heads against the text tower, the weights and the tasks."""
        heads, weights = vars(self.heads), self.weights
        width = {**BERTS[self.text["name"]], **self.text}["width"]
        for name, kind in heads.items():
            check_that(
                kind != "none" or width == self.embed_dim,
                f"heads.{name}",
                kind,
                f"texts then have {width} dimensions and embed_dim is {self.embed_dim}; set"
                f" embed_dim to {width}, or choose a head",
            )
        sizes = {**RESNETS.get(self.vision["name"], {}), **self.vision}
        if heads["image_local"] == "shared" and "widths" in sizes:
            last = len(sizes["widths"]) - 1
            check_that(
                sizes["local_stage"] == last and sizes.get("pool", "mean") == "mean",
                "heads.image_local",
                "shared",
                "the global head maps the mean of the last stage, so set vision.local_stage to"
                f" {last} and vision.pool to mean, or choose a head",
            )
        # Tasks that fit a head use the image tower alone.
        tasks = [task for task in self.eval.tasks if not TASKS[task].FITS_HEAD]
        check_that(
            not tasks or self.compares_texts(),
            "eval.tasks",
            self.eval.tasks,
            f"{listed(tasks)} would compare images with random texts, as steps is 0 and"
            f" weights.{'heads' if weights.text else 'text'} is empty; set it, or evaluate tasks of"
            " images only",
        )

    def compares_texts(self) -> bool:
        """Returns whether images can be compared with texts, and not with random vectors of them.

        That is not so if only the image tower comes from published weights, and nothing is trained.
        """
        has_heads = bool(self.weights.heads) or set(vars(self.heads).values()) <= set(PLAIN_KINDS)
        is_complete = bool(self.weights.text) and has_heads
        return bool(self.steps) or not self.weights.vision or is_complete

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Builds a config from nested dicts; fields that are missing have their defaults.

        Raises:
          UserError: a field is unknown, or its value has the wrong type or is out of range.
        """
        values = fill_defaults(values)
        method = values["method"]
        check_type("method", method, str)
        check_choice("method", method, METHODS)
        hyper = build(METHODS[method].Hyper, values.pop("hyper", {}), "hyper.", f" of {method}")
        sections: dict[str, Any] = {"hyper": hyper}
        for name, section in SECTIONS.items():
            content = values.pop(name, {})
            if section is EvalConfig:
                content = _nest_options(content)
            if section is DataConfig:
                augment = build(Augmentation, content["augment"], "data.augment.")
                content = content | {"augment": augment}
            sections[name] = build(section, content, f"{name}.")
        for side in ("vision", "text"):
            sections[side] = _tower_options(side, values.pop(side, {"name": DEFAULT_TOWERS[side]}))
        data = sections["data"]
        if data.source:
            check_that(
                "source" in _builder_kinds(data.name),
                "data.source",
                data.source,
                f"dataset {data.name} is not made from a downloaded folder; leave it out",
            )
            # One place: a stored config would hide --config.data.builder.source of a later command.
            builder = {**data.builder, "source": data.source}
            data = dataclasses.replace(data, builder=builder, source="")
        builder = typed_values(_builder_kinds(data.name), data.builder, "data.builder.", data.name)
        sections["data"] = dataclasses.replace(data, builder=builder)
        return build(cls, values | sections, "", built=tuple(sections))

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts from which `from_dict` builds the same config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        nested = {
            name: _plain(dataclasses.asdict(value))
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
            else _plain(value)
            for name, value in values.items()
        }
        nested["eval"] |= nested["eval"].pop("options")
        return nested


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "heads": HeadsConfig,
    "weights": WeightsConfig,
    "optim": OptimConfig,
    "hard_negatives": HardNegativesConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
}
DEFAULT_TOWERS = {"vision": "resnet_small", "text": "bert_small"}
# Fields that may differ between two runs of one experiment: they do not change what is trained.
FREE_FIELDS = (
    "log_every",
    "data.dir",
    "data.source",
    "data.builder.source",
    "data.builder.workers",
    "data.workers",
    "data.cache",
    "data.fingerprint",  # compared when the data are opened
    "checkpoint",
    "eval",
    "parallel",
    "dtype",
    "vision.remat",
    "vision.scan",
    "text.remat",
    "text.scan",
)
# Where data are, which a fingerprint replaces.
PLACES = (
    *("data.builder.manifest", "data.builder.images", "data.builder.reports"),
    *("data.builder.ms_cxr", "data.builder.chest_imagenome"),
)
# What the hosts of a run may have each for itself: places and processes of their own machine.
HOST_FIELDS = (
    *("data.dir", "data.source", "data.builder.source", "data.cache", "parallel.cache"),
    *("data.builder.workers", "data.workers", *PLACES),
)
# Names of fields in configs of 0.1, by which a config of that version is recognised.
FIELDS_OF_0_1 = ("ema", "dim", "standard")


def check_image_size(config: Config, is_training: bool = False) -> None:
    """Raises UserError if an encoder would see images larger than the dataset stores them.

    In training an image has to be larger than the window that is cut from it.
    """
    size, default = config.data.size, _default(_builder_kinds(config.data.name)["size"])
    stored = config.data.builder.get("size", default)
    whole = config.data.augment.whole_size(size)
    check_that(
        not is_training or whole == size or whole <= stored,
        "data.augment.window",
        config.data.augment.window,
        f"{size} pixels are cut from {whole}, and dataset {config.data.name} stores its images at "
        f"{stored}; set config.data.builder.size={whole}, or config.data.augment.window=1",
    )
    check_that(
        size <= stored,
        "data.size",
        size,
        f"dataset {config.data.name} stores its images at {stored} pixels, so they would be "
        f"upsampled; set config.data.builder.size={size}, or use at most {stored}",
    )


def is_evaluation(values: Mapping[str, Any]) -> bool:
    """Returns whether a config describes only an evaluation: it has no fields but data and eval."""
    return bool(values) and set(values) <= {"data", "eval"}


def merge_evaluation(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a run with the data and tasks of an evaluation-only config.

    Another dataset starts from its builder's own defaults, and the options of a task replace all
    that the run set for it.
    """
    for name in ("data", "eval"):
        content = evaluation.get(name, {})
        check_that(isinstance(content, Mapping), name, content, "use a ConfigDict of its fields")
    data = copy.deepcopy(dict(evaluation.get("data", {})))
    if "name" in data or "builder" in data:
        data = {"builder": {}, "fingerprint": "", "source": "", "caption": ""} | data
    return dict(run) | {
        "data": dict(run["data"]) | data,
        "eval": dict(run["eval"]) | copy.deepcopy(dict(evaluation.get("eval", {}))),
    }


def check_version(values: Mapping[str, Any], place: str) -> None:
    """Raises UserError if a stored config is of version 0.1, whose fields had other names."""
    if any(name in values for name in FIELDS_OF_0_1):
        raise UserError(f"{place} was written by plan_jax 0.1 and cannot be read; train it again")


def difference(old: Config, new: Config, ignore: Sequence[str] = ()) -> str:
    """Returns the first field in which two configs train something else, or "" if there is none.

    Fields and sections in FREE_FIELDS and in `ignore` may differ. So may the place of data whose
    fingerprint is known, because data are identified by their content.
    """
    if old.data.fingerprint:
        ignore = (*ignore, *PLACES)
    return _first_difference(old, new, (*FREE_FIELDS, *ignore))


def host_difference(first: Config, other: Config) -> str:
    """Returns the first field in which two hosts of a run differ and may not, or ""."""
    return _first_difference(first, other, HOST_FIELDS)


def _first_difference(old: Config, new: Config, free: Sequence[str]) -> str:
    before, after = (dict(flatten(config.to_dict())) for config in (old, new))
    for name in sorted({*before, *after}):
        is_free = any(name == f or name.startswith(f"{f}.") for f in free)
        values = [flat.get(name, "unset") for flat in (before, after)]
        if not is_free and values[0] != values[1]:
            return f"config.{name} {values[0]}, not {values[1]}"
    return ""


def expect_normalisation(config: Config, run: Config) -> Config:
    """Returns a config with the normalisation of a run in place of `weights`.

    The run has stored the one that its weights were trained on, and does not need them again.
    """
    if config.normalisation != BY_WEIGHTS:
        return config
    return dataclasses.replace(config, normalisation=run.normalisation)


def expect_data(config: Config, run: Config, is_own: bool) -> Config:
    """Returns a config that accepts no data but those of a run, in any place.

    Args:
      config: the config; a fingerprint of its own stays.
      run: the config that the run has stored.
      is_own: whether the config describes the run's data. If not, any data will do.
    """
    own = config.data.fingerprint
    if is_own:
        fingerprint = own or run.data.fingerprint
    else:
        fingerprint = own if own != run.data.fingerprint else ""
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, fingerprint=fingerprint)
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every field with its dotted name; a dict that is itself a value stays one.

    >>> dict(flatten({"a": {"b": 1, "c": {}}, "data": {"builder": {"columns": {"text": "t"}}}}))
    {'a.b': 1, 'data.builder.columns': {'text': 't'}}
    """
    for key, value in values.items():
        # Below data.builder a dict is a value, as the columns of a manifest are.
        if isinstance(value, Mapping) and prefix != "data.builder.":
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fill_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config file's values with all missing fields at their defaults.

    Every field then exists, so that the command line can override fields that the file leaves out.
    Values are not checked yet. A choice that does not exist contributes no fields;
    `Config.from_dict` reports it.

    Raises:
      UserError: a section is not a dict.
    """
    defaults = _defaults_of(Config)
    defaults |= {name: _defaults_of(section) for name, section in SECTIONS.items()}
    del defaults["eval"]["options"]
    defaults["eval"] |= {task: _defaults_of(module.Options) for task, module in TASKS.items()}
    for name in ("hyper", "vision", "text", *SECTIONS):
        check_section(name, values.get(name, {}), defaults[name] or {})
    augment = values.get("data", {}).get("augment", {})
    defaults["data"]["augment"] = preset_fields("")
    check_section("data.augment", augment, defaults["data"]["augment"])
    if augment.get("name") in (*PRESETS,):
        defaults["data"]["augment"] = preset_fields(augment["name"])
    # Each choice is looked up in a tuple, because a list from a file is not hashable.
    method = values.get("method", Config.method)
    defaults["hyper"] = _defaults_of(METHODS[method].Hyper) if method in (*METHODS,) else {}
    for side, default_tower in DEFAULT_TOWERS.items():
        defaults[side] = _tower_defaults(values.get(side, {}).get("name", default_tower))
    dataset = values.get("data", {}).get("name", DataConfig.name)
    if dataset in (*BUILDERS,):
        kinds = _builder_kinds(dataset)
        defaults["data"]["builder"] = {name: _default(f) for name, f in kinds.items()}
    return _merge(defaults, values, "")


def unknown_field(name: str, field_names: Iterable[str], owner: str = "") -> UserError:
    """Returns the error for a field that does not exist, with the nearest field that does."""
    field_names = list(field_names)
    prefix = f"{name}."
    subfields = [field.removeprefix(prefix) for field in field_names if field.startswith(prefix)]
    if subfields:
        return UserError(f"config.{name} is a section; set one of its fields {listed(subfields)}")
    matches = difflib.get_close_matches(name, field_names, 1, 0.8 if owner else 0.6)
    section = name.rpartition(".")[0]
    paths = [field.rpartition(".") for field in field_names]
    siblings = [field for parent, _, field in paths if section and parent == section]
    top_level = dict.fromkeys(field.partition(".")[0] for field in field_names)
    remedy = f"use {listed(siblings or top_level)}"
    if matches:
        remedy = f"did you mean config.{matches[0]}?"
    return UserError(f"config.{name} is not a field{owner}; {remedy}")


# Building dataclasses from dicts --------------------------------------------------------------


def build(kind: type, values: Any, prefix: str, owner: str = "", built: Sequence[str] = ()) -> Any:
    """Builds a dataclass from a dict, having checked names and types.

    Args:
      kind: the dataclass; its annotations say which types are allowed.
      values: the dict.
      prefix: dotted name of the section, with a dot at its end.
      owner: whose fields these are, for the error of an unknown name, as ` of plan`.
      built: fields that are built already.

    Raises:
      UserError: a name is unknown, or a value has the wrong type or is out of range.
    """
    kinds = {f.name: f for f in dataclasses.fields(kind)}
    check_section(prefix.rstrip("."), values, kinds)
    ready = {name: values[name] for name in built}
    rest = {name: value for name, value in values.items() if name not in ready}
    return kind(**ready, **typed_values(kinds, rest, prefix, owner.removeprefix(" of ")))


def typed_values(
    kinds: Mapping[str, dataclasses.Field], values: Any, prefix: str, owner: str = ""
) -> dict[str, Any]:
    """Returns values converted to the types of their fields.

    Raises:
      UserError: a name is unknown, or a value has the wrong type.
    """
    check_section(prefix.rstrip("."), values, kinds)
    for name in values:
        if name not in kinds:
            field_names = [f"{prefix}{field}" for field in kinds]
            raise unknown_field(f"{prefix}{name}", field_names, f" of {owner}" if owner else "")
    return {
        name: convert(f"{prefix}{name}", value, kinds[name].type) for name, value in values.items()
    }


# Fields that may be addresses, as gs://bucket/data.
ADDRESSES = ("data.dir",)


def convert(name: str, value: Any, annotation: Any) -> Any:
    """Returns a value as its annotated type: lists become tuples, ints floats where needed.

    Raises:
      UserError: the value has another type, is none of a Literal's choices, or is an address where
        only paths are known.
    """
    if isinstance(value, str) and name not in ADDRESSES:
        check_local(f"config.{name}", value)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        check_choice(name, value, arguments)
    elif origin is tuple or annotation is tuple or origin is Sequence:
        check_that(isinstance(value, list | tuple), name, value, "must be a tuple")
        items = arguments[:1] if Ellipsis in arguments or origin is Sequence else arguments
        check_that(
            len(items) < 2 or len(items) == len(value), name, value, f"must have {len(items)} items"
        )
        kinds = items * len(value) if len(items) == 1 else items or (Any,) * len(value)
        remedy = f"each item must be {KIND_NAMES.get(kinds[0], kinds[0])}" if kinds else ""
        for item, kind in zip(value, kinds, strict=True):
            check_that(_has_type(item, kind), name, value, remedy)
        return tuple(
            float(item) if kind is float else item for item, kind in zip(value, kinds, strict=True)
        )
    elif origin is Mapping or annotation is Mapping or annotation is dict or origin is dict:
        check_that(isinstance(value, Mapping), name, value, "must be a dict")
        return dict(value)
    elif annotation in (int, float, bool, str):
        check_type(name, value, annotation)
        return float(value) if annotation is float else value
    elif origin in (typing.Union, types.UnionType):
        remedy = f"must be {' or '.join(KIND_NAMES.get(kind, str(kind)) for kind in arguments)}"
        check_that(any(_has_type(value, kind) for kind in arguments), name, value, remedy)
    return value


KIND_NAMES = {
    int: "an int",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}


def check_type(name: str, value: Any, kind: type) -> None:
    """Raises UserError unless a value has a plain type; NaN and infinity are not numbers."""
    check_that(_has_type(value, kind), name, value, f"must be {KIND_NAMES[kind]}")


def _has_type(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return not isinstance(kind, type) or isinstance(value, kind)


def tower_class(name: Any) -> tuple[type, Mapping[str, Any], tuple[str, ...]]:
    """Returns the module class of an encoder, its sizes, and its fields that are not options.

    Raises:
      KeyError: there is no such encoder.
    """
    internal = ("dtype", "axis", "frozen_layers", "parent", "name")
    if name in RESNETS:
        return ResNet, RESNETS[name], internal
    if name in VITS:
        return ViT, VITS[name], internal
    return Bert, BERTS[name], (*internal, "vocab_size")


def _builder_kinds(dataset: str) -> dict[str, dataclasses.Field]:
    _, config_class = BUILDERS[dataset]
    return {f.name: f for f in builder_fields(config_class)}


def _tower_options(side: str, values: Any) -> dict[str, Any]:
    tower_names = (*RESNETS, *VITS) if side == "vision" else tuple(BERTS)
    name = values.get("name", DEFAULT_TOWERS[side])
    check_choice(f"{side}.name", name, tower_names)
    # Fields of the module that a config sets; the others depend on the rest of the config.
    module, _, internal = tower_class(name)
    kinds = {f.name: f for f in dataclasses.fields(module) if f.name not in internal}
    options = {key: value for key, value in values.items() if key != "name"}
    return {"name": name} | typed_values(kinds, options, f"{side}.", name)


def _tower_defaults(name: Any) -> dict[str, Any]:
    if name not in (*RESNETS, *VITS, *BERTS):
        return {"name": name}
    module, sizes, internal = tower_class(name)
    fields = [f for f in dataclasses.fields(module) if f.name not in internal]
    return {"name": name} | {f.name: sizes.get(f.name, _default(f)) for f in fields}


def _nest_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the sections of tasks from `eval.<task>` to `eval.options`, as Options."""
    plain = {name: value for name, value in values.items() if name not in TASKS}
    options = {
        name: build(module.Options, values.get(name, {}), f"eval.{name}.")
        for name, module in TASKS.items()
    }
    return plain | {"options": options}


def _defaults_of(kind: type) -> dict[str, Any]:
    return {f.name: _default(f) for f in dataclasses.fields(kind)}


def _default(field_: dataclasses.Field) -> Any:
    if field_.default_factory is not dataclasses.MISSING:
        return field_.default_factory()
    return None if field_.default is dataclasses.MISSING else field_.default


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(defaults)
    for name, value in values.items():
        default = merged.get(name)
        # A dict without fields of its own is a value, as the columns of a manifest are.
        if isinstance(default, Mapping) and default:
            check_section(f"{prefix}{name}", value, default)
            merged[name] = _merge(default, value, f"{prefix}{name}.")
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            merged[name] = float(value)  # or the command line could override it by an int only
        else:
            merged[name] = tuple(value) if isinstance(value, list) else value
    return merged


def _plain(value: Any) -> Any:
    """Returns a value as JSON gives it back: lists for tuples, dicts for mappings."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))  # type: ignore[arg-type]
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def listed(names: Iterable[Any]) -> str:
    """Returns names with commas between them."""
    return ", ".join(str(name) for name in names)
