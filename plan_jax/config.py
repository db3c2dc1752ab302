"""A config as plain dicts: changing its fields by text, and what is wrong with one.

Everything that can be known before anything is made is checked here, so that a mistake costs the
user a second and leaves nothing behind. Numbers that belong to a method or a dataset are fields of
its own `Hyper` or builder config; those sections, and the sizes of the towers, are read from there.
"""

import ast
import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from plan_jax.fields import FIELDS, FREE, LATER, OPEN, SPLITS, Field, listed, sections
from plan_jax.types import UserError


def check(config: Mapping[str, Any]) -> None:
    """Check every field of a config.

    Raises:
      UserError: for the first field that is unknown, missing, of another type or out of range.
    """
    present = dict(flat(config))
    for name in present:
        if name not in FIELDS and not name.startswith(OPEN):
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
        raise UserError(f"config.eval.split is {split!r}; use one of {listed(SPLITS)}")
    kinds = set(config["heads"].values())
    if config["weights"]["heads"] and kinds != {"mlp"}:
        raise UserError(
            f"config.weights.heads is for heads of kind mlp, and config.heads are {listed(kinds)};"
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


def is_evaluation(config: Mapping[str, Any]) -> bool:
    """Say whether a config only tells how to evaluate: it has no fields but `data` and `eval`."""
    return bool(config) and set(config) <= {"data", "eval"}


def complete(held: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a run's config the fields that there are since it was made."""
    full = copy.deepcopy(dict(held))
    for name, value in LATER.items():
        section, _, last = name.rpartition(".")
        full[section] = {last: value} | full.get(section, {})
    return full


def for_evaluation(held: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Change a run's config by a config that only tells how to evaluate.

    Its other dataset is read by its builder's settings alone; what is said of a task replaces all
    that the run said of it.
    """
    full = complete(held)
    data = copy.deepcopy(dict(given.get("data", {})))
    if "name" in data or "builder" in data:
        data.setdefault("builder", {})
    return full | {
        "data": full["data"] | data,
        "eval": full["eval"] | copy.deepcopy(dict(given.get("eval", {}))),
    }


def difference(
    held: Mapping[str, Any], given: Mapping[str, Any], also: tuple[str, ...] = ()
) -> str:
    """Say in which field two configs train something else; empty if in none.

    Fields and sections that are in `also` may differ too.

    >>> difference({"seed": 0, "eval": {"limit": 3}}, {"seed": 1, "eval": {"limit": 9}})
    'config.seed 0, not 1'
    """
    old, new = dict(flat(held)), dict(flat(given))
    for name in sorted({*old, *new}):
        free = any(name == field or name.startswith(f"{field}.") for field in (*FREE, *also))
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


def unknown(name: str, known: Mapping[str, Field], owner: str = "") -> UserError:
    """Make the sentence on a name that there is not, with the nearest one that there is."""
    inside = [k.removeprefix(f"{name}.") for k in known if k.startswith(f"{name}.")]
    if inside:
        return UserError(f"config.{name} is a section; set one of its fields {listed(inside)}")
    near = difflib.get_close_matches(name, known, 1, 0.8 if owner else 0.6)
    section = name.rpartition(".")[0]
    there = [k.rpartition(".")[2] for k in known if section and k.rpartition(".")[0] == section]
    tops = dict.fromkeys(k.partition(".")[0] for k in known)
    hint = f"did you mean config.{near[0]}?" if near else f"there are {listed(there or tops)}"
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


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
