"""The state of a run, and its initialisation at random or from published weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, PyTree

from plan_jax import optim, parallel, weights
from plan_jax.config import BY_WEIGHTS, WITH_TOWERS, Config
from plan_jax.data.tokenizer import tokenize_batch
from plan_jax.encoders.bert import BERTS
from plan_jax.encoders.dual_encoder import PLAIN_KINDS, DualEncoder
from plan_jax.encoders.vit import VITS
from plan_jax.model import Components
from plan_jax.types import Batch, Features, Memory, MethodContext, Params

# Names of findings are short phrases.
TAG_TOKENS, TAG_WORDS = 16, 12


@struct.dataclass
class State:
    """All that changes while training. It is saved whole, so a resumed run is the same run."""

    step: Array
    key: Array  # raw key data, which a checkpoint can hold
    params: Params
    batch_stats: PyTree
    opt_state: PyTree
    memory: Memory
    ema_params: Params  # moving average of `params`; {} if none is kept


def init_state(
    components: Components,
    config: Config,
    batch: Batch,
    findings: Sequence[str] = (),
    *,
    load_weights: bool = True,
) -> tuple[State, optax.GradientTransformation]:
    """Returns the first state of a run, and its optimiser.

    Args:
      components: encoders and method.
      config: the config; `seed`, `optim`, `ema_decay` and `weights` are used.
      batch: an example batch.
      findings: names of the dataset's findings, for methods that prepare features of them.
      load_weights: whether encoders start from `config.weights`. It takes time, and a state that a
        checkpoint is about to replace does not need it.

    Raises:
      UserError: published weights cannot be read or do not fit, `optim.freeze` names no parameter,
        or the method cannot be used with this config.
    """
    key = jax.random.key(config.seed)
    encoder = components.encoder.clone(axis=None)
    # Parameters do not depend on the batch size, and two pairs compile sooner.
    batch = jax.tree.map(lambda x: x[:2], batch)
    variables = jax.jit(encoder.init)(jax.random.fold_in(key, 0), batch)
    if load_weights:
        variables = load_published_weights(encoder, variables, config)

    method, hyper = components.method, components.hyper
    images, _ = jax.eval_shape(encoder.apply, variables, batch)
    encode_names = functools.partial(_encode_names, components, variables)
    encode_tags = getattr(method, "encode_tags", None)
    context = MethodContext(
        dim=encoder.embed_dim,
        width=images.raw.shape[-1],
        tags=encode_tags(encode_names, findings) if encode_tags else None,
        ema_decay=config.ema_decay,
    )
    method_params, memory = method.init(jax.random.fold_in(key, 1), context, hyper)

    params = {"encoders": variables["params"], "method": method_params}
    optimiser = make_optimiser(components, config, params)
    state = State(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(key, 2)),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimiser.init(params),
        memory=memory,
        # A copy: the step donates its input, and two leaves must not share one buffer.
        ema_params=jax.tree.map(jnp.copy, params) if config.ema_decay else {},
    )
    return state, optimiser


def make_optimiser(
    components: Components, config: Config, params: Params
) -> optax.GradientTransformation:
    """Returns the optimiser of a config for some parameters.

    Raises:
      UserError: `optim.freeze` names no parameter.
    """
    settings = {name: value for name, value in vars(config.optim).items() if name != "freeze"}
    # Encoders that are frozen by layers know it themselves, and stop their gradients.
    paths = [x for x in config.optim.freeze if x.partition(":")[0] not in ("vision", "text")]

    def is_frozen(name: str) -> bool:
        section, _, path = name.partition("/")
        return section == "encoders" and components.encoder.is_frozen(path)

    return optim.make_optimiser(
        params, steps=config.steps, freeze=tuple(paths), is_frozen=is_frozen, **settings
    )


def choose_normalisation(config: Config) -> Config:
    """Returns a config with a normalisation in place of `weights`: that of the image tower's.

    Raises:
      UserError: the weights cannot be read, or do not tell.
    """
    if config.normalisation != BY_WEIGHTS:
        return config
    source = config.weights.vision
    normalisation = weights.find_normalisation(source)
    parallel.print_once(f"config.normalisation is {normalisation}, that of the weights {source}")
    return dataclasses.replace(config, normalisation=normalisation)


def load_published_weights(
    encoder: DualEncoder, variables: Mapping[str, Any], config: Config
) -> dict[str, Any]:
    """Returns the variables with the parts that `config.weights` names replaced.

    Raises:
      UserError: a source cannot be read, or its arrays do not fit the encoder.
    """
    variables = dict(variables)
    read = functools.cache(weights.read_arrays)  # one file may hold both towers and four heads

    def replace(part: str, load: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        loaded = load({kind: tree.get(part, {}) for kind, tree in variables.items()})
        for kind, tree in variables.items():
            if part in tree:
                variables[kind] = {**tree, part: jax.tree.map(jnp.asarray, loaded[kind])}

    # The number of attention heads leaves no trace in the shapes of arrays.
    vision_heads = {**VITS.get(encoder.vision["name"], {}), **encoder.vision}.get("heads")
    text_heads = {**BERTS[encoder.text["name"]], **encoder.text}["heads"]
    for side, part, heads in (
        ("vision", "image_tower", vision_heads),
        ("text", "text_tower", text_heads),
    ):
        if source := getattr(config.weights, side):
            load = functools.partial(
                weights.load_tower,
                side,
                source,
                log=parallel.print_once,
                num_heads=heads,
                normalisation=config.normalisation,
                any_normalisation=config.weights.any_normalisation,
                read=read,
            )
            replace(part, load)
    if config.weights.heads:
        for head, kind in encoder.heads.items():
            if kind in PLAIN_KINDS:
                continue
            source = config.weights.heads
            if source == WITH_TOWERS:
                side = "vision" if head.startswith("image") else "text"
                source = getattr(config.weights, side)
            load = functools.partial(
                weights.load_head, head, source, kind=kind, log=parallel.print_once, read=read
            )
            replace(f"{head}_head", load)
    return variables


def _encode_names(
    components: Components, variables: Mapping[str, Any], names: Sequence[str]
) -> Features:
    """Encodes short phrases, such as names of findings, with the text tower."""
    texts = tokenize_batch(components.tokenizer, names, TAG_TOKENS, TAG_WORDS)
    encoder = components.encoder.clone(axis=None)
    encode = jax.jit(lambda variables, text: encoder.apply(variables, text, method="encode_text"))
    return encode(variables, texts)
