"""Axis letters and the few types that every part of the library passes around.

Axis letters, the same in types, einops strings and docstrings:
B pairs; I, T images, texts; L token positions; W words; S sentences; P pixels of the feature map
(row-major over Y, X); Y, X, C rows, columns, channels; D shared embedding; E an encoder's own
width; K prototypes, queries or chosen words; F findings; R regions or boxes; N rounds or devices.

Masks are Bool and True means real.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

Params = PyTree[Array]
Memory = dict[str, Array]
Metrics = dict[str, Array]


class UserError(Exception):
    """A user's mistake: one sentence naming the thing, its value and the remedy; shown bare."""


@struct.dataclass
class Batch:
    """One batch of image-text pairs as the step sees it.

    `word_index` says to which word a piece belongs (-1: none), `word_id` names the word (0:
    padding) and `sentence` the sentence of each word (-1: padding); the data pipeline makes them.
    `extra` holds what a method names in its NEEDS: `labels` Int8[B F] in {-1, 0, 1} (-1: unknown),
    `regions` Float[B R 4] (x0, y0, x1, y1 as shares of the image, after it was moved; empty if
    lost) and `region_words` Bool[B R W], the words of the sentences about each region.
    """

    image: UInt8[Array, "B Y X 1"]
    tokens: Int[Array, "B L"]
    word_index: Int[Array, "B L"]
    word_id: Int[Array, "B W"]
    sentence: Int[Array, "B W"]
    extra: Mapping[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Features:
    """What a tower says of B images or texts, in the shared space, not normalised.

    For images `local` holds the P pixels of the feature map, row-major over `grid`; for texts the
    W words, with their `word_id` and `sentence`. `mask` is True where a local item is real. `fine`
    are the Q pixels of a finer map over `fine_grid`, where the tower gives one. `raw` are the local
    items before their head, and `attention` how much the tower's summary attends to each of them
    (mean over heads, words summed over their pieces; None for a ResNet).
    """

    pooled: Float[Array, "B D"]
    local: Float[Array, "B N D"]
    mask: Bool[Array, "B N"]
    word_id: Int[Array, "B N"] | None = None
    sentence: Int[Array, "B N"] | None = None
    fine: Float[Array, "B Q D"] | None = None
    raw: Float[Array, "B N E"] | None = None
    attention: Float[Array, "B N"] | None = None
    grid: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
    fine_grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Stages:
    """What a vision tower sees before any head of pre-training: what downstream heads begin from.

    `maps` go from the stem to the last stage, finest first; two may be of one size. A ViT has one,
    its patches; its `pooled` is the class token, that of a ResNet the mean of the last map.
    """

    pooled: Float[Array, "B E"]
    maps: tuple[Float[Array, "B _ _ _"], ...]


@dataclass(frozen=True)
class Tower:
    """A vision tower as a pure function of its `variables` (`params` and `batch_stats`).

    `apply(variables, images, train=False, native=False)` sees UInt8[B Y X 1] images and gives
    `Stages` and the new `batch_stats` (the old ones unless `train`); `native` leaves out a ResNet's
    upsampling to 299 pixels, as the published dense tasks do. `name` tells two towers apart.
    """

    name: str
    variables: Mapping[str, PyTree]
    apply: Callable[..., tuple[Stages, PyTree]]


@dataclass(frozen=True)
class Setting:
    """What a method has to know to make its own parameters.

    `dim` is the shared space's D, `width` the E of an image's `raw` pixels, and `tags` the features
    of the names of the dataset's F findings in the text tower as it was at the start.
    """

    dim: int
    width: int = 0
    tags: Float[Array, "F E"] | None = None


@dataclass(frozen=True)
class Phrase:
    """A phrase and where it is true in its image.

    `key` is its normalised meaning (`consolidation|left|lower`), `bare` the phrase without its
    place; the truth is `mask` if there is one, else the union of `boxes` (x0, y0, x1, y1; pixels).
    """

    text: str
    finding: int = -1
    key: str = ""
    bare: str = ""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Record:
    """One study with everything that is known of it; empty where nothing is known.

    `labels` Int8[F] and the boxes `regions` Float32[R 4] (x0, y0, x1, y1; pixels; zeros if unknown)
    are in the order of the dataset's `findings` and `region_names`.
    """

    image: np.ndarray
    text: str
    patient_id: str = ""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    phrases: tuple[Phrase, ...] = ()
    anatomy: Mapping[str, np.ndarray] = field(default_factory=dict)
    triplets: tuple[tuple[str, str, int], ...] = ()
    regions: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))


@dataclass(frozen=True)
class Model:
    """The verbs of a trained model: all that a task may know of it.

    `see` takes UInt8[N Y X 1] images and `read` a list of texts, any number; `similarity` compares
    all images with all texts, one Float[I T] for each kind (`global`, `local`, `both`); `heatmap`
    pairs item b with item b and gives Float[B W P] and word weights Float[B W], after `rounds`
    rounds of refinement (None: as the method was configured). `tower` is what `see` begins with.
    """

    name: str
    grid: tuple[int, int]
    rounds: int
    size: int
    see: Callable[[np.ndarray], Features]
    read: Callable[[list[str]], Features]
    similarity: Callable[[Features, Features], dict[str, np.ndarray]]
    heatmap: Callable[..., tuple[np.ndarray, np.ndarray]]
    config: Any = None
    tower: Tower | None = None
