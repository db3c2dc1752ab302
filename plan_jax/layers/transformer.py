"""What ViT and BERT share: stacks of equal layers, the attention of the first token, dropout."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax.layers.cpu.convolution import product
from plan_jax.layers.cpu.normalisation import layer_norm


class Dense(nn.Module):
    """An affine map with the parameters of flax's; with `parts`, so many equal parts of its result.

    Each part is a product of its own, on every platform: cutting the kernel costs less than
    cutting, and copying, the result.
    """

    features: int
    parts: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B E"]
    ) -> Float[Array, "*B F"] | tuple[Float[Array, "*B G"], ...]:
        """Map it."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        if not self.parts:
            return product(x, kernel) + bias
        pieces = zip(*(jnp.split(a, self.parts, -1) for a in (kernel, bias)), strict=True)
        return tuple(product(x, some) + shift for some, shift in pieces)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, in float32, with the parameters of flax's."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Normalise."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x.astype(jnp.float32), scale, bias, self.epsilon)


def first_attention(
    q: Float[Array, "B N H C"], k: Float[Array, "B N H C"], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B N"]:
    """Give the softmax attention of the first token to all that mask leaves, mean over heads."""
    logits = jnp.einsum("bhc,bnhc->bhn", q[:, 0], k).astype(jnp.float32) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -1e9)
    return jax.nn.softmax(logits, -1).mean(1)


def dropout(
    x: Float[Array, "B N E"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "B N E"]:
    """Drop a share `rate` of the entries and scale the others up; without a key, none."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def is_frozen_layer(name: str, hold: int) -> bool:
    """Say whether `name` is an embedding (frozen if hold > 0) or one of the first `hold` layers.

    >>> [is_frozen_layer(name, 2) for name in ("token", "layer1", "layer2", "layer10")]
    [True, True, False, False]
    """
    return int(name.removeprefix("layer")) < hold if name.startswith("layer") else hold > 0


def run_layers(
    tower: nn.Module,
    layer: type[nn.Module],
    settings: dict[str, Any],
    x: Float[Array, "B N E"],
    *args: Array,
    key: PRNGKeyArray | None = None,
    last: int = 1,
) -> tuple[Float[Array, "B N E"], Float[Array, "B N"]]:
    """Apply a tower's `depth` layers; give the sum of what the `last` gave, and the attention.

    Layers are called layer0, layer1, ... in the parameters, however they are run: one by one, or
    all but the last ones by `lax.scan` over their stacked parameters (`tower.scan`: a program of
    one layer, which compiles in a fraction of the time, for a copy of the parameters); with
    `tower.remat` what is inside a layer is computed again in the backward pass instead of kept
    (on CPU, XLA frees that memory only together with `scan`).
    The first `tower.hold` layers are frozen: no gradient, no dropout. `key` is that of dropout, the
    same for a layer whichever way it runs.
    """
    depth, hold = tower.depth, min(tower.hold, tower.depth)
    keys = [None if key is None or n < hold else jax.random.fold_in(key, n) for n in range(depth)]
    made = nn.remat(layer) if tower.remat else layer
    total, attention = 0.0, None
    inner = depth - last
    edge = min(hold, inner)
    for first, end in ((0, edge), (edge, inner)):
        if tower.scan and end - first > 1 and not tower.is_initializing():
            x = _scanned(tower, layer(**settings, parent=None), x, args, keys, first, end)
        else:
            for n in range(first, end):
                x, _ = made(**settings, name=f"layer{n}")(x, *args, keys[n])
        x = lax.stop_gradient(x) if hold > 0 and end <= hold else x
    for n in range(inner, depth):
        x, attention = made(**settings, name=f"layer{n}")(x, *args, keys[n])
        x = lax.stop_gradient(x) if n < hold else x
        total = total + x
    return total, attention


def _scanned(
    tower: nn.Module,
    layer: nn.Module,
    x: Float[Array, "B N E"],
    args: tuple,
    keys: list,
    first: int,
    end: int,
) -> Float[Array, "B N E"]:
    """Run layers `first` to `end` - 1 as one scanned layer over their stacked parameters."""
    held = tower.variables["params"]
    layers = [held[f"layer{n}"] for n in range(first, end)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    drawn = None if keys[first] is None else jnp.stack(keys[first:end])

    def body(x: Array, one: tuple) -> tuple[Array, None]:
        params, key = one
        return layer.apply({"params": params}, x, *args, key)[0], None

    return lax.scan(jax.checkpoint(body) if tower.remat else body, x, (stacked, drawn))[0]
