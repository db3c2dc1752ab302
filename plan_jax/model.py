"""From a config or a checkpoint folder to towers, a method and a `Model` of verbs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from plan_jax import checkpoint
from plan_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenize_batch
from plan_jax.encoders.bert import BERTS
from plan_jax.encoders.dual_encoder import DualEncoder
from plan_jax.encoders.resnet import RESNETS
from plan_jax.encoders.vit import VITS
from plan_jax.heads.head_on_tower import map_chunks
from plan_jax.methods import METHODS
from plan_jax.types import Features, Model, Stages, Tower, UserError


class Components(NamedTuple):
    """What a config describes, without any parameter: towers, method, its constants, tokeniser."""

    dual: DualEncoder
    method: Any
    hyper: Any
    tokenizer: Tokenizer


def build_components(config: Mapping[str, Any], axis: str | None = None) -> Components:
    """Make towers, method and tokeniser of a config (as plain dicts or a ConfigDict)."""
    method = METHODS[config["method"]]
    hold = {side: num_frozen_layers(side, config) for side in ("vision", "text")}
    tokenizer = load_tokenizer(config["data"]["tokenizer"])
    dual = DualEncoder(
        vision={**config["vision"], "hold": hold["vision"]},
        text={**config["text"], "hold": hold["text"]},
        heads=dict(config["heads"]),
        vocab=tokenizer.vocab_size,
        dim=config["dim"],
        hidden=config["hidden"],
        standard=config["standard"],
        channels=config["channels"],
        fine=config["fine"],
        axis=axis,
        dtype=jnp.dtype(config["dtype"]),
    )
    return Components(dual, method, make_hyper(method, config["hyper"]), tokenizer)


def num_frozen_layers(side: str, config: Mapping[str, Any]) -> int:
    """Say how many first layers (of a ResNet: stages) of a tower `optim.freeze` freezes.

    `text` freezes the whole tower, `text:6` embeddings and six layers.

    Raises:
      UserError: the tower has not so many, or is named by its path.
    """
    table = BERTS if side == "text" else RESNETS | VITS
    sizes = {**table[config[side]["name"]], **config[side]}
    layers = len(sizes["widths"]) if "widths" in sizes else sizes["depth"]
    found = 0
    for entry in config["optim"]["freeze"]:
        name, _, count = str(entry).partition(":")
        if name == side:
            if count and not (count.isdecimal() and 1 <= int(count) <= layers):
                raise UserError(f"optim.freeze is {entry!r}; use {side}:1 to {side}:{layers}")
            found = max(found, int(count or layers))
        elif name.startswith(f"encoders/{'read' if side == 'text' else 'see'}_tower"):
            raise UserError(f"optim.freeze {entry!r} is in a tower; write {side} or {side}:N")
    return found


def make_hyper(method: Any, changes: Mapping[str, Any]) -> Any:
    """Make a method's constants with some of them changed.

    Raises:
      UserError: if the method has no such constant.
    """
    known = [field.name for field in dataclasses.fields(method.Hyper)]
    for name in changes:
        if name not in known:
            where = method.__name__.rpartition(".")[2]
            raise UserError(f"hyper.{name} is not a constant of {where}; it has {', '.join(known)}")
    return method.Hyper(**dict(changes))


def make_model(
    system: Components, config: Mapping[str, Any], variables: Mapping[str, Any]
) -> Model:
    """Bind `params`, `batch_stats` and `memory` of a run, among `variables`, to the verbs."""
    dual, method, hyper, tokenizer = system
    data, batch = config["data"], config["eval"]["batch"]
    held = {name: variables[name] for name in ("params", "batch_stats", "memory")}
    variables = jax.device_put(jax.tree.map(np.asarray, held))
    towers = {"params": variables["params"]["encoders"], "batch_stats": variables["batch_stats"]}
    own, memory = variables["params"]["method"], variables["memory"]
    shape = (1, data["size"], data["size"], 1)
    seen = jax.eval_shape(
        lambda: dual.apply(towers, jnp.zeros(shape, jnp.uint8), method="encode_image")
    )

    def some(verb: str) -> Any:  # no task needs what the towers gave before their heads
        return jax.jit(lambda towers, *a: dual.apply(towers, *a, method=verb).replace(raw=None))

    see_some, read_some = some("encode_image"), some("encode_text")
    compare = jax.jit(method.similarity, static_argnums=4)
    draw = jax.jit(method.heatmap, static_argnums=4)

    def encode_image(images: np.ndarray) -> Features:
        return map_chunks(lambda a: see_some(towers, *a), (images,), batch)

    def encode_text(texts: list[str]) -> Features:
        rows = tokenize_batch(tokenizer, texts, data["length"], data["words"])
        return map_chunks(lambda text: read_some(towers, text), rows, batch)

    def similarity(images: Features, texts: Features) -> dict[str, np.ndarray]:
        def columns(leaves: tuple[np.ndarray, ...]) -> dict[str, jax.Array]:
            some = jax.tree.unflatten(jax.tree.structure(texts), leaves)
            return {k: v.T for k, v in compare(own, memory, images, some, hyper).items()}

        found = map_chunks(columns, tuple(jax.tree.leaves(texts)), batch)
        return {kind: table.T for kind, table in found.items()}

    def heatmap(
        images: Features, texts: Features, rounds: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        chosen = hyper if rounds is None else dataclasses.replace(hyper, rounds=rounds)
        return jax.device_get(draw(own, memory, images, texts, chosen))

    return Model(
        name=config["method"],
        grid=seen.fine_grid or seen.grid,
        size=data["size"],
        rounds=getattr(hyper, "rounds", 0),
        config=config,
        encode_image=encode_image,
        encode_text=encode_text,
        similarity=similarity,
        heatmap=heatmap,
        tower=make_tower(dual, towers),
    )


def make_tower(dual: DualEncoder, towers: Mapping[str, Any]) -> Tower:
    """Bind the vision tower's part of the encoders' variables to a pure function."""
    plain = dual.clone(axis=None, vision={**dual.vision, "hold": 0})
    small = plain.clone(vision={k: v for k, v in plain.vision.items() if k != "resize"})
    variables = {
        kind: {part: held for part, held in tree.items() if part == "image_tower"}
        for kind, tree in towers.items()
    }

    def apply(
        variables: Mapping[str, Any], images: Any, train: bool = False, native: bool = False
    ) -> tuple[Stages, PyTree]:
        module, images = small if native else plain, jnp.asarray(images)
        if not train:
            return module.apply(variables, images, method="stages"), variables["batch_stats"]
        stages, changed = module.apply(
            variables, images, True, method="stages", mutable=["batch_stats"]
        )
        return stages, changed.get("batch_stats", variables["batch_stats"])

    return Tower(checkpoint.fingerprint(variables)[:12], variables, apply)


def random_tower(system: Components, config: Mapping[str, Any], seed: int = 0) -> Tower:
    """Make the same tower with random weights: what downstream tasks compare with."""
    size = config["data"]["size"]
    dual = system.dual.clone(axis=None)
    images = jnp.zeros((2, size, size, 1), jnp.uint8)
    made = jax.jit(lambda key: dual.init(key, images, method="stages"))(jax.random.key(seed))
    return make_tower(dual, {"params": made["params"], "batch_stats": made.get("batch_stats", {})})


def load(folder: str | Path) -> Model:
    """Load the model of a run from its folder, or from one of its checkpoints.

    Raises:
      UserError: if there is no whole checkpoint.
    """
    held = read(folder)
    return make_model(build_components(held["config"]), held["config"], held)


def read(folder: str | Path) -> dict[str, Any]:
    """Read the weights and config of a checkpoint; of a kept moving average, that.

    Raises:
      UserError: if there is no whole checkpoint.
    """
    held = checkpoint.load_weights(folder)
    return held | {"params": held["average"] or held["params"]}
