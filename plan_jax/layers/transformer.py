"""The transformer layer of all towers and decoders, and how towers stack it.

Source: Vaswani et al., arXiv 1706.03762; pre-norm: Xiong et al., arXiv 2002.04745; GELU: Hendrycks
and Gimpel, arXiv 1606.08415; LayerScale: Touvron et al., arXiv 2103.17239; SwiGLU: Shazeer, arXiv
2002.05202.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from plan_jax.layers.cpu.attention import attend
from plan_jax.layers.cpu.layer_norm import normalise
from plan_jax.layers.dense import Dense, scale_by_parameter

# Logits of masked keys: exp(-1e9 - max) is 0 in float32, and no infinity enters a
# gradient where a query may attend to nothing.
MASKED_LOGIT = -1e9


class KeyValue(NamedTuple):
    """Keys and values of M items, split into H heads of C channels."""

    key: Float[Array, "*B M H C"]
    value: Float[Array, "*B M H C"]


class Attended(NamedTuple):
    """The queries, keys and values of one attention; weights and caches are taken from them."""

    query: Float[Array, "*B N H C"]
    key: Float[Array, "*B M H C"]
    value: Float[Array, "*B M H C"]


def exact_gelu(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Computes `x Phi(x)` in float32, Phi the normal distribution's function; keeps x's type."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def swiglu(x: Float[Array, "*B N E"]) -> Float[Array, "*B N F"]:
    """Computes `silu(gate) value` of the first and second half of the channels, in float32."""
    gate, value = jnp.split(x.astype(jnp.float32), 2, -1)
    return (jax.nn.silu(gate) * value).astype(x.dtype)


def fold_in(key: Key[Array, "..."], number: int | Int[Array, "..."]) -> Key[Array, "..."]:
    """Returns `jax.random.fold_in` of a key and a number; of rows of either, one for each row.

    >>> key = jax.random.key(0)
    >>> fold_in(key, jnp.arange(3)).shape, fold_in(fold_in(key, jnp.arange(3)), 7).shape
    ((3,), (3,))
    """
    return jnp.vectorize(jax.random.fold_in)(key, number)


def dropout(
    x: Float[Array, "*B E"], rate: float, key: Key[Array, "*R"] | None
) -> Float[Array, "*B E"]:
    """Zeroes a fraction `rate` of the entries and scales the rest up; no key, no dropout.

    With one key for each row, the mask of a row does not depend on the batch that it is in.
    """
    if key is None or not rate:
        return x
    if key.ndim:
        mask = jax.vmap(lambda row: jax.random.bernoulli(row, 1 - rate, x.shape[1:]))(key)
    else:
        mask = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(mask, x / (1 - rate), 0)


def split_keys(key: Key[Array, "*R"], count: int) -> Key[Array, "{count} *R"]:
    """Returns `count` keys, or `count` for each row.

    >>> split_keys(fold_in(jax.random.key(0), jnp.arange(3)), 6).shape
    (6, 3)
    """
    split = partial(jax.random.split, num=count)
    return jnp.moveaxis(jnp.vectorize(split, signature="()->(n)")(key), -1, 0)


def attention_weights(
    query: Float[Array, "*B N H C"],
    key: Float[Array, "*B M H C"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "*B H N M"]:
    """Computes `softmax_m(q_n . k_m / sqrt(C))` for each head, in float32, where mask is True."""
    multiply = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = multiply("...nhc,...mhc->...hnm", query, key) / query.shape[-1] ** 0.5
    logits = logits if mask is None else jnp.where(mask, logits, MASKED_LOGIT)
    return jax.nn.softmax(logits, -1)


def first_token_attention(
    attended: Attended, mask: Bool[Array, "B 1 N M"] | None = None
) -> Float[Array, "B M"]:
    """Returns the attention of the first token to all tokens, averaged over heads."""
    mask = None if mask is None else mask[:, :, :1]
    return attention_weights(attended.query[:, :1], attended.key, mask).mean(1)[:, 0]


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with the parameters of flax's; the output is float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Returns `(x - mean) / sqrt(variance + epsilon) * scale + bias`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return normalise(x, scale, bias, self.epsilon)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected apart, so that they can be kept."""

    width: int
    num_heads: int
    use_bias: bool = True
    dropout: float = 0.0  # of the attention weights
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Builds the four projections."""
        self.query, self.key, self.value, self.out = (
            Dense(self.width, self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init)
            for _ in range(4)
        )

    def project(self, memory: Float[Array, "*B M E"]) -> KeyValue:
        """Returns the keys and values of the items to attend to."""
        return KeyValue(self._split_heads(self.key(memory)), self._split_heads(self.value(memory)))

    def __call__(
        self,
        x: Float[Array, "*B N E"],
        memory: KeyValue,
        mask: Bool[Array, "..."] | None = None,
        key: Key[Array, "*R"] | None = None,
    ) -> tuple[Float[Array, "*B N E"], Attended]:
        """Returns `out(softmax(q k' / sqrt(C)) v)` and what it was computed from.

        `x` may have a multiple of the memory's rows (the beams of one image): successive rows of x
        share a row of the memory. A query whose mask is False everywhere gets the mean value.
        """
        query = self._split_heads(self.query(x))
        batch = memory.key.shape[0]  # not `len`: the batch of an exported program is a symbol
        if query.ndim == 4 and query.shape[0] != batch:
            query = query.reshape(batch, -1, *query.shape[2:])
        if key is None or not self.dropout:
            values = attend(query, *memory, mask)
        else:
            # Dropping weights needs the table, which the fused attention does not show.
            weights = dropout(attention_weights(query, memory.key, mask), self.dropout, key)
            values = jnp.einsum("...hnm,...mhc->...nhc", weights.astype(x.dtype), memory.value)
        return self.out(values.reshape(x.shape)), Attended(query, *memory)

    def _split_heads(self, x: Float[Array, "*B N E"]) -> Float[Array, "*B N H C"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class LayerOutput(NamedTuple):
    """Tokens after a layer, and its attentions (`cross` is None without cross-attention)."""

    x: Float[Array, "*B N E"]
    attention: Attended
    cross: Attended | None


class TransformerLayer(nn.Module):
    """Self-attention, optional cross-attention and an MLP, each with a residual connection.

    Pre-norm (ViT, the decoders): `x + f(norm(x))`; post-norm (BERT): `norm(x + f(x))`. The MLP is
    `fc2(activation(fc1(x)))`, where fc1 has `hidden` channels. Norms and softmax are computed in
    float32.

    Attributes:
      layer_scale: initial value of a learned factor for each channel of the self-attention's and
        the MLP's output (LayerScale); 0 has none.
      dropout: rate on the output of each of the branches.
      hidden_dropout: rate inside the MLP, after the activation.
      attention_dropout: rate on attention weights. It costs the fused attention, see `Attention`.
      attention_bias: whether the projections of the attentions have biases.
    """

    width: int
    num_heads: int
    hidden: int
    pre_norm: bool = True
    cross_attention: bool = False
    activation: Callable[[Array], Array] = exact_gelu
    epsilon: float = 1e-6
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention_bias: bool = True
    layer_scale: float = 0.0
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Builds norms, attentions, MLP and the factors of LayerScale."""

        def attention() -> Attention:
            return Attention(
                self.width,
                self.num_heads,
                self.attention_bias,
                self.attention_dropout,
                self.kernel_init,
                self.dtype,
            )

        self.norm1, self.norm2 = LayerNorm(self.epsilon), LayerNorm(self.epsilon)
        self.attention = attention()
        if self.cross_attention:
            self.cross, self.norm_cross = attention(), LayerNorm(self.epsilon)
        self.fc1, self.fc2 = (
            Dense(width, dtype=self.dtype, kernel_init=self.kernel_init)
            for width in (self.hidden, self.width)
        )
        if self.layer_scale:
            initializer = nn.initializers.constant(self.layer_scale)
            self.scale1, self.scale2 = (
                self.param(name, initializer, (self.width,)) for name in ("scale1", "scale2")
            )

    def project_memory(self, memory: Float[Array, "*B M E"]) -> KeyValue:
        """Returns what the cross-attention needs of the items it attends to."""
        return self.cross.project(memory)

    def __call__(
        self,
        x: Float[Array, "*B N E"],
        mask: Bool[Array, "..."] | None = None,
        key: Key[Array, "*R"] | None = None,
        memory: KeyValue | None = None,
        memory_mask: Bool[Array, "..."] | None = None,
        cache: KeyValue | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> LayerOutput:
        """Returns the tokens after the layer.

        Args:
          mask: which token attends to which, broadcast to [*B H N N]; None: all to all.
          key: of dropout, or one for each of the B rows; None: no dropout.
          memory: what `project_memory` returned, for the cross-attention.
          memory_mask: which token attends to which item of the memory, broadcast to [*B H N M].
          cache: keys and values of a whole sequence, in which x stands from `position` on. The
            output's `attention` holds the cache with the new tokens entered.
        """
        # The order is part of the random numbers: new branches are appended.
        keys = [None] * 6 if key is None else split_keys(key, 6)
        self_key, mlp_key, cross_key, hidden_key, weights_key, cross_weights_key = keys

        y = self._before(self.norm1, x)
        key_value = self.attention.project(y)
        if cache is not None:
            key_value = KeyValue(
                *(
                    lax.dynamic_update_slice(past, new, (0, position, 0, 0))
                    for past, new in zip(cache, key_value, strict=True)
                )
            )
        y, attended = self.attention(y, key_value, mask, weights_key)
        y = scale_by_parameter(y, self.scale1) if self.layer_scale else y
        x = self._after(self.norm1, x + dropout(y, self.dropout, self_key))

        cross = None
        if self.cross_attention:
            assert memory is not None, "cross-attention needs a memory"
            y = self._before(self.norm_cross, x)
            y, cross = self.cross(y, memory, memory_mask, cross_weights_key)
            x = self._after(self.norm_cross, x + dropout(y, self.dropout, cross_key))

        y = self.activation(self.fc1(self._before(self.norm2, x)))
        y = self.fc2(dropout(y, self.hidden_dropout, hidden_key))
        y = scale_by_parameter(y, self.scale2) if self.layer_scale else y
        x = self._after(self.norm2, x + dropout(y, self.dropout, mlp_key))
        return LayerOutput(x, attended, cross)

    def _before(self, norm: LayerNorm, x: Float[Array, "*B N E"]) -> Float[Array, "*B N E"]:
        return norm(x).astype(self.dtype) if self.pre_norm else x

    def _after(self, norm: LayerNorm, x: Float[Array, "*B N E"]) -> Float[Array, "*B N E"]:
        return x if self.pre_norm else norm(x).astype(self.dtype)


# Stacks of layers -------------------------------------------------------------------------------


def is_frozen_layer(name: str, frozen_layers: int) -> bool:
    """Returns whether parameters named `name` belong to the frozen part of a stack.

    That is the first `frozen_layers` layers and, if there are any, the embeddings before them.

    >>> [is_frozen_layer(name, 2) for name in ("token", "layer1", "layer2", "layer10")]
    [True, True, False, False]
    """
    if name.startswith("layer"):
        return int(name.removeprefix("layer")) < frozen_layers
    return frozen_layers > 0


def run_layers(
    tower: nn.Module,
    options: Mapping[str, Any],
    x: Float[Array, "B N E"],
    mask: Bool[Array, "B 1 N N"] | None = None,
    key: Key[Array, "*R"] | None = None,
    sum_last_layers: int = 1,
) -> tuple[Float[Array, "B N E"], Float[Array, "B N"]]:
    """Applies the `depth` layers of a tower, which is a compact module that calls this.

    Layers are named layer0, layer1, ... in the parameters, however they are run. With `tower.scan`
    all but the last run as one `lax.scan` over their stacked parameters: a program of one layer,
    which compiles in a fraction of the time, for a copy of the parameters. With `tower.remat` the
    activations inside a layer are recomputed in the backward pass instead of stored (on a CPU, XLA
    frees that memory only together with `scan`). The first `tower.frozen_layers` layers are frozen:
    no gradient, no dropout.

    Args:
      tower: the module with `depth`, `scan`, `remat` and `frozen_layers`.
      options: fields of the tower's `TransformerLayer`.
      mask: which token attends to which.
      key: of dropout, or one for each text; a layer gets the same key whichever way it runs.
      sum_last_layers: how many of the last layers' outputs are summed (1: the last alone).

    Returns:
      That sum, and the attention of the first token in the last layer, averaged over heads.
    """
    depth, num_frozen = tower.depth, min(tower.frozen_layers, tower.depth)
    keys = [None if key is None or n < num_frozen else fold_in(key, n) for n in range(depth)]
    layer_class = nn.remat(TransformerLayer) if tower.remat else TransformerLayer
    # Layers whose output is not summed may be scanned. Frozen and trained ones are scanned apart,
    # because only the trained ones have keys of dropout.
    num_inner = depth - sum_last_layers
    boundary = min(num_frozen, num_inner)
    for start, stop in ((0, boundary), (boundary, num_inner)):
        if tower.scan and stop - start > 1 and not tower.is_initializing():
            x = _scan_layers(tower, options, x, mask, keys, start, stop)
        else:
            for n in range(start, stop):
                x = layer_class(**options, name=f"layer{n}")(x, mask, keys[n]).x
        # Stopping the gradient after the last frozen layer leaves out the backward pass of all.
        x = lax.stop_gradient(x) if num_frozen > 0 and stop <= num_frozen else x
    total = jnp.zeros((), x.dtype)
    for n in range(num_inner, depth):
        x, attended, _ = layer_class(**options, name=f"layer{n}")(x, mask, keys[n])
        x = lax.stop_gradient(x) if n < num_frozen else x
        total = total + x
    return total, first_token_attention(attended, mask)


def _scan_layers(
    tower: nn.Module,
    options: Mapping[str, Any],
    x: Float[Array, "B N E"],
    mask: Bool[Array, "B 1 N N"] | None,
    keys: list[Key[Array, "*R"] | None],
    start: int,
    stop: int,
) -> Float[Array, "B N E"]:
    """Runs layers `start` to `stop` - 1 as one scanned layer over their stacked parameters."""
    layer = TransformerLayer(**options, parent=None)
    params = [tower.variables["params"][f"layer{n}"] for n in range(start, stop)]
    stacked_params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    present_keys = [key for key in keys[start:stop] if key is not None]
    stacked_keys = jnp.stack(present_keys) if present_keys else None

    def body(x: Array, scanned: tuple) -> tuple[Array, None]:
        params, key = scanned
        output: Any = layer.apply({"params": params}, x, mask, key)
        return output.x, None

    body = jax.checkpoint(body) if tower.remat else body
    return lax.scan(body, x, (stacked_params, stacked_keys))[0]
