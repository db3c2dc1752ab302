"""Loads published weights into our encoders: reads, renames and checks every array, or none.

`sources` finds and reads files, `layouts` holds the tables of names, and `convert` turns the arrays
of a file into the arrays of a tower.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from plan_jax.types import UserError
from plan_jax.weights.convert import (
    Shapes,
    adapt_arrays,
    adapt_head,
    check_match,
    flatten_shapes,
    rename_arrays,
    unflatten_arrays,
)
from plan_jax.weights.layouts import (
    HEAD_LAYOUTS,
    NORMALISATION_OF_MEAN_AND_STD,
    NORMALISATION_OF_ORIGIN,
    OWN_SIGNATURES,
    TOWER_KINDS,
    Layout,
    describe_foreign,
    recognise_head,
    recognise_layout,
)
from plan_jax.weights.sources import Arrays, find_source, read_arrays, read_json_object

__all__ = ["find_normalisation", "find_source", "load_head", "load_tower", "read_arrays"]

# What our towers compute and no array shows. Weights for another function would load silently.
TOWER_CONFIGS = {
    "bert": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
    },
    "vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "resnet": {},
}


def load_tower(
    tower: str,
    source: str,
    template: Mapping[str, Any],
    *,
    log: Callable[[str], None],
    num_heads: int | None = None,
    normalisation: str | None = None,
    any_normalisation: bool = False,
    read: Callable[[str], Arrays] = read_arrays,
) -> dict[str, PyTree]:
    """Returns {"params", "batch_stats"} of a tower, filled from `source`, as float32.

    Five things are adapted: the position embedding of a ViT is resized to another grid, as whoever
    trained it does, that of BERT is cut, surplus layers of BERT are dropped, a kernel for three
    equal input channels is summed for one, and MGCA's text tower, which tells no positions apart,
    gets one position.

    Args:
      tower: `vision` or `text`.
      source: see `plan_jax.weights.sources`.
      template: the tower's {"params", "batch_stats"}, of arrays or of their shapes.
      log: called with one sentence about each adaptation.
      num_heads: the tower's attention heads. They are compared with config.json, because no array
        shows how many heads there were.
      normalisation: that of the images, for an image tower. It is compared with the one of the
        layout's origin or preprocessor_config.json, which no array shows either.
      any_normalisation: whether another one is accepted, and logged, because training goes on.
      read: returns the arrays of a source, from a cache for example.

    Raises:
      UserError: the weights cannot be read, are of no known layout, were trained on images of
        another normalisation, or any array of the tower is missing, unexpected or of another shape;
        all of these are listed.
    """
    arrays = read(source)
    layout = recognise_layout(arrays, tower)
    if layout is None:
        if tower == "vision":
            _refuse_foreign(source, arrays)
        examples = ", ".join(sorted(arrays)[:3])
        raise UserError(
            f"weights {source} hold no {tower} tower of a known layout (their first arrays are "
            f"{examples}); known are {' and '.join(TOWER_KINDS[tower])}, see"
            " plan_jax/weights/layouts.py"
        )
    shapes = flatten_shapes(template)
    if OWN_SIGNATURES[layout.tower] not in shapes:
        raise UserError(
            f"weights {source} are of kind {layout.tower} and the {tower} tower is not; "
            f"set {tower}.name to a tower of this kind"
        )
    _check_config(tower, source, layout, shapes, num_heads)
    notes = []
    if tower == "vision":
        notes.append(_check_normalisation(source, layout, normalisation, any_normalisation))
    conversion = rename_arrays(arrays, layout)
    notes += adapt_arrays(conversion.arrays, shapes, layout, source)
    check_match(conversion, shapes, f"weights {source} do not fit the {tower} tower")
    for note in filter(None, notes):
        log(f"{tower} tower from {source}: {note}")
    return unflatten_arrays(template, conversion.arrays)


def load_head(
    head: str,
    source: str,
    template: Mapping[str, Any],
    *,
    kind: str,
    log: Callable[[str], None],
    read: Callable[[str], Arrays] = read_arrays,
) -> dict[str, PyTree]:
    """Returns {"params", "batch_stats"} of a projection head, filled from `source`, as float32.

    `convert.adapt_head` describes what is adapted.

    Args:
      head: image_global, image_local, text_global or text_local.
      source: see `plan_jax.weights.sources`.
      template: the head's {"params", "batch_stats"}, of arrays or of their shapes.
      kind: the kind of the head, see `ProjectionHead`.
      log: called with one sentence about each adaptation.
      read: returns the arrays of a source, from a cache for example.

    Raises:
      UserError: the weights have no such head or one of another kind, or an array is missing,
        unexpected or of another shape.
    """
    file_arrays = read(source)
    layout = recognise_head(file_arrays, head)
    if layout is None:
        origins = ", ".join(known.origin for known in HEAD_LAYOUTS[head])
        raise UserError(
            f"weights {source} hold no head {head} of {origins}; choose other weights, or leave"
            " weights.heads empty and train the head"
        )
    if layout.kind != kind:
        raise UserError(
            f"weights {source} are {layout.origin}'s, whose head {head} is of kind {layout.kind},"
            f" and config.heads.{head} is {kind}; set it to {layout.kind}"
        )
    own = {key: array for key, array in file_arrays.items() if key.startswith(layout.prefix)}
    conversion, shapes = rename_arrays(own, layout), flatten_shapes(template)
    if note := adapt_head(conversion.arrays, shapes, layout, file_arrays):
        log(f"head {head} from {source}: {note}")
    check_match(conversion, shapes, f"weights {source} do not fit the head {head}")
    return unflatten_arrays(template, conversion.arrays)


def find_normalisation(source: str, read: Callable[[str], Arrays] = read_arrays) -> str:
    """Returns the normalisation of the images that an image tower in `source` was trained on.

    Raises:
      UserError: the weights cannot be read, or it is not known whose they are.
    """
    arrays = read(source)
    layout = recognise_layout(arrays, "vision")
    if layout is None:
        _refuse_foreign(source, arrays)
    normalisation = _trained_normalisation(source, layout) if layout else None
    if normalisation is None:
        raise UserError(
            f"config.normalisation is weights, and {source} are of no origin whose images are known"
            f" ({', '.join(NORMALISATION_OF_ORIGIN)}), and no preprocessor_config.json tells;"
            " set it to what they were trained on"
        )
    return normalisation


def _refuse_foreign(source: str, arrays: Arrays) -> None:
    """Raises UserError if the weights hold an image tower that ours cannot compute."""
    if foreign := describe_foreign(arrays):
        raise UserError(
            f"weights {source} hold {foreign}; no image tower of plan_jax computes that, so choose"
            " other weights"
        )


def _trained_normalisation(source: str, layout: Layout) -> str | None:
    """Returns the normalisation of the images that weights were trained on; None if it is unknown.

    It follows from whose weights they are, or stands in the preprocessor_config.json beside them.
    """
    if known := NORMALISATION_OF_ORIGIN.get(layout.origin):
        return known
    path = find_source(source) / "preprocessor_config.json"
    if not path.is_file():
        return None
    processor = read_json_object(path)
    if processor.get("do_normalize") is False:
        return "unit"
    mean_and_std = (processor.get("image_mean"), processor.get("image_std"))
    return next(
        (
            name
            for values, name in NORMALISATION_OF_MEAN_AND_STD.items()
            if mean_and_std == tuple(map(list, values))
        ),
        None,
    )


def _check_normalisation(
    source: str, layout: Layout, normalisation: str | None, any_normalisation: bool
) -> str:
    """Returns a sentence about the normalisation of the weights, if it may not be that of images.

    Raises:
      UserError: it is another than theirs, and that is not accepted.
    """
    trained = _trained_normalisation(source, layout)
    if trained is None and layout.origin == "DINOv2":
        return (
            "DINOv2 was trained on images of normalisation imagenet and RAD-DINO on rad_dino, and"
            f" the weights do not tell which they are; config.normalisation is {normalisation}"
        )
    if trained is None or trained == normalisation:
        return ""
    if normalisation is None:
        return f"{layout.origin} trained it on images of config.normalisation {trained}"
    if any_normalisation:
        return (
            f"{layout.origin} trained it on images of normalisation {trained}, and"
            f" config.normalisation is {normalisation}"
        )
    raise UserError(
        f"weights {source} are {layout.origin}'s, trained on images of normalisation {trained}, and"
        f" config.normalisation is {normalisation}; set it to {trained}, or accept another for"
        " fine-tuning with config.weights.any_normalisation=true"
    )


def _check_config(
    tower: str, source: str, layout: Layout, shapes: Shapes, num_heads: int | None
) -> None:
    """Raises UserError if a config.json of the weights contradicts a tower in what it computes."""
    path = find_source(source)
    if not path.is_dir():
        return  # a single file has no config
    config = read_json_object(path / "config.json")
    expected: dict[str, Any] = dict(TOWER_CONFIGS[layout.tower])
    if num_heads is not None:
        expected["num_attention_heads"] = num_heads
    if layout.tower == "vit":
        width, hidden = shapes["params/layer0/fc1/kernel"]
        patch = shapes["params/embed/kernel"][0]
        expected |= {"patch_size": patch, "use_swiglu_ffn": hidden != 4 * width}
    differences = [
        f"{field} {config[field]} where the {tower} tower has {value}"
        for field, value in expected.items()
        if field in config and config[field] not in (value, [value, value])
    ]
    if differences:
        raise UserError(
            f"weights {source} have {' and '.join(differences)}; choose another {tower} tower or"
            " other weights"
        )
