"""The bytes that the devices have to exchange in a step: what the algorithm needs at least.

Of the step, on each of N devices with b = B / N pairs (a number is a float32 of 4 bytes):

    all-reduce   every number of the trained parameters, for the gradients' mean
                 4 numbers for each channel of a BatchNorm: sum and squared deviation, and their
                 gradients; 2 more where an averaged model encodes the batch too

Of the method's loss, with texts of v numbers that images of other devices are compared with:

    all-gather      b v numbers, and for each text what has no gradient
    reduce-scatter  B v numbers: the gradients of these texts, summed at their owner
    all-reduce      2 numbers for each column of a table [b T], its maximum and its sum of
                    exponentials; those of the rows are complete on every device

    method   v           without gradient      columns                        other numbers
    convirt  D                                 B
    gloria   D + W D     W bytes (mask)        2 B
    mgca     D                                 B                              4 K S
    asg      D           F bytes (tags)        B
    place    D + M D     M bytes (mask)        2 B; match attn: B + B M
    plan     D + K D     4 K bytes (ids)       2 B + B K + T (B + B K)        3 B K

D is the width of the shared space and W the words of a text. MGCA: K prototypes, S iterations of
Sinkhorn, a maximum and a sum for both sides. ASG: F tags. PLACE: M sentences. PLAN: K sampled
words, T later rounds, the three sums of the words' margins; `progress="ema"` adds 4 K D bytes
without gradient. A sum of a few numbers, as for a mean loss, is left out.

With `contrast="sigmoid"` v loses D and the columns lose B, since texts travel around the ring:

    collective-permute  2 (N - 1) b D numbers: to N - 1 devices, and their gradients back

ASG's soft targets need both all the same. MGCA with `per_device` exchanges nothing of its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

NUMBER = 4  # bytes of a float32 or int32


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run that decide how much its devices exchange."""

    devices: int
    batch: int  # B, over all devices
    dim: int  # D, of the shared space
    max_words: int  # W
    num_parameters: int  # numbers in the trained parameters, whose gradients are averaged
    num_channels: int = 0  # of all BatchNorms together
    num_tags: int = 0  # F, of ASG
    has_teacher: bool = False  # whether an averaged model encodes the batch too


def read_sizes(config: Any, components: Any, state: Any, devices: int) -> Sizes:
    """Returns the sizes of a run from its `Config`, its `Components` and its `State`.

    Of the state only the shapes are read. Parameters without a gradient are left out: those that
    `optim.freeze` freezes, and heads whose features the method does not read.
    """
    unread = _unread_heads(components)
    encoders = _named_leaves(state.params["encoders"], unread)
    stats = _named_leaves(state.batch_stats, unread)
    trained = [leaf for name, leaf in encoders if not components.encoder.is_frozen(name)]
    tags = state.memory.get("tags")
    return Sizes(
        devices=devices,
        batch=config.batch,
        dim=config.embed_dim,
        max_words=config.data.max_words,
        num_parameters=_count([trained, state.params["method"]]),
        num_channels=_count([leaf for name, leaf in stats if name.endswith("/mean")]),
        num_tags=0 if tags is None else tags.shape[0],
        has_teacher=getattr(config.hyper, "progress", "") == "ema",
    )


def _unread_heads(components: Any) -> set[str]:
    """Returns the names of the heads whose features the method's loss does not read."""
    method, heads = components.method, components.encoder.heads
    reads_local = "local" in method.IMAGE_FEATURES or heads["image_global"] == "mean"
    is_read = {
        "image_local_head": reads_local,
        "image_fine_head": "fine" in method.IMAGE_FEATURES,
        "text_local_head": "local" in method.TEXT_FEATURES,
    }
    return {name for name, is_needed in is_read.items() if not is_needed}


def _named_leaves(tree: PyTree, unread: set[str]) -> list[tuple[str, Any]]:
    """Returns the leaves of the encoders' variables by path, without those of unread heads."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves]
    return [(name, leaf) for name, leaf in named if name.partition("/")[0] not in unread]


def _count(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def minimum_bytes(method: str, hyper: Any, sizes: Sizes) -> dict[str, int]:
    """Returns the least bytes that a device gives to the collectives of a training step, by kind.

    The kinds and the way of counting are those of `collectives.list_collectives`. One device
    exchanges nothing.
    """
    if sizes.devices == 1:
        return {}
    totals = loss_bytes(method, hyper, sizes)
    numbers = sizes.num_parameters + (4 + 2 * sizes.has_teacher) * sizes.num_channels
    totals["all-reduce"] = totals.get("all-reduce", 0) + NUMBER * numbers
    return totals


def loss_bytes(method: str, hyper: Any, sizes: Sizes) -> dict[str, int]:
    """Returns the part of `minimum_bytes` that is the method's loss and its gradient."""
    vector, constant, columns, numbers = _text_sizes(method, hyper, sizes)
    pairs, dim, permuted = sizes.batch // sizes.devices, sizes.dim, 0
    if getattr(hyper, "per_device", False):
        return {}
    if hyper.contrast == "sigmoid":
        permuted = 2 * (sizes.devices - 1) * pairs * dim
        if method != "asg":
            vector, columns = vector - dim, columns - 1
    totals = {
        "all-gather": pairs * (NUMBER * vector + constant),
        "reduce-scatter": NUMBER * sizes.batch * vector,
        "all-reduce": NUMBER * (sizes.batch * 2 * columns + numbers),
        "collective-permute": NUMBER * permuted,
    }
    return {kind: size for kind, size in totals.items() if size}


def _text_sizes(method: str, hyper: Any, sizes: Sizes) -> tuple[int, int, int, int]:
    """Returns a text's numbers v, its bytes without gradient, its columns, and other numbers."""
    dim, words = sizes.dim, sizes.max_words
    if method == "gloria":
        return dim + words * dim, words, 2, 0
    if method == "mgca":
        return dim, 0, 1, 4 * hyper.num_prototypes * hyper.sinkhorn_iterations
    if method == "asg":
        return dim, sizes.num_tags, 1, 0
    if method == "place":
        sentences = min(hyper.max_sentences, words)
        columns = 1 + (sentences if hyper.match == "attn" else 1)
        return dim + sentences * dim, sentences, columns, 0
    if method == "plan":
        count = min(hyper.num_sampled_words, words)
        constant = NUMBER * count * (1 + dim * (hyper.progress == "ema"))
        columns = 2 + count + hyper.rounds * (1 + count)
        return dim + count * dim, constant, columns, 3 * count * sizes.batch
    return dim, 0, 1, 0
