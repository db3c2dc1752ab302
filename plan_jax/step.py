"""The training step: a pure function of the state and one batch, whole or in microbatches.

In microbatches, a device holds the activations of a few pairs at a time, while the loss compares
all pairs of all devices. *Gao et al., arXiv 2101.06983 (GradCache):*

    (1)  f_i = encode(theta, x_i)                        of each microbatch i, without gradients
    (2)  L = loss(phi, f_1 ... f_n),  c_i = dL/df_i,  dL/dphi      of the whole batch
    (3)  dL/dtheta = sum_i (df_i/dtheta)^T c_i           encodes each microbatch once more

theta are the parameters of the encoders, phi those of the method. By the chain rule this is the
gradient of the whole batch, of any loss. Only the features that the method reads grow with the
batch.

Deviation: BatchNorm normalises by the statistics of a microbatch (of all devices), not of the whole
batch, and its running statistics become the mean of those that the microbatches lead to. So the
gradient is exactly that of the whole batch only for encoders without BatchNorm.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from plan_jax import parallel
from plan_jax.config import HardNegativesConfig
from plan_jax.methods.contrastive import global_indices
from plan_jax.methods.hard_negatives import variant_loss
from plan_jax.model import Components
from plan_jax.state import State
from plan_jax.types import Batch, Features, Memory, Metrics, Params, UserError

FINITE_GROUPS = "finite_groups"  # key of the metrics of `make_step`, for `watch_numbers`
FIRST_NONFINITE = "first_nonfinite"  # key of the metrics of `watch_numbers`
WATCH_SHAPE = (2, 3)  # of its array

NO_HARD_NEGATIVES = HardNegativesConfig()

Sides = tuple[Features, ...]  # of images, of texts, of variants and of short texts, if any
# Variables of the encoders, and B inputs -> features of B pairs, and the new `batch_stats`.
Encode = Callable[[dict[str, PyTree], PyTree], tuple[Sides, PyTree]]
# Parameters of the method, and the features of all pairs -> the loss, and what comes with it.
ComputeLoss = Callable[[Params, Sides], tuple[Array, tuple[Metrics, Memory]]]


class Gradients(NamedTuple):
    """The loss of a batch, what comes with it, and the gradients of all parameters."""

    loss: Array
    metrics: Metrics
    memory: Memory
    batch_stats: PyTree
    params: Params


def make_step(
    components: Components,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    axis: str | None,
    microbatch: int = 0,
    hard_negatives: HardNegativesConfig = NO_HARD_NEGATIVES,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Returns the training step of one device.

    Its metrics are scalars, and as `FINITE_GROUPS` whether the gradient of each group of
    `group_leaves` is finite.

    Args:
      components: encoders and method.
      optimiser: the optimiser whose state is in the `State`.
      ema_decay: decay of the moving average of the parameters, if the state keeps one.
      axis: name of the mapped device axis; None on one device.
      microbatch: pairs that the device encodes at a time; 0: all of its batch.
      hard_negatives: the weight and the temperature of the loss against `Batch.variant`.

    Raises:
      UserError: when the step is called with a batch that `microbatch` does not divide.
    """
    encoder, method, hyper, _ = components

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = parallel.step_key(jax.random.wrap_key_data(state.key), state.step)
        # Both are the same on all devices: the method draws for the whole batch, and dropout of an
        # example depends on its place in the whole batch.
        dropout_key, method_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        count = len(batch.image)
        shorten_texts = getattr(method, "shorten_texts", None)
        concise = shorten_texts(state.memory, batch.text, hyper) if shorten_texts else None
        others = [text for text in (batch.variant, concise) if text is not None]
        inputs = batch.image, batch.text, others, global_indices(count, axis)
        size = split_microbatches(count, microbatch)

        def encode(variables: dict[str, PyTree], inputs: PyTree) -> tuple[Sides, PyTree]:
            image, text, others, index = inputs
            if others:
                # One pass for all, and the same dropout: what differs is the text alone.
                text = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), text, *others)
                index = jnp.tile(index, 1 + len(others))
            output: Any = encoder.apply(
                variables,
                Batch(image, text),
                True,
                index,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            (images, texts), updated = output
            images, texts = images.select(method.IMAGE_FEATURES), texts.select(method.TEXT_FEATURES)
            features = images, *split_texts(texts, len(image))
            return features, updated.get("batch_stats", {})

        # The averaged model is a teacher: its features carry no gradient.
        extra: dict[str, Any] = dict(batch.extra)
        if state.ema_params:
            averaged = {"params": state.ema_params["encoders"], "batch_stats": state.batch_stats}
            image, text, _, index = inputs  # a teacher is not asked about other texts
            sides, _ = encode_parts(encode, averaged, (image, text, [], index), size)
            extra["teacher"] = lax.stop_gradient(sides)

        def compute_loss(params: Params, features: Sides) -> tuple[Array, tuple[Metrics, Memory]]:
            images, texts, *others = features
            loss, (metrics, memory) = method.loss(
                params,
                state.memory,
                images,
                texts,
                extra if concise is None else extra | {"concise": others[-1]},
                key=method_key,
                step=state.step,
                hyper=hyper,
                axis=axis,
            )
            if batch.variant is None:
                return loss, (metrics, memory)
            differs = (batch.variant.tokens != batch.text.tokens).any(-1)
            penalty, accuracy = variant_loss(
                method,
                params,
                state.memory,
                images,
                texts,
                others[0],
                differs,
                hyper,
                hard_negatives.tau,
                axis,
            )
            metrics = metrics | {"loss_variant": penalty, "variant_accuracy": accuracy}
            return loss + hard_negatives.weight * penalty, (metrics, memory)

        compute_gradients = gradients_at_once if size == count else gradients_in_parts
        computed = compute_gradients(
            encode, compute_loss, state.params, state.batch_stats, inputs, size
        )
        # BatchNorm's statistics are those of all devices already.
        grads = parallel.mean(computed.params, axis)

        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)

        groups = group_leaves(grads).values()
        squares = jnp.stack([optax.tree.norm(group, squared=True) for group in groups])
        metrics = {"loss": computed.loss, "gradient_norm": jnp.sqrt(squares.sum())}
        state = State(
            step=state.step + 1,
            key=state.key,
            params=params,
            batch_stats=computed.batch_stats,
            opt_state=opt_state,
            memory=computed.memory,
            ema_params=ema_params,
        )
        metrics = parallel.mean(metrics | computed.metrics, axis)
        return state, metrics | {FINITE_GROUPS: jnp.isfinite(squares)}

    return step


# Gradients --------------------------------------------------------------------------------------


def split_microbatches(count: int, microbatch: int) -> int:
    """Returns the number of pairs that a device encodes at a time, of its `count` pairs.

    >>> split_microbatches(64, 16), split_microbatches(64, 0)
    (16, 64)
    >>> split_microbatches(64, 24)
    Traceback (most recent call last):
    plan_jax.types.UserError: config.microbatch is 24, which does not divide the 64 pairs of each \
device; use 16 or 32

    Raises:
      UserError: `microbatch` does not divide `count`; the sentence names the neighbours that do.
    """
    size = microbatch or count
    if count % size:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        below, above = ([n for n in divisors if (n < size) == is_less] for is_less in (True, False))
        remedy = " or ".join(str(n) for n in (*below[-1:], *above[:1]))
        raise UserError(
            f"config.microbatch is {microbatch}, which does not divide the {count} pairs of each"
            f" device; use {remedy}"
        )
    return size


def gradients_at_once(
    encode: Encode,
    compute_loss: ComputeLoss,
    params: Params,
    batch_stats: PyTree,
    inputs: PyTree,
    size: int,
) -> Gradients:
    """Computes loss and gradients of the whole batch of `size` pairs."""

    def compute(params: Params) -> tuple[Array, tuple[tuple[Metrics, Memory], PyTree]]:
        variables = {"params": params["encoders"], "batch_stats": batch_stats}
        features, updated = encode(variables, inputs)
        loss, outputs = compute_loss(params["method"], features)
        return loss, (outputs, updated)

    loss_and_grad = jax.value_and_grad(compute, has_aux=True)
    (loss, ((metrics, memory), updated)), grads = loss_and_grad(params)
    return Gradients(loss, metrics, memory, updated, grads)


def gradients_in_parts(
    encode: Encode,
    compute_loss: ComputeLoss,
    params: Params,
    batch_stats: PyTree,
    inputs: PyTree,
    size: int,
) -> Gradients:
    """Computes what `gradients_at_once` does, `size` pairs at a time: *equations 1 to 3*."""
    variables = {"params": params["encoders"], "batch_stats": batch_stats}
    features, updated = encode_parts(encode, variables, inputs, size)

    # Word ids and masks are ints and bools, whose gradients have type float0.
    loss_and_grads = jax.value_and_grad(compute_loss, (0, 1), has_aux=True, allow_int=True)
    (loss, (metrics, memory)), (method_grads, cotangents) = loss_and_grads(
        params["method"], features
    )

    def add_part(total: Params, part: tuple[PyTree, list[Array]]) -> tuple[Params, None]:
        inputs, cotangents = part

        def encode_floats(encoder_params: Params) -> list[Array]:
            return float_leaves(encode(variables | {"params": encoder_params}, inputs)[0])

        _, pull_back = jax.vjp(encode_floats, params["encoders"])
        return jax.tree.map(jnp.add, total, pull_back(cotangents)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params["encoders"])
    parts = split_leaves((inputs, float_leaves(cotangents)), size)
    encoder_grads, _ = lax.scan(add_part, zeros, parts)
    grads = {"encoders": encoder_grads, "method": method_grads}
    return Gradients(loss, metrics, memory, updated, grads)


def encode_parts(
    encode: Encode, variables: dict[str, PyTree], inputs: PyTree, size: int
) -> tuple[Sides, PyTree]:
    """Encodes `size` pairs at a time: *equation 1*.

    Returns:
      The features of all pairs, and the mean of the new `batch_stats` over the microbatches.
    """
    parts = split_leaves(inputs, size)
    count = len(jax.tree.leaves(parts)[0])
    if count == 1:
        return encode(variables, inputs)

    def encode_part(total: PyTree, part: PyTree) -> tuple[PyTree, Sides]:
        features, updated = encode(variables, part)
        return jax.tree.map(lambda x, y: x + y / count, total, updated), features

    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    updated, features = lax.scan(encode_part, zeros, parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), features), updated


def split_texts(texts: Features, count: int) -> list[Features]:
    """Returns the features of `count` texts, and those of other texts for them if there are."""
    total = len(jax.tree.leaves(texts)[0])
    return [
        jax.tree.map(lambda leaf, start=start: leaf[start : start + count], texts)
        for start in range(0, total, count)
    ]


def split_leaves(tree: PyTree, size: int) -> PyTree:
    """Returns every leaf [B ...] as [B / size, size, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def float_leaves(tree: PyTree) -> list[Array]:
    """Returns the leaves of floating-point numbers."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


# The numbers of a run ---------------------------------------------------------------------------


def watch_numbers(
    step: Callable[[State, Batch], tuple[State, Metrics]],
) -> Callable[[tuple[State, Array], Batch], tuple[tuple[State, Array], Metrics]]:
    """Returns a step that also carries the numbers of the first steps that were not finite.

    It maps (state, first) and a batch to a new pair and the metrics, with `first` [2 3] among them
    as `FIRST_NONFINITE`. Its rows are about the loss and the gradient: the first step of which it
    was NaN or infinite, the index of the first part that was, and the number of parts that were; 0
    where there was no such step. The parts of the loss are `loss_terms`, those of the gradient
    `group_leaves`. The array is the same on all devices and stays there, so that the host does not
    wait for each step.

    Args:
      step: (state, batch) -> (state, metrics), as of `make_step`.
    """

    def watch_step(carry: tuple[State, Array], batch: Batch) -> tuple[tuple[State, Array], Metrics]:
        state, first = carry
        state, metrics = step(state, batch)
        # The whole comes last: a sum can overflow though no part is infinite.
        terms = jnp.stack([jnp.isfinite(metrics[x]) for x in (*loss_terms(metrics), "loss")])
        groups = jnp.append(metrics.pop(FINITE_GROUPS), jnp.isfinite(metrics["gradient_norm"]))
        rows = [
            jnp.stack([state.step, parts.argmin(), (~parts[:-1]).sum()]) * ~parts[-1]
            for parts in (terms, groups)
        ]
        first = jnp.where(first[:, :1] == 0, jnp.stack(rows), first)
        return (state, first), {**metrics, FIRST_NONFINITE: first}

    return watch_step


def loss_terms(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the names of the terms of the loss among the metrics of a step, sorted.

    >>> loss_terms({"loss": 3, "loss_word": 2, "loss_report": 1, "gradient_norm": 1})
    ['loss_report', 'loss_word']
    """
    return sorted(name for name in metrics if name.startswith("loss_"))


def group_leaves(params: PyTree) -> dict[str, list[Any]]:
    """Returns the leaves of parameters by their layer of an encoder or head, or part of the method.

    >>> group_leaves({"encoders": {"image_tower": {"stem": {"kernel": 1}}}, "method": {"tau": 2}})
    {'image_tower/stem': [1], 'method/tau': [2]}
    """
    groups: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("encoders/")
        groups.setdefault("/".join(name.split("/")[:2]), []).append(leaf)
    return groups
