"""A config as plain dicts: the fields there are, changing them by text, and what is wrong with one.

Everything that can be known before anything is made is checked here, so that a mistake costs the
user a second and leaves nothing behind. Numbers that belong to a method or a dataset are fields of
its own `Hyper` or builder config; those sections, and the sizes of the towers, are read from there.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plan_jax import parallel
from plan_jax.data.prepare import NAMES as DATASETS
from plan_jax.encoders.resnet import RESNETS, ResNet
from plan_jax.encoders.text import BERTS, Bert
from plan_jax.encoders.vit import VITS, ViT
from plan_jax.methods import METHODS
from plan_jax.tasks import TASKS
from plan_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Field:
    """What a value has to be: its type, its range, or (each item of) it one of some choices."""

    kind: Any
    least: int | float = -math.inf
    most: int | float = math.inf
    choices: tuple = ()

    def fault(self, value: Any) -> str:
        """Say what the value has to be instead; empty if it is right."""
        if not _is(value, self.kind):
            return (
                f"it has to be {_KINDS.get(self.kind, getattr(self.kind, '__name__', self.kind))}"
            )
        items = value if self.kind is tuple else [value]
        if self.choices and not set(items) <= set(self.choices):
            return f"use {'some' if self.kind is tuple else 'one'} of {_listed(self.choices)}"
        if self.kind in (int, float) and not self.least <= value <= self.most:
            above = f"at least {self.least:g}"
            return f"use {above if self.most == math.inf else f'{self.least:g} to {self.most:g}'}"
        return ""


SPLITS = ("train", "val", "test")
_KINDS = {int: "an int", float: "a number", bool: "True or False", str: "a text", tuple: "a tuple"}
_TINY = 1e-12  # what "more than nothing" means
_OPEN = ("vision.", "text.", "hyper.", "data.builder.")
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
    "eval.prior": Field(int, 1),
    "eval.batch": Field(int, 1),
}
# What may differ between two runs of one experiment without changing what is trained.
FREE = (
    "log_every", "data.dir", "data.workers", "data.cache", "checkpoint", "eval", "parallel",
    "dtype", "vision.remat", "vision.scan", "text.remat", "text.scan",
)  # fmt: skip


def check(config: Mapping[str, Any]) -> None:
    """Check every field of a config.

    Raises:
      UserError: for the first field that is unknown, missing, of another type or out of range.
    """
    present = dict(flat(config))
    for name in present:
        if name not in FIELDS and not name.startswith(_OPEN):
            raise unknown(name, FIELDS)
    for name, held in (("hyper", config), ("data.builder", config.get("data", {}))):
        if not isinstance(held.get(name.rpartition(".")[2]), Mapping):
            raise UserError(f"config.{name} is missing; make it an empty ConfigDict at least")
    for name, field in FIELDS.items():
        if name not in present:
            raise UserError(
                f"config.{name} is missing; begin your config with that of configs/base.py"
            )
        _check_value(name, present[name], field)
    own = sections(config)
    for name, value in present.items():
        if name not in FIELDS:
            if name not in own:
                raise unknown(name, {**FIELDS, **own}, _owner(name, config))
            _check_value(name, value, own[name])
    if (split := config["eval"]["split"].partition("[")[0]) not in SPLITS:
        raise UserError(f"config.eval.split is {split!r}; use one of {_listed(SPLITS)}")
    kinds = set(config["heads"].values())
    if config["weights"]["heads"] and kinds != {"mlp"}:
        raise UserError(
            f"config.weights.heads is for heads of kind mlp, and config.heads are {_listed(kinds)};"
            " set all four to mlp, or leave weights.heads empty"
        )
    if config["data"]["words"] > config["data"]["length"] - 2:
        raise UserError(
            f"config.data.words is {config['data']['words']}, more than fit in the"
            f" {config['data']['length']} pieces of config.data.length; use at most"
            f" {config['data']['length'] - 2}"
        )


def override(config: dict[str, Any], changes: Mapping[str, str]) -> None:
    """Change fields, named with dots, to what a text says; those of open sections come last.

    Raises:
      UserError: for a field that is unknown, or a text that its type cannot be read from.
    """
    for name in sorted(changes, key=lambda name: name not in FIELDS):
        known = FIELDS if name in FIELDS else {**FIELDS, **sections(config)}
        if name not in known:
            raise unknown(name, known, _owner(name, config))
        *path, last = name.split(".")
        section = config
        for part in path:
            if not isinstance(section.get(part), dict):
                section[part] = {}  # `check` will find what is missing
            section = section[part]
        section[last] = _read(name, changes[name], known[name])


def difference(held: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Say in which field two configs train something else; empty if in none.

    >>> difference({"seed": 0, "eval": {"limit": 3}}, {"seed": 1, "eval": {"limit": 9}})
    'config.seed 0, not 1'
    """
    old, new = dict(flat(held)), dict(flat(given))
    for name in sorted({*old, *new}):
        free = any(name == field or name.startswith(f"{field}.") for field in FREE)
        values = [_plain(each.get(name, "unset")) for each in (old, new)]
        if not free and values[0] != values[1]:
            return f"config.{name} {values[0]}, not {values[1]}"
    return ""


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give every field with its name in dots; a dict that is itself a value stays one.

    >>> dict(flat({"a": {"b": 1, "c": {}}, "data": {"builder": {"columns": {"text": "t"}}}}))
    {'a.b': 1, 'data.builder.columns': {'text': 't'}}
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and prefix != "data.builder.":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
            found[f"{prefix}.{field.name}"] = Field(kind)
    return found


def unknown(name: str, known: Mapping[str, Field], owner: str = "") -> UserError:
    """Make the sentence on a name that there is not, with the nearest one that there is."""
    inside = [k.removeprefix(f"{name}.") for k in known if k.startswith(f"{name}.")]
    if inside:
        return UserError(f"config.{name} is a section; set one of its fields {_listed(inside)}")
    near = difflib.get_close_matches(name, known, 1, 0.8 if owner else 0.6)
    section = name.rpartition(".")[0]
    there = [k.rpartition(".")[2] for k in known if section and k.rpartition(".")[0] == section]
    tops = dict.fromkeys(k.partition(".")[0] for k in known)
    hint = f"did you mean config.{near[0]}?" if near else f"there are {_listed(there or tops)}"
    return UserError(f"config.{name} is not a field{owner}; {hint}")


def _owner(name: str, config: Mapping[str, Any]) -> str:
    """Say whose fields a section's are: of the method, the tower or the dataset that is chosen."""
    section = name.rpartition(".")[0]
    if section == "hyper":
        return f" of {config.get('method')}"
    chosen = {"vision": "vision", "text": "text", "data.builder": "data"}.get(section)
    found = config.get(chosen) if chosen else None
    return f" of {found.get('name')}" if isinstance(found, Mapping) else ""


def _check_value(name: str, value: Any, field: Field) -> None:
    if fault := field.fault(value):
        raise UserError(f"config.{name} is {value!r}; {fault}")


def _read(name: str, text: str, field: Field) -> Any:
    """Read a value of the field's type from a text: 3, 1e-3, true, a name, (a, b), {'a': 1}."""
    value: Any = text
    if field.kind is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
        value = text.lower() in ("true", "1", "yes")
    elif field.kind is not str:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if field.kind is tuple:  # names without quotation marks
                value = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if field.kind is tuple and not isinstance(value, list | tuple):
            value = (value,)
    _check_value(name, value, field)
    return tuple(value) if field.kind is tuple else value


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, list | tuple)
    return isinstance(value, Mapping if kind is dict else kind)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)
