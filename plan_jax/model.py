"""From a config or a checkpoint to a `Model`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jaxtyping import PyTree

from plan_jax import checkpoint, parallel, prediction
from plan_jax.checkpoint.checksums import find_nonfinite
from plan_jax.checkpoint.fetch import fetch_source
from plan_jax.config import Config
from plan_jax.data.tokenizer import Tokenizer, check_known, load_tokenizer, tokenize_batch
from plan_jax.encoders.bert import BERTS
from plan_jax.encoders.dual_encoder import DualEncoder
from plan_jax.encoders.resnet import RESNETS
from plan_jax.encoders.vit import VITS
from plan_jax.export.folder import read_folder, read_settings, remove_places
from plan_jax.export.pretrained import Pretrained
from plan_jax.export.sources import find_model
from plan_jax.heads.examples import Images, map_chunks
from plan_jax.methods import METHODS
from plan_jax.types import Features, Method, Model, Stages, Tower, UserError

# Of what was loaded, what a saved model says about itself.
SOURCE_FIELDS = ("step", "source", "about", "metrics")


class Components(NamedTuple):
    """The parts that a config describes, without any parameters."""

    encoder: DualEncoder
    method: Method
    hyper: Any
    tokenizer: Tokenizer


def build_components(config: Config, axis: str | None = None) -> Components:
    """Builds the encoders, the method and the tokenizer of a config.

    Args:
      config: the config.
      axis: name of the device axis over which BatchNorm averages; None for one device.

    Raises:
      UserError: the tokenizer cannot be loaded, or `optim.freeze` does not fit the encoders.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    vision, text = (
        {**getattr(config, side), "frozen_layers": num_frozen_layers(side, config)}
        for side in ("vision", "text")
    )
    encoder = DualEncoder(
        vision=vision,
        text=text,
        heads=dataclasses.asdict(config.heads),
        vocab_size=tokenizer.vocab_size,
        embed_dim=config.embed_dim,
        head_hidden_dim=config.head_hidden_dim,
        normalisation=config.normalisation,
        channels=config.channels,
        fine_map=config.fine_map,
        axis=axis,
        dtype=jnp.dtype(config.dtype),
    )
    return Components(encoder, METHODS[config.method], config.hyper, tokenizer)


def num_frozen_layers(side: str, config: Config) -> int:
    """Returns how many first layers (stages of a ResNet) of an encoder `optim.freeze` freezes.

    `text` freezes the whole encoder, `text:6` the embeddings and six layers.

    Raises:
      UserError: the encoder has fewer layers, or is named by the path of its parameters.
    """
    table: Mapping[str, Any] = BERTS if side == "text" else RESNETS | VITS
    options = getattr(config, side)
    sizes = {**table[options["name"]], **options}
    layers = len(sizes["widths"]) if "widths" in sizes else sizes["depth"]
    frozen = 0
    for entry in config.optim.freeze:
        name, _, count = str(entry).partition(":")
        if name == side:
            if count and not (count.isdecimal() and 1 <= int(count) <= layers):
                raise UserError(f"optim.freeze is {entry!r}; use {side}:1 to {side}:{layers}")
            frozen = max(frozen, int(count or layers))
        elif name.startswith(f"encoders/{'text' if side == 'text' else 'image'}_tower"):
            # By its path a tower would lose its updates only, and still pay for its gradient.
            raise UserError(f"optim.freeze {entry!r} is in a tower; use {side} or {side}:N")
    return frozen


def make_model(components: Components, config: Config, variables: Mapping[str, Any]) -> Model:
    """Returns the `Model` of components with parameters.

    Args:
      components: what `build_components` returns.
      config: the config of the run.
      variables: a dict that contains `params`, `batch_stats` and `memory`; `step`, the folder
        `source` that they were read from, and `about` and `metrics` of a saved model are for the
        card of a saved model.

    Raises:
      UserError: the tokenizer has another number of pieces than the embedding of the parameters.
    """
    encoder, method, hyper, tokenizer = components
    num_rows = len(variables["params"]["encoders"]["text_tower"]["token"]["embedding"])
    if num_rows != tokenizer.vocab_size:
        raise UserError(
            f"tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} pieces, and the run "
            f"was trained with {num_rows}; put the file back that it was trained with"
        )
    names = ("params", "batch_stats", "memory")
    # Copied to the device once, or every call would transfer all parameters again.
    state = jax.device_put(jax.tree.map(np.asarray, {name: variables[name] for name in names}))
    encoders = {"params": state["params"]["encoders"], "batch_stats": state["batch_stats"]}
    params, memory = state["params"]["method"], state["memory"]

    # No task reads the features before projection, which are the largest.
    def encode(method: str, variables: PyTree, inputs: PyTree) -> Features:
        features: Any = encoder.apply(variables, inputs, method=method)
        return features.replace(raw=None)

    apply_image = parallel.ExampleFunction(functools.partial(encode, "encode_image"))
    apply_text = parallel.ExampleFunction(functools.partial(encode, "encode_text"))
    apply_similarity = _similarity_function(method.similarity, hyper)
    apply_pairs = _pair_function(method.similarity, hyper)
    encoder_copies, method_copies = parallel.Replicas(encoders), parallel.Replicas((params, memory))
    batch = config.eval.batch

    # One image or text alone is not padded to a batch, which would cost as much as the batch.
    def chunk_size(count: int) -> int:
        return batch if count > 1 else 1

    def encode_image(images: Images) -> Features:
        size = chunk_size(len(images))
        return map_chunks(apply_image.bind(encoder_copies.get()), images, size)

    def encode_text(texts: list[str]) -> Features:
        if not config.compares_texts():
            raise UserError(
                f"the model has the published image tower {config.weights.vision} and no texts, so"
                " a phrase means nothing to it; evaluate tasks of images only"
            )
        name = f"{len(texts)} texts" if len(texts) > 1 else "the text"
        check_known(tokenizer, texts, name, "write them in the language of the model's tokenizer")
        tokens = tokenize_batch(tokenizer, texts, config.data.max_tokens, config.data.max_words)
        size = chunk_size(len(texts))
        return map_chunks(apply_text.bind(encoder_copies.get()), tokens, size)

    def similarity(images: Features, texts: Features) -> dict[str, np.ndarray]:
        # A chunk of texts at a time, since a table of all words and all pixels would not fit.
        compare = apply_similarity.bind((*method_copies.get(), images))
        tables = map_chunks(compare, texts, batch)
        return {kind: table.T for kind, table in tables.items()}

    def pair_similarity(images: Features, texts: Features) -> dict[str, np.ndarray]:
        return apply_pairs(method_copies.get(), (images, texts))

    def heatmap(
        images: Features, texts: Features, rounds: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        constants = hyper
        if rounds is not None:
            if not hasattr(hyper, "rounds"):
                raise UserError(f"rounds is {rounds}, and {config.method} has none; leave it out")
            constants = dataclasses.replace(hyper, rounds=rounds)
        apply_heatmap = _heatmap_function(method.heatmap, constants)
        return apply_heatmap(method_copies.get(), (images, texts))

    known = {name: variables[name] for name in SOURCE_FIELDS if name in variables}
    pretrained = Pretrained(config, tokenizer, lambda: state, **known)
    size = config.data.size
    blank = jax.ShapeDtypeStruct((1, size, size, 1), jnp.uint8)
    features = jax.eval_shape(functools.partial(encode, "encode_image"), encoders, blank)
    model = Model(
        name=config.method,
        # Only rounds read the finer map.
        grid=(hasattr(hyper, "rounds") and features.fine_grid) or features.grid,
        rounds=getattr(hyper, "rounds", 0),
        size=size,
        encode_image=encode_image,
        encode_text=encode_text,
        similarity=similarity,
        heatmap=heatmap,
        config=config,
        tower=make_tower(encoder, encoders),
        save_pretrained=pretrained.save,
        push_to_hub=pretrained.push,
        tokenizer=tokenizer,
        pair_similarity=pair_similarity,
        identify=lambda: checkpoint.fingerprint(state["params"]),
    )
    return dataclasses.replace(model, ground=functools.partial(prediction.ground, model))


# One function for all models of a method, so that each validation of a run does not compile again.


@functools.cache
def _similarity_function(similarity: Callable, hyper: Any) -> parallel.ExampleFunction:
    """Returns a function that compares texts with all images, which are constants."""

    def compare_with_images(
        constants: tuple[PyTree, PyTree, Features], texts: Features
    ) -> dict[str, jax.Array]:
        tables = similarity(*constants, texts, hyper)
        return {kind: table.T for kind, table in tables.items()}

    return parallel.ExampleFunction(compare_with_images)


@functools.cache
def _pair_function(similarity: Callable, hyper: Any) -> parallel.ExampleFunction:
    """Returns a function that compares image b with text b."""

    def compare_pairs(
        constants: tuple[PyTree, PyTree], pairs: tuple[Features, Features]
    ) -> dict[str, jax.Array]:
        def compare(pair: PyTree) -> dict[str, jax.Array]:
            image, text = jax.tree.map(lambda leaf: leaf[None], pair)
            tables = similarity(*constants, image, text, hyper)
            return {kind: table[0, 0] for kind, table in tables.items()}

        return jax.vmap(compare)(pairs)

    return parallel.ExampleFunction(compare_pairs)


@functools.cache
def _heatmap_function(heatmap: Callable, hyper: Any) -> parallel.ExampleFunction:
    """Returns a function from image b and text b to heat map b."""

    def locate(
        constants: tuple[PyTree, PyTree], pairs: tuple[Features, Features]
    ) -> tuple[jax.Array, jax.Array]:
        return heatmap(*constants, *pairs, hyper)

    return parallel.ExampleFunction(locate)


def make_tower(encoder: DualEncoder, variables: Mapping[str, Any]) -> Tower:
    """Returns the image tower of encoders, with its part of their variables."""
    # Downstream heads may fine-tune all of it, whatever pre-training froze.
    full = encoder.clone(axis=None, vision={**encoder.vision, "frozen_layers": 0})
    native_vision = {name: x for name, x in full.vision.items() if name != "resize"}
    native_encoder = full.clone(vision=native_vision)
    tower_variables = {
        kind: {name: tree for name, tree in part.items() if name == "image_tower"}
        for kind, part in variables.items()
    }

    def apply(
        variables: Mapping[str, Any], images: Any, train: bool = False, native: bool = False
    ) -> tuple[Stages, PyTree]:
        module, images = native_encoder if native else full, jnp.asarray(images)
        if not train:
            stages: Any = module.apply(variables, images, method="extract_stages")
            return stages, variables["batch_stats"]
        stages, updated = module.apply(
            variables, images, True, method="extract_stages", mutable=["batch_stats"]
        )
        return stages, updated.get("batch_stats", variables["batch_stats"])

    return Tower(checkpoint.fingerprint(tower_variables)[:12], tower_variables, apply)


def random_tower(components: Components, size: int, seed: int) -> Tower:
    """Returns the image tower of components with random weights, a baseline of fitted heads.

    Args:
      components: the encoders.
      size: side of the images that the tower will see, in pixels.
      seed: seed of the weights.
    """
    encoder = components.encoder.clone(axis=None)
    images = jnp.zeros((2, size, size, 1), jnp.uint8)
    initialise = jax.jit(lambda key: encoder.init(key, images, method="extract_stages"))
    variables = initialise(jax.random.key(seed))
    return make_tower(encoder, {"batch_stats": {}, **variables})


def load(source: str | Path) -> Model:
    """Loads a trained model.

    Args:
      source: the folder of a run or one of its checkpoints; a folder that `save_pretrained` wrote;
        the address of one of them, as gs://bucket/run; the name of a model that comes with
        plan_jax, `phantom-plan`; or a model on the Hugging Face Hub, `owner/name` or
        `owner/name@revision`.

    Raises:
      UserError: there is no complete model, or its weights are not finite.
    """
    variables = load_variables(source)
    config = variables["config"]
    components = build_components(config)
    try:
        return make_model(components, config, variables)
    except (KeyError, FlaxError) as error:
        reason = str(error).partition(" (https")[0]
        raise UserError(
            f"checkpoint {source} has other weights than its config describes ({reason}); save or"
            " download it again"
        ) from None


def load_variables(source: str | Path) -> dict[str, Any]:
    """Loads the weights, the config and the step of a trained model; see `load`.

    `params` are the moving average of the parameters if the run kept one. `source` is the folder of
    the run, or of the saved model.

    Raises:
      UserError: there is no complete model, or its weights are not finite.
    """
    source = fetch_source(source)
    folder = find_model(source)
    if folder is None:
        variables = checkpoint.load_weights(source)
        variables["source"] = checkpoint.locate(source)[0].parent
    else:
        variables = read_folder(folder) | {"ema_params": {}, "source": folder}
    names = ("params", "ema_params", "batch_stats", "memory")
    if array := find_nonfinite({name: variables[name] for name in names}):
        raise UserError(
            f"checkpoint {source} has values in {array} that are not finite; use an older step, or"
            " train again"
        )
    return variables | {
        "params": variables["ema_params"] or variables["params"],
        "config": _build_config(variables["config"], folder),
    }


def load_config(source: str | Path) -> Config:
    """Loads the config of a trained model, see `load`, and not its weights.

    Raises:
      UserError: there is no complete model.
    """
    source = fetch_source(source)
    folder = find_model(source)
    if folder is None:
        return Config.from_dict(checkpoint.read_config(source))
    return _build_config(read_settings(folder)["config"], folder)


def _build_config(values: Mapping[str, Any], folder: Path | None) -> Config:
    """Returns the config of a run, or of the model in `folder`, which has its own tokenizer."""
    if folder is None:
        return Config.from_dict(values)
    try:
        # Nobody but the user decides where an evaluation reads and writes on this machine.
        config = Config.from_dict(remove_places(Config.from_dict(values)))
    except UserError as error:
        raise UserError(f"model {folder} has a config that cannot be used ({error})") from None
    data = dataclasses.replace(config.data, tokenizer=str(folder))
    return dataclasses.replace(config, data=data)
