"""The optimiser: AdamW with warm-up, cosine, clipping, accumulation and frozen subtrees."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from plan_jax.types import Params, UserError


def schedule(rate: float, steps: int, warmup: float, end: float) -> optax.Schedule:
    """Rise linearly over the first `warmup` share of the steps, then fall by a cosine to rate*end.

    >>> [round(float(schedule(1.0, 100, 0.1, 0.0)(n)), 2) for n in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(steps * warmup))
    return optax.warmup_cosine_decay_schedule(0.0, rate, rise, max(steps, rise + 1), rate * end)


def path_name(path: tuple) -> str:
    """Name a leaf by its path: `vision/stem/kernel`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def decays(params: Params) -> PyTree:
    """Say which leaves are decayed: matrices and kernels, not biases, norms or temperatures."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def frozen(
    params: Params, prefixes: tuple[str, ...], held: Callable[[str], bool] = lambda name: False
) -> PyTree:
    """Label each leaf `frozen` if it lies under one of the prefixes or is `held`, else `train`.

    Raises:
      UserError: if a prefix matches nothing.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    under = tuple(f"{prefix.rstrip('/')}/" for prefix in prefixes)
    for prefix, found in zip(prefixes, under, strict=True):
        if not any(f"{name}/".startswith(found) for name in names):
            tops = sorted({"/".join(name.split("/")[:2]) for name in names if "_tower" not in name})
            there = ", ".join(["vision", "text", "vision:N", "text:N", *tops])
            raise UserError(f"optim.freeze {prefix!r} names no parameter; there are {there}")

    def label(path: tuple, _: object) -> str:
        name = path_name(path)
        return "frozen" if held(name) or f"{name}/".startswith(under) else "train"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimiser(
    params: Params,
    *,
    steps: int,
    rate: float,
    warmup: float,
    end: float,
    weight_decay: float,
    b1: float,
    b2: float,
    clip: float,
    accumulate: int,
    freeze: tuple[str, ...],
    held: Callable[[str], bool] = lambda name: False,
) -> optax.GradientTransformation:
    """Make AdamW (*Loshchilov and Hutter, arXiv 1711.05101*) for `params`.

    `clip` bounds the global norm of the gradient (0: no bound); `accumulate` batches are averaged
    into one update. Parameters under a path in `freeze`, and those whose path is `held` (frozen
    towers), stay as they are and carry no optimiser state.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            schedule(rate, max(1, steps // accumulate), warmup, end),
            b1,
            b2,
            weight_decay=weight_decay,
            mask=decays,
        ),
    )
    labels = frozen(params, tuple(freeze), held)
    if "frozen" in jax.tree.leaves(labels):
        chain = optax.multi_transform({"train": chain, "frozen": optax.set_to_zero()}, labels)
    if accumulate > 1:
        chain = optax.MultiSteps(chain, accumulate).gradient_transformation()
    return chain
