"""Turns the arrays of a file into those of a tower or head: renamed, adapted, and checked.

A tower is described by the shapes of its arrays, flat under our names, such as
`params/layer1_0/conv1/kernel`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import Float, PyTree

from plan_jax.layers.resize import bicubic_matrix
from plan_jax.types import UserError
from plan_jax.weights.layouts import (
    POSITIONLESS_PREFIX,
    TOWERS,
    Layout,
    is_ignored,
    translate_name,
)
from plan_jax.weights.sources import Arrays

Shapes = dict[str, tuple[int, ...]]

# Rank of a kernel -> its axes in our order: [out in H W] -> [H W in out], [out in L] -> [L in out]
# and [out in] -> [in out].
KERNEL_AXES = {4: (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0)}
STEM, EMBED, POSITION = "params/stem/kernel", "params/embed/kernel", "params/position"
# Of BioViL-T: a linear layer between ResNet and head, and what replaces a previous image.
BIOVIL_T_ARRAYS = ("encoder.backbone_to_vit.weight", "encoder.missing_previous_emb")
TOKEN, REGISTERS, FACTOR = "params/token", "params/registers", "params/layer0/scale1"
# What to set where a file has other tokens than the tower.
TOKEN_OPTIONS = {TOKEN: "vision.class_token", REGISTERS: "vision.registers"}
LAYER_PATTERN = re.compile(r"params/layer(\d+)/")


class Conversion(NamedTuple):
    """The arrays of a file under our names and in our axes.

    `file_names` maps our names to those in the file. `unknown` are the arrays [...] of the file
    that neither belong to the tower nor are ignored.
    """

    arrays: Arrays
    file_names: dict[str, str]
    unknown: Arrays


# Trees -------------------------------------------------------------------------------------------


def flatten_shapes(template: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of a tower's arrays under flat names.

    >>> flatten_shapes({"params": {"norm": {"bias": np.zeros(3)}}, "batch_stats": {}})
    {'params/norm/bias': (3,)}
    """
    leaves = traverse_util.flatten_dict(dict(template), sep="/")
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def unflatten_arrays(
    template: Mapping[str, Any], arrays: Arrays, prefix: str = ""
) -> dict[str, PyTree]:
    """Returns flat arrays [...] as nested dicts with the structure of `template`, in float32.

    Empty dicts of the template stay, which `traverse_util.unflatten_dict` would lose.
    """
    return {
        name: unflatten_arrays(child, arrays, f"{prefix}{name}/")
        if isinstance(child, Mapping)
        else np.ascontiguousarray(arrays[prefix + name], np.float32)
        for name, child in template.items()
    }


# Names and axes ----------------------------------------------------------------------------------


def rename_arrays(arrays: Arrays, layout: Layout) -> Conversion:
    """Returns the arrays [...] of a file under our names and with our order of axes."""
    if layout.origin == "plan_jax":
        return Conversion(dict(arrays), {name: name for name in arrays}, {})
    conversion = Conversion({}, {}, {})
    for key, array in arrays.items():
        name = None
        if key.startswith(layout.prefix):
            name = translate_name(key.removeprefix(layout.prefix), layout.kind)
        # A second array of the same name (`gamma` next to `weight`) is as unknown as a foreign one.
        if name is None or name in conversion.arrays:
            if not is_ignored(key, layout):
                conversion.unknown[key] = array
            continue
        if name.endswith("/kernel") and array.ndim in KERNEL_AXES:
            array = array.transpose(KERNEL_AXES[array.ndim])
            # Local heads are convolutions of size 1 over tokens or pixels; ours are dense.
            is_head = layout.kind not in TOWERS
            while is_head and array.ndim > 2 and array.shape[0] == 1:
                array = array[0]
        for part_name, part in _split_qkv(name, array).items():
            conversion.arrays[part_name] = part
            conversion.file_names[part_name] = key
    return conversion


def _split_qkv(name: str, array: Float[np.ndarray, "..."]) -> Arrays:
    """Splits timm's one projection to queries, keys and values into our three; others stay."""
    if "/qkv/" not in name or array.shape[-1] % 3:
        return {name: array}
    parts = zip(("query", "key", "value"), np.split(array, 3, -1), strict=True)
    return {name.replace("/qkv/", f"/{part}/"): piece for part, piece in parts}


# Adaptations -------------------------------------------------------------------------------------


def adapt_arrays(arrays: Arrays, shapes: Shapes, layout: Layout, source: str) -> list[str]:
    """Sums, resizes, cuts and fills `arrays` in place; returns a sentence for each change.

    Raises:
      UserError: a BERT has too few layers or positions, or another vocabulary, or it is a RoBERTa.
    """
    adaptations: list[Callable[[], str]] = [lambda: _sum_channels(arrays, shapes)]
    if layout.tower == "vit":
        adaptations.append(lambda: _resize_positions(arrays, shapes, layout))
    if layout.tower == "bert":
        adaptations += [
            lambda: _check_segments(arrays, shapes, source),
            lambda: _drop_pooler(arrays, shapes),
            lambda: _drop_layers(arrays, shapes, source),
            lambda: _drop_positions(arrays, shapes, source),
            lambda: _check_vocabulary(arrays, shapes, source),
            lambda: _fill_embeddings(arrays, shapes, layout),
        ]
    return [note for adaptation in adaptations if (note := adaptation())]


def _sum_channels(arrays: Arrays, shapes: Shapes) -> str:
    """Sums a kernel over three input channels, for a tower of one channel.

    Radiographs are grey. A model for colour images sees three equal channels x, and
    w1 x + w2 x + w3 x = (w1 + w2 + w3) x.
    """
    for name in (STEM, EMBED):
        if name in arrays and arrays[name].ndim == 4 and len(shapes.get(name, ())) == 4:
            file_channels, tower_channels = arrays[name].shape[2], shapes[name][2]
            if file_channels == 3 and tower_channels == 1:
                arrays[name] = arrays[name].sum(2, keepdims=True)
                return "the first kernel is summed over 3 input channels for a tower of 1"
    return ""


def _resize_positions(arrays: Arrays, shapes: Shapes, layout: Layout) -> str:
    """Resizes the positions of a ViT's patches [1, N, E] to another square grid.

    The first position is that of the class token, which has no place in the grid. timm adds it to
    the token in towers with registers, so there ours is zero.
    """
    old = arrays[POSITION].shape if POSITION in arrays else ()
    new = shapes.get(POSITION, ())
    if len(old) != 3 or len(new) != 3 or old[2] != new[2]:
        return ""
    table = arrays[POSITION][0].astype(np.float32)
    num_class = int(TOKEN in shapes)
    if num_class and _side_of_square(old[1]):
        table = np.concatenate([np.zeros_like(table[:1]), table])
        arrays[POSITION] = table[None]
    old_side, new_side = (_side_of_square(n - num_class) for n in (len(table), new[1]))
    if not old_side or not new_side or old_side == new_side:
        return ""
    grid = table[num_class:].reshape(old_side, old_side, -1)
    options = _interpolation_options(arrays, layout)
    patches = resize_bicubic(grid, new_side, **options).reshape(new_side**2, -1)
    arrays[POSITION] = np.concatenate([table[:num_class], patches])[None]
    kind = "bicubically, with antialiasing," if options.get("antialias") else "bicubically"
    return (
        f"positions are resized {kind} from {old_side} x {old_side} patches to"
        f" {new_side} x {new_side}"
    )


def _side_of_square(count: int) -> int:
    """Returns the side of a square grid of `count` patches; 0 if there is none."""
    side = math.isqrt(count)
    return side if side**2 == count else 0


def _interpolation_options(arrays: Arrays, layout: Layout) -> dict[str, Any]:
    """Returns how the origin of a ViT interpolates its positions: options of `bicubic_matrix`.

    Where there are registers, all of them use antialiasing. Where there are none, transformers and
    DeiT (which has no LayerScale) do not, DINOv2's own code adds 0.1 to the new size instead, and
    timm always does.
    """
    if REGISTERS in arrays:
        return {"antialias": True}
    if FACTOR not in arrays or layout.origin == "plan_jax":
        return {}
    if layout.origin == "DINOv2":
        return {"offset": 0.1} if layout.kind == "vit" else {}
    return {"antialias": True}


def resize_bicubic(
    grid: Float[np.ndarray, "Y X E"], size: int, antialias: bool = False, offset: float = 0.0
) -> Float[np.ndarray, "S S E"]:
    """Resizes a grid to `size` x `size` like torch's bicubic, see `bicubic_matrix`.

    >>> resize_bicubic(np.ones((2, 2, 1), np.float32), 3)[..., 0].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    rows, columns = (
        bicubic_matrix(count, size, antialias=antialias, offset=offset) for count in grid.shape[:2]
    )
    return np.einsum("sy,tx,yxe->ste", rows, columns, grid).astype(grid.dtype)


def _check_segments(arrays: Arrays, shapes: Shapes, source: str) -> str:
    """Raises UserError for a RoBERTa, which has BERT's names but one type of segment."""
    name = "params/type"
    if name in arrays and name in shapes and len(arrays[name]) == 1 < shapes[name][0]:
        raise UserError(
            f"weights {source} hold a RoBERTa, which counts positions from 2 and reads byte pieces;"
            " leave weights.text empty and evaluate tasks of images only"
        )
    return ""


def _drop_pooler(arrays: Arrays, shapes: Shapes) -> str:
    """Drops BERT's pooler, unless the tower pools by it."""
    for name in ("params/pooler/kernel", "params/pooler/bias"):
        if name not in shapes:
            arrays.pop(name, None)
    return ""


def _drop_layers(arrays: Arrays, shapes: Shapes, source: str) -> str:
    """Drops the layers of BERT above the tower's last."""
    file_depth, tower_depth = _count_layers(arrays), _count_layers(shapes)
    if file_depth < tower_depth:
        raise UserError(
            f"weights {source} have {file_depth} layers and the text tower {tower_depth}; "
            f"set text.depth to {file_depth} or less"
        )
    if file_depth == tower_depth:
        return ""
    for name in list(arrays):
        match = LAYER_PATTERN.match(name)
        if match and int(match[1]) >= tower_depth:
            del arrays[name]
    return f"layers {tower_depth} to {file_depth - 1} of {file_depth} are dropped"


def _count_layers(names: Mapping[str, Any]) -> int:
    indices = [int(match[1]) for name in names if (match := LAYER_PATTERN.match(name))]
    return 1 + max(indices, default=-1)


def _drop_positions(arrays: Arrays, shapes: Shapes, source: str) -> str:
    """Drops the positions of BERT [L E] beyond the tower's last."""
    old = arrays[POSITION].shape if POSITION in arrays else ()
    new = shapes.get(POSITION, ())
    if len(old) != 2 or len(new) != 2 or old[1] != new[1] or old == new:
        return ""
    if old[0] < new[0]:
        raise UserError(
            f"weights {source} have {old[0]} positions and the text tower {new[0]}; "
            f"set text.positions to {old[0]} or less"
        )
    arrays[POSITION] = arrays[POSITION][: new[0]]
    return f"positions {new[0]} to {old[0] - 1} of {old[0]} are dropped"


def _check_vocabulary(arrays: Arrays, shapes: Shapes, source: str) -> str:
    """Raises UserError for a vocabulary of another size, whose rows would mean other pieces."""
    name = "params/token/embedding"
    old = arrays[name].shape[:1] if name in arrays else ()
    new = shapes.get(name, ())[:1]
    if old and new and old != new:
        raise UserError(
            f"weights {source} have a vocabulary of {old[0]} pieces and the tokenizer has {new[0]};"
            " set data.tokenizer to the tokenizer of these weights"
        )
    return ""


def _fill_embeddings(arrays: Arrays, shapes: Shapes, layout: Layout) -> str:
    """Makes the embeddings of MGCA's text tower add what they add there.

    That is no type, and the first position to every token. A file that has a type embedding is of
    another BERT, and stays as it is.
    """
    type_name = "params/type"
    if layout.prefix != POSITIONLESS_PREFIX or type_name in arrays or type_name not in shapes:
        return ""
    arrays[type_name] = np.zeros(shapes[type_name], np.float32)
    if POSITION in arrays:
        arrays[POSITION] = np.repeat(arrays[POSITION][:1], len(arrays[POSITION]), 0)
    return (
        f"{type_name} is zero and every row of {POSITION} is its first, because {layout.origin} "
        "has no type embedding and gives every token the first position"
    )


# Heads ------------------------------------------------------------------------------------------


def adapt_head(arrays: Arrays, shapes: Shapes, layout: Layout, file_arrays: Arrays) -> str:
    """Adapts the arrays of a head in place, with no change of what it computes; returns a sentence.

    1. A bias b before a BatchNorm moves into its mean m: (x + b) - m = x - (m - b).
    2. A head without bias gets one of zeros.
    3. BioViL-T's head does not see the map x of the ResNet, but W x beside a vector e in place of
       what changed since a previous image. With V and U the parts of the head's first matrix for
       both, V W x + U e is a linear layer on x, and U e moves into the mean of BatchNorm.
    """
    mean, bias = "batch_stats/norm1/mean", arrays.get("params/fc1/bias", np.zeros(0))
    if mean in arrays and "params/fc1/bias" not in shapes and bias.shape == arrays[mean].shape:
        arrays[mean] = arrays[mean] - arrays.pop("params/fc1/bias")
    note = ""
    if layout.kind == "linear" and "params/fc2/bias" not in arrays and "params/fc2/bias" in shapes:
        arrays["params/fc2/bias"] = np.zeros(shapes["params/fc2/bias"], np.float32)
        note = f"{layout.origin} has no bias there, so ours is zero"
    embed, missing = map(file_arrays.get, BIOVIL_T_ARRAYS)
    kernel = arrays.get("params/fc1/kernel")
    if embed is None or missing is None or kernel is None or layout.origin != "BioViL":
        return note
    # Of a convolution of size 1 [E C 1 1] and a map of one pixel [1 E 1 1].
    embed, missing = embed.reshape(len(embed), -1).astype(np.float64), missing.reshape(-1)
    if len(kernel) != len(embed) + len(missing) or mean not in arrays:
        return note
    static, change = kernel[: len(embed)], kernel[len(embed) :].astype(np.float64)
    arrays["params/fc1/kernel"] = (embed.T @ static).astype(np.float32)
    arrays[mean] = (arrays[mean] - missing @ change).astype(np.float32)
    return "each image is encoded without a previous one, as BioViL-T encodes a single image"


# Checking ----------------------------------------------------------------------------------------


def check_match(conversion: Conversion, shapes: Shapes, problem: str) -> None:
    """Checks that the arrays are exactly those of a tower.

    Raises:
      UserError: any array is missing, unexpected or of another shape; the message begins with
        `problem` and lists them all.
    """
    arrays, file_names, unknown = conversion
    lines = []
    for name in sorted(shapes.keys() - arrays.keys()):
        is_ours = name.startswith("params/pool/") or (name == POSITION and STEM in shapes)
        hint = ", which only towers trained with plan_jax have" if is_ours else ""
        if name in TOKEN_OPTIONS and EMBED in shapes:
            hint = f", which the file has no such tokens for; set {TOKEN_OPTIONS[name]}"
        lines.append(f"missing: {name} {shapes[name]}{hint}")
    unexpected = {file_names.get(n, n): arrays[n] for n in arrays.keys() - shapes.keys()}
    for key, array in sorted({**unknown, **unexpected}.items()):
        lines.append(f"unexpected: {key} {array.shape}")
    for name in sorted(arrays.keys() & shapes.keys()):
        if arrays[name].shape != shapes[name]:
            lines.append(
                f"other shape: {name} is {arrays[name].shape} where {shapes[name]} is expected"
                f" ({file_names.get(name, name)})"
            )
    if lines:
        raise UserError(
            f"{problem}, so nothing was loaded; choose the tower that they belong to, or other "
            "weights:\n  " + "\n  ".join(lines)
        )
