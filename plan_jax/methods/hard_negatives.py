"""A loss that teaches any method to read: reports against false variants of themselves.

*Ours; the idea is that of NegCLIP (Yuksekgonul et al., arXiv 2210.01936)*, whose captions with
exchanged words are further negatives of their image. Here a variant contradicts the report in one
claim (`data.report_parser.rewriting`), and each image compares the two texts alone:

    L = mean_i d_i 1/|K| sum_{k in K} softplus((s_k(i, t'_i) - s_k(i, t_i)) / tau)

t_i is the report of image i and t'_i its variant, s_k the method's similarity of kind k, and d_i is
0 where a report has no variant, else 1. K are the kinds that the method computes, without `both`,
which is a sum of the others. Since s_k is what evaluation reads, no method needs code of its own.

Only the own image enters, so the work is linear in the batch, and devices exchange two numbers.

Deviation from training without variants, beside the loss: the text tower encodes both texts in one
batch, so that BatchNorm of text heads has the statistics of both.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from plan_jax.methods import contrastive
from plan_jax.types import Features, Memory, Method, Params


def variant_loss(
    method: Method,
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    variants: Features,
    differs: Bool[Array, " B"],
    hyper: Any,
    tau: float,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the loss of this device's pairs, and how often the report was ahead.

    Args:
      method, params, memory, hyper: the method, its parameters, memory and constants.
      images, texts, variants: features of B images, of their reports, and of the false variants.
      differs: d, whether a variant has other words than its report.
      tau: temperature.
      axis: the mapped device axis.

    Returns:
      The loss, and the share of the whole batch's reports with a variant that are ahead of it in
      the mean over kinds; 0 if none has one.
    """

    def compare(image: Features, text: Features, variant: Features) -> Float[Array, " K"]:
        one_image = jax.tree.map(lambda leaf: leaf[None], image)
        both_texts = jax.tree.map(lambda *leaves: jnp.stack(leaves), text, variant)
        tables = method.similarity(params, memory, one_image, both_texts, hyper)
        kinds = [kind for kind in sorted(tables) if kind != "both"]
        return jnp.stack([tables[kind][0, 1] - tables[kind][0, 0] for kind in kinds])

    excess_BK = jax.vmap(compare)(images, texts, variants)
    loss = jnp.mean(jax.nn.softplus(excess_BK / tau).mean(1) * differs)
    is_ahead = (excess_BK.mean(1) < 0) & differs
    counts = jnp.stack([is_ahead.sum(), differs.sum()]).astype(jnp.float32)
    num_ahead, count = contrastive.total(counts, axis)
    return loss, num_ahead / jnp.maximum(count, 1)
