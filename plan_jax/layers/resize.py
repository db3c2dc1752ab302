"""Bilinear scaling of maps under jit, corner pixels kept."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def resize_align_corners(
    x: Float[Array, "B y x C"], size: tuple[int, int]
) -> Float[Array, "B Y X C"]:
    """Resize maps bilinearly to `size` (Y, X); corners stay corners (torch's align_corners=True).

    >>> maps = jnp.arange(2.0).reshape(1, 2, 1, 1)
    >>> resize_align_corners(maps, (3, 1)).ravel().tolist()
    [0.0, 0.5, 1.0]
    """

    def weights(count: int, goal: int) -> Float[Array, "goal count"]:
        places = jnp.linspace(0, count - 1, goal)[:, None]
        return jnp.maximum(0, 1 - abs(places - jnp.arange(count))).astype(x.dtype)

    (_, rows, columns, _), (goal_y, goal_x) = x.shape, size
    return jnp.einsum("sy,tx,byxc->bstc", weights(rows, goal_y), weights(columns, goal_x), x)
