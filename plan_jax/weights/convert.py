"""Arrays of a file fitted to a tower: renamed, cut or scaled where that is meant, all else refused.

Here a file's arrays are flat under our names, `params/layer1_0/conv1/kernel`, and a tower is given
by the shapes that it wants under the same names.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import Float, PyTree, Shaped

from plan_jax.types import UserError
from plan_jax.weights.layouts import ZERO, Layout, is_dropped, our_name

State = dict[str, Shaped[np.ndarray, "..."]]
Shapes = dict[str, tuple[int, ...]]
_KERNELS = {4: (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0)}  # torch's axes in our order
STEM, EMBED = "params/stem/kernel", "params/embed/kernel"
_LAYER = re.compile(r"params/layer(\d+)/")


def flat(held: Mapping[str, Any]) -> Shapes:
    """Give the shapes of a tower's trees under flat names.

    >>> flat({"params": {"norm": {"bias": np.zeros(3)}}, "batch_stats": {}})
    {'params/norm/bias': (3,)}
    """
    leaves = traverse_util.flatten_dict(dict(held), sep="/")
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def rebuilt(held: Mapping[str, Any], found: State, path: str = "") -> dict[str, PyTree]:
    """Put flat arrays back into trees like `held`, as float32."""
    return {
        name: rebuilt(inner, found, f"{path}{name}/")
        if isinstance(inner, Mapping)
        else np.ascontiguousarray(found[path + name], np.float32)
        for name, inner in held.items()
    }


def renamed(state: State, layout: Layout) -> tuple[State, dict[str, str], State]:
    """Give a tower's arrays under our names and in our axes [...], their old names, and the rest.

    The rest are keys that are neither of the tower nor left out knowingly.
    """
    if layout.whose == "plan_jax":
        return dict(state), {key: key for key in state}, {}
    found, origin, left = {}, {}, {}
    for key, value in state.items():
        ours = None
        if key.startswith(layout.prefix):
            ours = our_name(key.removeprefix(layout.prefix), layout.kind)
        if ours is None or ours in found:
            if not is_dropped(key, layout):
                left[key] = value
            continue
        if ours.endswith("/kernel") and value.ndim in _KERNELS:
            value = value.transpose(_KERNELS[value.ndim])
            value = value[0] if value.ndim == 3 and value.shape[0] == 1 else value
        found[ours], origin[ours] = value, key
    return found, origin, left


def adapt(found: State, wanted: Shapes, layout: Layout, source: str) -> list[str]:
    """Cut, scale and fill `found` where that is meant, in place; give a sentence for each change.

    Raises:
      UserError: if BERT has too few layers or positions, or another vocabulary.
    """
    steps: list[Callable[[], str]] = [lambda: _summed(found, wanted)]
    if layout.kind == "vit":
        steps.append(lambda: _scaled(found, wanted))
    if layout.kind == "bert":
        steps += [
            lambda: _cut_layers(found, wanted, source),
            lambda: _cut_places(found, wanted, source),
            lambda: _same_words(found, wanted, source),
            lambda: _zeroed(found, wanted, layout),
        ]
    return [note for step in steps if (note := step())]


def _summed(found: State, wanted: Shapes) -> str:
    """Let one channel do what three equal ones did: the sum of their kernels."""
    for name in (STEM, EMBED):
        if name in found and found[name].ndim == 4 and len(wanted.get(name, ())) == 4:
            had, has = found[name].shape[2], wanted[name][2]
            if had == 3 and has == 1:
                found[name] = found[name].sum(2, keepdims=True)
                return "the first kernel is summed over 3 input channels for a tower of 1"
    return ""


def _scaled(found: State, wanted: Shapes) -> str:
    """Scale the positions of ViT's patches to another square grid."""
    name = "params/position"
    old, new = found.get(name, np.zeros(())).shape, wanted.get(name, ())
    if old == new or len(old) != 3 or len(new) != 3 or old[2] != new[2]:
        return ""
    had, has = math.isqrt(old[1] - 1), math.isqrt(new[1] - 1)
    if had**2 + 1 != old[1] or has**2 + 1 != new[1]:
        return ""
    table = found[name][0].astype(np.float32)
    grid = bicubic(table[1:].reshape(had, had, -1), has).reshape(has * has, -1)
    found[name] = np.concatenate([table[:1], grid])[None]
    return f"positions are scaled bicubically from {had} x {had} patches to {has} x {has}"


def bicubic(grid: Float[np.ndarray, "Y X E"], size: int) -> Float[np.ndarray, "S S E"]:
    """Scale a grid to `size` x `size` as torch's bicubic does (corners not aligned, no smoothing).

    The kernel is Keys' with a = -0.75 and the edge is repeated, as in DeiT. jax.image and timm's
    smoothing (its default) take -0.5: on noise, some per cent off when a grid grows, and timm much
    more when it shrinks.

    >>> bicubic(np.ones((2, 2, 1), np.float32), 3)[..., 0].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def weights(count: int) -> Float[np.ndarray, "S N"]:
        place = (np.arange(size) + 0.5) * count / size - 0.5
        table = np.zeros((size, count))
        for step in (-1, 0, 1, 2):
            at = np.floor(place) + step
            t = np.abs(place - at)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            at = np.clip(at, 0, count - 1).astype(int)
            np.add.at(table, (np.arange(size), at), np.where(t <= 1, near, far))
        return table

    rows, columns = weights(grid.shape[0]), weights(grid.shape[1])
    return np.einsum("sy,tx,yxe->ste", rows, columns, grid).astype(grid.dtype)


def _cut_layers(found: State, wanted: Shapes, source: str) -> str:
    """Leave out the layers of BERT that are above the tower's last."""
    had, has = (
        1 + max((int(m[1]) for name in names if (m := _LAYER.match(name))), default=-1)
        for names in (found, wanted)
    )
    if had < has:
        raise UserError(
            f"weights {source} have {had} layers and the text tower {has}; "
            f"choose text.depth of at most {had}"
        )
    if had == has:
        return ""
    for name in [n for n in found if (m := _LAYER.match(n)) and int(m[1]) >= has]:
        del found[name]
    return f"layers {has} to {had - 1} of {had} are left out"


def _cut_places(found: State, wanted: Shapes, source: str) -> str:
    """Leave out the positions of BERT that are beyond the tower's last."""
    name = "params/position"
    old, new = found.get(name, np.zeros(())).shape, wanted.get(name, ())
    if len(old) != 2 or len(new) != 2 or old[1] != new[1] or old == new:
        return ""
    if old[0] < new[0]:
        raise UserError(
            f"weights {source} have {old[0]} positions and the text tower {new[0]}; "
            f"choose text.positions of at most {old[0]}"
        )
    found[name] = found[name][: new[0]]
    return f"positions {new[0]} to {old[0] - 1} of {old[0]} are left out"


def _same_words(found: State, wanted: Shapes, source: str) -> str:
    """Refuse a vocabulary of another size: its rows would mean other pieces."""
    name = "params/token/embedding"
    old, new = found.get(name, np.zeros(())).shape[:1], wanted.get(name, ())[:1]
    if old and new and old != new:
        raise UserError(
            f"weights {source} have a vocabulary of {old[0]} pieces and the tokenizer has {new[0]};"
            " set data.tokenizer to the tokenizer of these weights"
        )
    return ""


def _zeroed(found: State, wanted: Shapes, layout: Layout) -> str:
    """Put zeros where the original adds nothing."""
    absent = [n for n in ZERO.get(layout.prefix, ()) if n in wanted and n not in found]
    found.update({name: np.zeros(wanted[name], np.float32) for name in absent})
    return f"zeros stand for {' and '.join(absent)}, which {layout.whose} lacks" if absent else ""


def check(found: State, wanted: Shapes, origin: dict[str, str], left: State, what: str) -> None:
    """Refuse weights of which an array is missing, left over or of another shape; list them all.

    `origin` has the names in the file, `left` the arrays of the file [...] that no name fits.

    Raises:
      UserError: if there is any; it begins with `what`.
    """
    lines = []
    for name in sorted(wanted.keys() - found.keys()):
        alone = name.startswith("params/pool/") or name == "params/position" and STEM in wanted
        hint = ", which only towers trained here have" if alone else ""
        lines.append(f"missing: {name} {wanted[name]}{hint}")
    over = {origin.get(name, name): found[name] for name in found.keys() - wanted.keys()}
    lines += [f"left over: {key} {value.shape}" for key, value in sorted({**left, **over}.items())]
    for name in sorted(found.keys() & wanted.keys()):
        if found[name].shape != wanted[name]:
            was = f"{name} is {found[name].shape} where {wanted[name]} is expected"
            lines.append(f"other shape: {was} ({origin.get(name, name)})")
    if lines:
        raise UserError(
            f"{what}, so nothing was loaded; choose the tower that they were made for, or other "
            "weights:\n  " + "\n  ".join(lines)
        )
