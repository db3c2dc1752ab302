"""The fields of a config: the type, range and choices of each, and whose the open sections are."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from plan_jax import parallel
from plan_jax.data.dataset import BUILDERS as DATASETS
from plan_jax.data.prompts import PROMPT_SETS
from plan_jax.encoders.bert import BERTS, Bert
from plan_jax.encoders.resnet import RESNETS, ResNet
from plan_jax.encoders.vit import VITS, ViT
from plan_jax.methods import METHODS
from plan_jax.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Field:
    """What a value has to be: its type, its range, or (each item of) it one of some choices."""

    kind: Any
    least: int | float = -math.inf
    most: int | float = math.inf
    choices: tuple = ()
    item: Any = object  # what each item of a tuple has to be

    def fault(self, value: Any) -> str:
        """Say what the value has to be instead; empty if it is right."""
        if not _is(value, self.kind):
            return (
                f"it has to be {_KINDS.get(self.kind, getattr(self.kind, '__name__', self.kind))}"
            )
        items = value if self.kind is tuple else [value]
        if self.kind is tuple and not all(_is(item, self.item) for item in items):
            return f"each item has to be {_KINDS.get(self.item, self.item)}"
        if self.choices and not set(items) <= set(self.choices):
            return f"use {'some' if self.kind is tuple else 'one'} of {listed(self.choices)}"
        if self.kind in (int, float) and not self.least <= value <= self.most:
            above = f"at least {self.least:g}"
            return f"use {above if self.most == math.inf else f'{self.least:g} to {self.most:g}'}"
        return ""


SPLITS = ("train", "val", "test")
_KINDS = {int: "an int", float: "a number", bool: "True or False", str: "a text", tuple: "a tuple"}
_TINY = 1e-12  # what "more than nothing" means
OPEN = ("vision.", "text.", "hyper.", "data.builder.", *(f"eval.{task}." for task in TASKS))
_HEAD = Field(str, choices=("linear", "norm", "mlp", "shared"))
FIELDS = {
    "seed": Field(int, 0, 2**31 - 1),
    "steps": Field(int, 0),
    "batch": Field(int, 2),
    "dtype": Field(str, choices=("float32", "bfloat16")),
    "log_every": Field(int, 1),
    "data.name": Field(str, choices=DATASETS),
    "data.dir": Field(str),
    "data.size": Field(int, 8),
    "data.shift": Field(int, 0),
    "data.length": Field(int, 3),
    "data.words": Field(int, 1),
    "data.tokenizer": Field(str),
    "data.workers": Field(int, 0),
    "data.cache": Field(bool),
    "vision.name": Field(str, choices=(*RESNETS, *VITS)),
    "text.name": Field(str, choices=tuple(BERTS)),
    "heads.image_global": _HEAD,
    "heads.image_local": _HEAD,
    "heads.text_global": _HEAD,
    "heads.text_local": _HEAD,
    "dim": Field(int, 1),
    "hidden": Field(int, 1),
    "fine": Field(bool),
    "standard": Field(str, choices=("image", "fixed")),
    "channels": Field(int, 1, 3),
    "method": Field(str, choices=tuple(METHODS)),
    "weights.vision": Field(str),
    "weights.text": Field(str),
    "weights.heads": Field(str),
    "optim.rate": Field(float, _TINY),
    "optim.warmup": Field(float, 0, 1),
    "optim.end": Field(float, 0, 1),
    "optim.weight_decay": Field(float, 0),
    "optim.b1": Field(float, 0, 1 - _TINY),
    "optim.b2": Field(float, 0, 1 - _TINY),
    "optim.clip": Field(float, 0),
    "optim.accumulate": Field(int, 1),
    "optim.freeze": Field(tuple),
    "ema": Field(float, 0, 1 - _TINY),
    "parallel.implementation": Field(str, choices=parallel.IMPLEMENTATIONS),
    "parallel.devices": Field(int, 0),
    "parallel.cpu_devices": Field(int, 1),
    "parallel.cache": Field(str),
    "checkpoint.every": Field(int, 1),
    "checkpoint.keep": Field(int, 1),
    "checkpoint.best": Field(str),
    "eval.every": Field(int, 0),
    "eval.tasks": Field(tuple, choices=tuple(TASKS)),
    "eval.split": Field(str),
    "eval.limit": Field(int, 2),
    "eval.train": Field(int, 0),
    "eval.random": Field(bool),
    "eval.prompts": Field(str, choices=("", *PROMPT_SETS)),
    "eval.prior": Field(int, 0),
    "eval.batch": Field(int, 1),
}
LEAST = {
    "batch": 1,
    "epochs": 1,
    "patience": 1,
    "bootstrap_samples": 2,
    "learning_rate": _TINY,
    "visual_learning_rate": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "max_train_records": 0,
    "max_test_records": 0,
    "num_examples": 0,
    "bins": 1,
    "candidates": 1,
    "per_class": 1,
    "beam": 1,
    "max_length": 2,
    "min_count": 1,
}  # of the options of tasks, by name
LATER = {"eval.train": 0, "eval.random": False, "eval.prompts": ""}  # since version 0.1
# What may differ between two runs of one experiment without changing what is trained.
FREE = (
    "log_every",
    "data.dir",
    "data.workers",
    "data.cache",
    "checkpoint",
    "eval",
    "parallel",
    "dtype",
    "vision.remat",
    "vision.scan",
    "text.remat",
    "text.scan",
)


def sections(config: Mapping[str, Any]) -> dict[str, Field]:
    """Give the fields of the sections that depend on a choice: towers, method, dataset.

    A name that is no choice has no fields here; `check` finds fault with the name itself.
    """
    chosen = [config.get(name) for name in ("data", "vision", "text")]
    data, vision, text = (each if isinstance(each, Mapping) else {} for each in chosen)
    found = {}
    if vision.get("name") in RESNETS or vision.get("name") in VITS:
        tower = ResNet if vision["name"] in RESNETS else ViT
        found |= _fields("vision", tower, ("dtype", "axis", "hold", "parent", "name"))
    if text.get("name") in BERTS:
        found |= _fields("text", Bert, ("vocab", "dtype", "hold", "parent", "name"))
    if config.get("method") in METHODS:
        found |= _fields("hyper", METHODS[config["method"]].Hyper)
    for name, task in TASKS.items():
        found |= _fields(f"eval.{name}", task.Options)
    if data.get("name") in DATASETS:
        found |= _fields("data.builder", _builder_config(data["name"]), skip=_INHERITED)
    return found


_INHERITED = ("name", "version", "release_notes", "supported_versions", "description", "tags")


def _builder_config(dataset: str) -> type:
    if dataset == "pairs":
        from plan_jax.data.builders.pairs import PairsConfig as Config
    else:
        from plan_jax.data.builders.phantom import PhantomConfig as Config
    return Config


def _fields(prefix: str, source: type, skip: tuple[str, ...] = ()) -> dict[str, Field]:
    """Read names and types from a dataclass."""
    plain = {Mapping: dict, Sequence: tuple}
    found = {}
    for field in dataclasses.fields(source):
        if field.name not in skip:
            origin = typing.get_origin(field.type) or field.type
            if origin is typing.Literal:
                choices = typing.get_args(field.type)
                found[f"{prefix}.{field.name}"] = Field(str, choices=choices)
                continue
            kind = {Any: object, types.UnionType: field.type, **plain}.get(origin, origin)
            inner = (typing.get_args(field.type) or (object,))[0] if origin is tuple else object
            least = LEAST.get(field.name, -math.inf) if prefix.startswith("eval.") else -math.inf
            found[f"{prefix}.{field.name}"] = Field(kind, least, item=inner)
    return found


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, list | tuple)
    return isinstance(value, Mapping if kind is dict else kind)


def listed(names: Any) -> str:
    """Write names with commas between."""
    return ", ".join(str(name) for name in names)
