"""The state of a run and the one pure step that changes it.

One step, in this order: encode the batch on each device; the method's loss (devices meet once, to
share embeddings); gradients; mean over devices (they meet again); optimiser; moving average;
memory.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, PyTree

from plan_jax import model as assembly
from plan_jax import optim, parallel
from plan_jax import weights as load_weights
from plan_jax.data.tokenizer import tokenize_batch
from plan_jax.encoders.bert import BERTS
from plan_jax.encoders.dual_encoder import DualEncoder
from plan_jax.types import Batch, Memory, MethodContext, Metrics, Params
from plan_jax.weights.layouts import HEAD_PREFIXES


@struct.dataclass
class State:
    """All that changes while training; saved whole, so that a resumed run is the same run."""

    step: Array
    key: Array  # raw key data
    params: Params
    batch_stats: PyTree
    optimiser: PyTree
    memory: Memory
    average: Params  # moving average of `params`; {} if none is kept


def init_state(
    system: assembly.Components,
    batch: Batch,
    tx_of: Callable,
    seed: int,
    average: bool,
    findings: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
) -> tuple[State, optax.GradientTransformation]:
    """Make the first state from a seed, and the optimiser that `tx_of(params)` gives for it.

    `weights` says where a tower, `vision` or `text`, begins instead: see `weights.load_tower`.
    """
    key = jax.random.key(seed)
    towers = jax.random.fold_in(key, 0)
    dual = system.dual.clone(axis=None)
    batch = jax.tree.map(lambda x: x[:2], batch)
    variables = load_towers(dual, jax.jit(dual.init)(towers, batch), weights or {})
    images, _ = jax.eval_shape(dual.apply, variables, batch)
    tags = read_tags(system, variables, findings) if "labels" in system.method.REQUIRES else None
    setting = MethodContext(dual.dim, images.raw.shape[-1], tags)
    own, memory = system.method.init(jax.random.fold_in(key, 1), setting, system.hyper)
    params = {"encoders": variables["params"], "method": own}
    tx = tx_of(params)
    state = State(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(key, 2)),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        optimiser=tx.init(params),
        memory=memory,
        average=jax.tree.map(jnp.copy, params) if average else {},
    )
    return state, tx


def load_towers(
    dual: DualEncoder, variables: Mapping[str, Any], weights: Mapping[str, str]
) -> dict[str, Any]:
    """Put pretrained weights into what has a source in `weights`: `vision`, `text` or `heads`.

    Raises:
      UserError: a source cannot be read, or its arrays are not those of the tower.
    """
    variables = dict(variables)

    def put(part: str, load: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        found = load({kind: tree.get(part, {}) for kind, tree in variables.items()})
        for kind, tree in variables.items():
            if part in tree:
                variables[kind] = {**tree, part: jax.tree.map(jnp.asarray, found[kind])}

    attention_heads = {**BERTS[dual.text["name"]], **dual.text}["heads"]
    for side, part, heads in (
        ("vision", "image_tower", None),
        ("text", "text_tower", attention_heads),
    ):
        if source := weights.get(side):
            load = functools.partial(
                load_weights.load_tower, side, source, log=parallel.print_once, num_heads=heads
            )
            put(part, load)
    if source := weights.get("heads"):
        for head in HEAD_PREFIXES:
            put(f"{head}_head", functools.partial(load_weights.load_head, head, source))
    return variables


def read_tags(
    system: assembly.Components, variables: Any, findings: Sequence[str]
) -> Float[Array, "F E"]:
    """Read the names of findings: the mean of each one's words, before the heads."""
    texts = tokenize_batch(system.tokenizer, findings, 16, 12)
    dual = system.dual.clone(axis=None)
    read = jax.jit(lambda held, texts: dual.apply(held, texts, method="encode_text"))
    found = read(variables, texts)
    return jnp.sum(found.raw * found.mask[..., None], 1) / found.mask.sum(1, keepdims=True)


def optimiser_of(
    config: Mapping[str, Any], system: assembly.Components
) -> Callable[[Params], optax.GradientTransformation]:
    """Make what makes the config's optimiser for some parameters."""
    settings = dict(config["optim"])
    paths = [f for f in settings["freeze"] if f.partition(":")[0] not in ("vision", "text")]
    settings["freeze"] = tuple(paths)

    def held(name: str) -> bool:
        top, _, rest = name.partition("/")
        return top == "encoders" and system.dual.is_frozen(rest)

    return lambda params: optim.make_optimiser(params, steps=config["steps"], held=held, **settings)


def make_step(
    system: assembly.Components, tx: optax.GradientTransformation, decay: float, axis: str | None
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Make the pure step, written for one device of `axis`; `decay` is that of the average."""
    dual, method, hyper, _ = system

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = parallel.step_key(jax.random.wrap_key_data(state.key), state.step)
        drop = parallel.device_key(jax.random.fold_in(key, 0), axis)

        def encode(params: Params) -> tuple[Any, PyTree]:
            variables = {"params": params["encoders"], "batch_stats": state.batch_stats}
            rngs = {"dropout": drop}
            return dual.apply(variables, batch, True, rngs=rngs, mutable=["batch_stats"])

        extra = dict(batch.extra)
        if state.average:
            extra["teacher"] = lax.stop_gradient(encode(state.average)[0])

        def objective(params: Params) -> tuple[Array, tuple[Metrics, Memory, PyTree]]:
            (images, texts), changed = encode(params)
            value, (metrics, memory) = method.loss(
                params["method"],
                state.memory,
                images,
                texts,
                extra,
                key=jax.random.fold_in(key, 1),
                step=state.step,
                hyper=hyper,
                axis=axis,
            )
            return value, (metrics, memory, changed.get("batch_stats", {}))

        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, (metrics, memory, stats)), grads = gradient(state.params)
        grads, stats = parallel.mean((grads, stats), axis)
        updates, optimiser = tx.update(grads, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average:
            average = optax.incremental_update(params, average, 1 - decay)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads), **metrics}
        state = State(state.step + 1, state.key, params, stats, optimiser, memory, average)
        return state, parallel.mean(metrics, axis)

    return step
