"""The optimiser: AdamW or Muon, with warm-up, decay, clipping, accumulation, frozen parameters."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import optax
from jaxtyping import Array, Float, PyTree
from optax import contrib

from plan_jax.types import Params, UserError

MUON_DECAY = 0.95  # of Muon's mean of the gradients, as in its publication
MUON_RMS = 0.2  # of an update at a learning rate of 1; that of AdamW, by Liu et al.
MUON_MIN_SIZE = 8  # a narrower matrix has no spectrum worth evening out


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
    name: Literal["adamw", "muon"] = "adamw",
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
    """Returns AdamW (*Loshchilov and Hutter, arXiv 1711.05101*) or Muon for `params`.

    Muon (*Jordan et al., kellerjordan.github.io/posts/muon, 2024*) has an update of its own for the
    kernels of layers, see `scale_by_muon`. Warm-up, decay and the rest are the same.

    Args:
      params: the parameters, whose names `freeze` refers to.
      name: which of the two.
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
    scale = optax.scale_by_adam(b1, b2)
    if name == "muon":
        scale = optax.partition({"muon": scale_by_muon(), "adam": scale}, label_muon)
    optimiser = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.chain(
            scale,
            optax.add_decayed_weights(weight_decay, is_decayed),
            optax.scale_by_learning_rate(schedule),
        ),
    )
    labels = label_frozen(params, tuple(freeze), is_frozen)
    if "frozen" in jax.tree.leaves(labels):
        optimiser = optax.multi_transform(
            {"train": optimiser, "frozen": optax.set_to_zero()}, labels
        )
    if accumulate_steps > 1:
        optimiser = optax.MultiSteps(optimiser, accumulate_steps).gradient_transformation()
    return optimiser


def scale_by_muon() -> optax.GradientTransformation:
    """Returns Muon's update of kernels, as large as AdamW's.

        U = MUON_RMS sqrt(max(rows, columns)) NewtonSchulz(beta M + (1 - beta) G)

    M is the moving average of the gradients G. The Newton-Schulz iteration replaces the singular
    values of a matrix by about 1, so that directions with small gradients are learned as fast as
    others. The factor gives an update the root mean square of one of AdamW, so both share a
    learning rate (*Liu et al., arXiv 2502.16982, section 2.2*).
    """

    def scale(update: Float[Array, "*N"]) -> Float[Array, "*N"]:
        rows, columns = kernel_size(update)
        return update * MUON_RMS * math.sqrt(max(rows, columns))

    return optax.chain(
        contrib.scale_by_muon(
            beta=MUON_DECAY,
            weight_dimension_numbers=lambda updates: jax.tree.map(kernel_axes, updates),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
    )


def label_muon(params: Params) -> PyTree:
    """Returns `muon` for each kernel of a layer, else `adam`: embeddings, positions, vectors."""

    def label(path: tuple, x: Float[Array, "*N"]) -> str:
        is_kernel = path_name(path[-1:]) == "kernel"
        return "muon" if is_kernel and min(kernel_size(x)) >= MUON_MIN_SIZE else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def kernel_axes(kernel: Float[Array, "*N"]) -> contrib.MuonDimensionNumbers:
    """Returns which axes of a kernel are the rows and which the columns of a matrix.

    The last axis are the outputs of the layer; that of a convolution has rows of all its inputs.
    """
    return contrib.MuonDimensionNumbers(tuple(range(kernel.ndim - 1)), (kernel.ndim - 1,))


def kernel_size(kernel: Float[Array, "*N"]) -> tuple[int, int]:
    """Returns the numbers of rows and columns of the matrix of a kernel.

    >>> kernel_size(jax.numpy.ones((3, 3, 16, 32)))
    (144, 32)
    """
    return math.prod(kernel.shape[:-1]), kernel.shape[-1]


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
