"""The training step: a pure function of the state and one batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from plan_jax import parallel
from plan_jax.model import Components
from plan_jax.state import State
from plan_jax.types import Batch, Features, Memory, Metrics, Params

FIRST_NONFINITE = "first_nonfinite"  # key of the metrics of `watch_numbers`


def make_step(
    components: Components,
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    axis: str | None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Returns the training step of one device.

    Args:
      components: encoders and method.
      optimiser: the optimiser whose state is in the `State`.
      ema_decay: decay of the moving average of the parameters, if the state keeps one.
      axis: name of the mapped device axis; None on one device.
    """
    encoder, method, hyper, _ = components

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = parallel.step_key(jax.random.wrap_key_data(state.key), state.step)
        # Dropout differs between devices; what the method draws is the same on all of them, since
        # it draws for the whole batch.
        dropout_key = parallel.device_key(jax.random.fold_in(key, 0), axis)
        method_key = jax.random.fold_in(key, 1)

        def encode(params: Params) -> tuple[tuple[Features, Features], PyTree]:
            output: Any = encoder.apply(
                {"params": params["encoders"], "batch_stats": state.batch_stats},
                batch,
                True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            (images, texts), variables = output
            features = (
                images.select(method.IMAGE_FEATURES),
                texts.select(method.TEXT_FEATURES),
            )
            return features, variables

        # The averaged model is a teacher: its features carry no gradient.
        extra: dict[str, Any] = dict(batch.extra)
        if state.ema_params:
            extra["teacher"] = lax.stop_gradient(encode(state.ema_params)[0])

        def compute_loss(params: Params) -> tuple[Array, tuple[Metrics, Memory, PyTree]]:
            (images, texts), updated = encode(params)
            loss, (metrics, memory) = method.loss(
                params["method"],
                state.memory,
                images,
                texts,
                extra,
                key=method_key,
                step=state.step,
                hyper=hyper,
                axis=axis,
            )
            return loss, (metrics, memory, updated.get("batch_stats", {}))

        loss_and_grad = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, (metrics, memory, batch_stats)), grads = loss_and_grad(state.params)
        grads, batch_stats = parallel.mean((grads, batch_stats), axis)

        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)

        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **metrics}
        state = State(
            step=state.step + 1,
            key=state.key,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            memory=memory,
            ema_params=ema_params,
        )
        return state, parallel.mean(metrics, axis)

    return step


def watch_numbers(
    step: Callable[[State, Batch], tuple[State, Metrics]],
) -> Callable[[tuple[State, Array], Batch], tuple[tuple[State, Array], Metrics]]:
    """Returns a step that also carries the numbers of the first steps that were not finite.

    It maps (state, first) and a batch to a new pair and the metrics, with `first` [2] among them as
    `FIRST_NONFINITE`. `first` holds the first step whose loss was NaN or infinite, and the first
    step whose gradient was; 0 where there was none. It stays on the device, so that the host does
    not wait for each step.
    """

    def watch_step(carry: tuple[State, Array], batch: Batch) -> tuple[tuple[State, Array], Metrics]:
        state, first = carry
        state, metrics = step(state, batch)
        is_finite = jnp.isfinite(jnp.stack([metrics["loss"], metrics["gradient_norm"]]))
        first = jnp.where((first == 0) & ~is_finite, state.step, first)
        return (state, first), {**metrics, FIRST_NONFINITE: first}

    return watch_step
