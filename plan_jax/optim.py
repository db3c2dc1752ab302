"""The optimiser: AdamW with warm-up, cosine decay, clipping, accumulation and frozen parameters."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from plan_jax.types import Params, UserError


def make_schedule(
    learning_rate: float, steps: int, warmup_fraction: float, end_lr_factor: float
) -> optax.Schedule:
    """Returns a linear warm-up over a fraction of the steps, then a cosine decay to the end.

    >>> schedule = make_schedule(1.0, 100, 0.1, 0.0)
    >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(steps * warmup_fraction))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=warmup,
        # The decay includes the warm-up, and optax wants at least one step after it.
        decay_steps=max(steps, warmup + 1),
        end_value=learning_rate * end_lr_factor,
    )


def make_optimiser(
    params: Params,
    *,
    steps: int,
    learning_rate: float,
    warmup_fraction: float,
    end_lr_factor: float,
    weight_decay: float,
    b1: float,
    b2: float,
    clip_norm: float,
    accumulate_steps: int,
    freeze: tuple[str, ...],
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> optax.GradientTransformation:
    """Returns AdamW (*Loshchilov and Hutter, arXiv 1711.05101*) for `params`.

    Args:
      params: the parameters, whose names `freeze` refers to.
      steps: batches of the whole run; the schedule counts updates.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      accumulate_steps: batches averaged into one update.
      freeze: paths of parameters that stay as they are; they carry no optimiser state.
      is_frozen: whether the parameter of a path is frozen for another reason (frozen encoders).

    Raises:
      UserError: a path in `freeze` names no parameter.
    """
    updates = max(1, steps // accumulate_steps)
    schedule = make_schedule(learning_rate, updates, warmup_fraction, end_lr_factor)
    optimiser = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=is_decayed),
    )
    labels = label_frozen(params, tuple(freeze), is_frozen)
    if "frozen" in jax.tree.leaves(labels):
        optimiser = optax.multi_transform(
            {"train": optimiser, "frozen": optax.set_to_zero()}, labels
        )
    if accumulate_steps > 1:
        optimiser = optax.MultiSteps(optimiser, accumulate_steps).gradient_transformation()
    return optimiser


def is_decayed(params: Params) -> PyTree:
    """Returns which parameters are decayed: matrices and kernels, not biases, norms or scalars."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def label_frozen(
    params: Params,
    prefixes: tuple[str, ...],
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> PyTree:
    """Returns `frozen` for each parameter under a prefix or with a frozen name, else `train`.

    Raises:
      UserError: a prefix names no parameter.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    # With a slash at the end, so that `encoders/image` does not match `encoders/image_tower`.
    folders = tuple(f"{prefix.rstrip('/')}/" for prefix in prefixes)
    for prefix, folder in zip(prefixes, folders, strict=True):
        if not any(f"{name}/".startswith(folder) for name in names):
            heads = {"/".join(name.split("/")[:2]) for name in names if "_tower" not in name}
            choices = ", ".join(["vision", "text", "vision:N", "text:N", *sorted(heads)])
            raise UserError(f"optim.freeze {prefix!r} names no parameter; use some of {choices}")

    def label(path: tuple, _: object) -> str:
        name = path_name(path)
        return "frozen" if is_frozen(name) or f"{name}/".startswith(folders) else "train"

    return jax.tree_util.tree_map_with_path(label, params)


def path_name(path: tuple) -> str:
    """Returns the path of a leaf as a name, such as `vision/stem/kernel`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
