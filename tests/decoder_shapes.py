"""Maps of given sizes, and the shapes of a decoder on them, for the tests of mask decoders."""

import jax
import jax.numpy as jnp
import numpy as np


def random_maps(*sizes, batch=2):
    """Maps of (side, channels), finest first."""
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(batch, n, n, c)), jnp.float32) for n, c in sizes)


def parameter_shapes(decoder, maps):
    """Shapes of a decoder's parameters and logits; nothing is computed."""
    variables = jax.eval_shape(decoder.init, jax.random.key(0), maps)
    return variables["params"], jax.eval_shape(decoder.apply, variables, maps).shape
