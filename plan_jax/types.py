"""Axis letters, the data types that every part of the library passes around, and protocols.

Axis letters in types, einops strings and docstrings:
B pairs; I, T images, texts; L token positions; W words; S sentences; P pixels of the feature map
(row-major over Y, X); Y, X, C rows, columns, channels; D shared embedding; E an encoder's own
width; K prototypes, queries or sampled words; F findings; R regions or boxes; N rounds or devices.

Masks are Bool and True means real.
"""

import dataclasses
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    get_args,
    get_origin,
    runtime_checkable,
)

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

Params: TypeAlias = PyTree[Array]
Memory = dict[str, Array]
Metrics = dict[str, Array]


class UserError(Exception):
    """A user's mistake, in one sentence that names the thing, its value and the remedy."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows of the error, by a convention of IPython."""
        return [str(self)]


class DivergedError(UserError):
    """Training whose loss, gradient or weights are NaN or infinite; names what to try."""

    exit_code = 1


# One slash, since `Path("gs://bucket/run")` is `gs:/bucket/run`. A drive of Windows is one letter.
# Fsspec chains addresses, as simplecache::gs://bucket/run.
_ADDRESS = re.compile(r"(\w+::)*[a-z0-9][a-z0-9+.-]+:/", re.IGNORECASE)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is an address, as gs://bucket/run or host:/folder.

    >>> is_address("gs://bucket/run"), is_address("runs/demo")
    (True, False)
    """
    return _ADDRESS.match(os.fspath(path)) is not None


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raises UserError for an address as gs://bucket/run, which Path takes for a folder `gs:`.

    >>> check_local("workdir", "runs/demo")
    """
    address = os.fspath(path)
    if not is_address(address):
        return
    remedy = "pass a path on a local disk, or in a bucket that is mounted (gcsfuse)"
    if address.lower().startswith("http"):
        remedy = "download it, or name a model of the Hugging Face Hub as owner/name"
    raise UserError(f"{name} {address} is an address; {remedy}")


# Batches and features --------------------------------------------------------------------------


@struct.dataclass
class TextBatch:
    """Tokenised texts: word pieces, and the words and sentences that they belong to.

    `word_index` is the word slot of each piece (-1: none), `word_id` names the word in each slot
    (0: padding) and `sentence` is the sentence number of each word (-1: padding).
    """

    tokens: Int[Array, "B L"]
    word_index: Int[Array, "B L"]
    word_id: Int[Array, "B W"]
    sentence: Int[Array, "B W"]


@struct.dataclass
class Batch:
    """One batch of image-text pairs.

    `extra` holds what a method names in its REQUIRES: `labels` Int8[B F] in {-1, 0, 1} (-1:
    unknown), `regions` Float[B R 4] (x0, y0, x1, y1 as fractions of the image, after augmentation;
    a box without area where a region is absent) and `region_words` Bool[B R W], the words of the
    sentences about each region. `variant` holds a false variant of each text, or the text itself
    where it has none; None unless `config.hard_negatives` asks for it.
    """

    image: UInt8[Array, "B Y X 1"]
    text: TextBatch
    extra: Mapping[str, Array] = struct.field(default_factory=dict)
    variant: TextBatch | None = None


@struct.dataclass
class Features:
    """Encoder output for a batch of B images or texts: projected, not L2-normalised.

    For images `local` holds the P pixels of the feature map, row-major over `grid`; for texts the
    W words, with their `word_id` and `sentence`. `mask` is True where a local item is real. `fine`
    holds the Q pixels of a finer map over `fine_grid`, or is None. `guide` then holds the mean and
    the deviation of the image's grey values in each of them, on a scale of the image's own. `raw`
    holds the local items before projection, and `attention` how much the encoder's summary token
    attends to each of them (mean over heads, summed over the pieces of a word; None for a ResNet).
    `next_attention` is the attention to the pieces that follow those of each word, or None.
    """

    pooled: Float[Array, "B D"]
    local: Float[Array, "B N D"]
    mask: Bool[Array, "B N"]
    word_id: Int[Array, "B N"] | None = None
    sentence: Int[Array, "B N"] | None = None
    fine: Float[Array, "B Q D"] | None = None
    raw: Float[Array, "B N E"] | None = None
    attention: Float[Array, "B N"] | None = None
    next_attention: Float[Array, "B N"] | None = None
    guide: Float[Array, "B Q 2"] | None = None
    grid: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
    fine_grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    def select(self, names: Collection[str]) -> "Features":
        """Returns the arrays of these names; all others are None."""
        arrays = (item.name for item in dataclasses.fields(self) if "grid" not in item.name)
        others: dict[str, Any] = {name: None for name in arrays if name not in names}
        return dataclasses.replace(self, **others)


@struct.dataclass
class Stages:
    """Feature maps of an image tower before any projection: the input of downstream heads.

    `maps` go from the stem to the last stage, finest first; two may have the same size. A ViT has
    one map, its patches. `pooled` is the class token of a ViT and the mean of a ResNet's last map.
    """

    pooled: Float[Array, "B E"]
    maps: tuple[Float[Array, "B _ _ _"], ...]


@dataclass(frozen=True)
class Tower:
    """An image tower as a pure function of its `variables` (`params` and `batch_stats`).

    `apply(variables, images, train=False, native=False)` maps UInt8[B Y X 1] images to `Stages` and
    the new `batch_stats` (unchanged unless `train`). `native` omits a ResNet's upsampling to 299
    pixels, as the published dense tasks do. `name` identifies the weights.
    """

    name: str
    variables: Mapping[str, PyTree]
    apply: Callable[..., tuple[Stages, PyTree]]


def _refuse_to_save(*_: Any, **__: Any) -> Any:
    raise UserError("this model has no parameters of its own to save; load one by plan_jax.load")


def _refuse_to_identify() -> str:
    raise UserError("this model has no parameters of its own; load one by plan_jax.load")


def _refuse_to_ground(*_: Any, **__: Any) -> Any:
    raise UserError("this model has no config to read images by; load one by plan_jax.load")


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model as pure functions.

    `encode_image` takes UInt8[N Y X 1] images, in memory or as `heads.examples.StoredRows`, and
    `encode_text` a list of N texts. `similarity`
    compares all images with all texts and returns one Float[I T] for each kind (`global`, `local`,
    `both`). `heatmap` compares image b with text b and returns Float[B W P] maps and Float[B W]
    word weights, after `rounds` rounds of refinement (None: as the method was configured). `tower`
    is the image tower without projection heads. `save_pretrained(folder, ...)` writes a folder that
    `plan_jax.load` reads, and `push_to_hub("owner/name", ...)` uploads it; their options are those
    of `export.pretrained.Pretrained.save` and `push`. `pair_similarity` compares image b with text
    b and returns one Float[B] for each kind. `ground(image, text)` locates a phrase in an image,
    see `prediction.ground`. `identify()` returns the SHA-256 of the parameters, which the folder of
    a saved model and `metrics.json` have as `params_sha256`.
    """

    name: str
    grid: tuple[int, int]
    rounds: int
    size: int
    encode_image: Callable[[Any], Features]
    encode_text: Callable[[list[str]], Features]
    similarity: Callable[[Features, Features], dict[str, np.ndarray]]
    heatmap: Callable[..., tuple[np.ndarray, np.ndarray]]
    config: Any = None
    tower: Tower | None = None
    save_pretrained: Callable[..., Path] = _refuse_to_save
    push_to_hub: Callable[..., str] = _refuse_to_save
    tokenizer: Any = None
    pair_similarity: Callable[[Features, Features], dict[str, np.ndarray]] | None = None
    ground: Callable[..., Any] = _refuse_to_ground
    identify: Callable[[], str] = _refuse_to_identify

    def __repr__(self) -> str:
        """Returns one line, which a notebook shows, instead of all parameters and functions."""
        rows, columns = self.grid
        return f"Model({self.name!r}, images {self.size} x {self.size}, maps {rows} x {columns})"


# Records ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """A phrase and the part of its image where it is true.

    `key` is its normalised meaning (`consolidation|left|lower`) and `bare` the phrase without its
    location. The phrase is true inside `mask` if there is one, else inside the union of `boxes`
    (x0, y0, x1, y1; pixels).
    """

    text: str
    finding: int = -1
    key: str = ""
    bare: str = ""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Geometry:
    """Where the original of an image lies in it, after scaling and padding.

    A point (y, x) of the original is at `y * scale[0] + offset[0]`, `x * scale[1] + offset[1]`, in
    pixels from the top left. `shape` is the rows and columns of the original.
    """

    shape: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def to_original(self, boxes: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
        """Returns boxes (x0, y0, x1, y1) of the image in pixels of the original.

        >>> Geometry((40, 20), (0.5, 0.5), (0.0, 5.0)).to_original(np.asarray([[5.0, 0, 15, 20]]))
        array([[ 0.,  0., 20., 40.]])
        """
        offset = np.asarray([self.offset[1], self.offset[0]] * 2)
        return (boxes - offset) / np.asarray([self.scale[1], self.scale[0]] * 2)


@dataclass(frozen=True)
class Record:
    """One study with all its annotations; a field is empty where nothing is known.

    `labels` Int8[F] and the boxes `regions` Float32[R 4] (x0, y0, x1, y1; pixels; zeros if unknown)
    are in the order of the dataset's `findings` and `region_names`. `view` is one of
    `data.public.items.VIEWS`. `sections` are the parts of a report by name, from which `text` is
    made when a record is read. `geometry` says where the original image lies in `image`.
    """

    image: np.ndarray
    text: str
    patient_id: str = ""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    phrases: tuple[Phrase, ...] = ()
    anatomy: Mapping[str, np.ndarray] = field(default_factory=dict)
    triplets: tuple[tuple[str, str, int], ...] = ()
    regions: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    record_id: str = ""
    study_id: str = ""
    view: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)
    geometry: Geometry | None = None


class StoredRecords(Sequence[Record]):
    """Records on disk: each is decoded whenever it is accessed, and none is kept.

    Tasks read a list of `Record` in the same way, by `read_column`, `select_records` and
    `read_annotations`, and images by `heads.examples.open_images`. All images have one `shape` (Y,
    X).
    """

    shape: tuple[int, int]

    @abstractmethod
    def read_column(self, name: str) -> list[Any]:
        """Returns `labels` or a text of all records; decodes nothing else, and keeps it."""

    @abstractmethod
    def read_image(self, index: int) -> UInt8[np.ndarray, "Y X 1"]:
        """Returns the image [Y X 1] of a record; decodes nothing else."""

    @abstractmethod
    def read_annotations(self, index: int) -> Record:
        """Returns a record with a black image of the same shape, and decodes no image."""

    @abstractmethod
    def select(self, indices: Sequence[int]) -> "StoredRecords":
        """Returns the records at some indices."""

    @abstractmethod
    def augment(self, preset: str, draws: int, seed: int) -> "StoredRecords":
        """Returns all records `draws` times, one copy after the other, each image by its own draw.

        `preset` is a name of `data.augmentation.PRESETS`.
        """

    @abstractmethod
    def identify(self) -> str:
        """Returns a digest of the stored bytes of all records."""


def read_column(records: Sequence[Record], name: str) -> list[Any]:
    """Returns `labels` or a text of all records; where they are on disk, no image is decoded."""
    if isinstance(records, StoredRecords):
        return records.read_column(name)
    return [getattr(record, name) for record in records]


def select_records(records: Sequence[Record], indices: Sequence[int]) -> Sequence[Record]:
    """Returns the records at some indices."""
    if isinstance(records, StoredRecords):
        return records.select(indices)
    return [records[index] for index in indices]


def read_annotations(records: Sequence[Record]) -> Iterator[Record]:
    """Yields all records; where they are on disk, with black images, which are not decoded."""
    if not isinstance(records, StoredRecords):
        return iter(records)
    return (records.read_annotations(index) for index in range(len(records)))


# Methods ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodContext:
    """Facts that a method needs to initialise its own parameters.

    `dim` is D, the width of the shared space; `width` is E, the width of an image's `raw` pixels;
    `tags` are the features of the names of the dataset's F findings, encoded by the text tower at
    initialisation; `ema_decay` is the decay of the averaged model, 0 if there is none.
    """

    dim: int
    width: int = 0
    tags: Float[Array, "F E"] | None = None
    ema_decay: float = 0.0


@runtime_checkable
class Method(Protocol):
    """A pre-training method: a module with these names.

    `Hyper` is a frozen dataclass and the only home of the method's constants. `REQUIRES` names the
    entries of `Batch.extra` that the loss reads, `IMAGE_FEATURES` and `TEXT_FEATURES` the fields of
    `Features`. Training passes no others, so that none is stored or sent in vain. `axis` is the
    name of the mapped device axis, None on one device. A method that needs features of the
    dataset's findings also has `encode_tags(encode_names, findings)`, whose result becomes
    `MethodContext.tags`. One that reads shorter texts too has `shorten_texts(memory, text, hyper)`;
    their features come as `extra["concise"]`, with a gradient.
    """

    PAPER: str
    REQUIRES: tuple[str, ...]
    IMAGE_FEATURES: tuple[str, ...]
    TEXT_FEATURES: tuple[str, ...]
    Hyper: type

    def init(self, key: PRNGKeyArray, context: MethodContext, hyper: Any) -> tuple[Params, Memory]:
        """Returns the method's own parameters and its memory."""
        ...

    def similarity(
        self,
        params: Params,
        memory: Memory,
        images: Features,
        texts: Features,
        hyper: Any,
        axis: str | None = None,
    ) -> dict[str, Float[Array, "I T"]]:
        """Returns the similarity of all images with all texts, one table for each kind."""
        ...

    def heatmap(
        self, params: Params, memory: Memory, images: Features, texts: Features, hyper: Any
    ) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
        """Returns a map of each word over its own image, and the weight of each word."""
        ...

    def loss(
        self,
        params: Params,
        memory: Memory,
        images: Features,
        texts: Features,
        extra: dict[str, Any],
        *,
        key: PRNGKeyArray,
        step: Array,
        hyper: Any,
        axis: str | None = None,
    ) -> tuple[Float[Array, ""], tuple[Metrics, Memory]]:
        """Returns the loss of a batch, and its parts with the new memory."""
        ...


# Tasks ------------------------------------------------------------------------------------------

VARIANT_KINDS = ("laterality", "negation", "severity", "region")


class ReportVariant(NamedTuple):
    """A report that contradicts the original in one claim, and the findings about which it does.

    `part` is `stated` or `denied` for a negation, after what the report says, and else the kind, a
    member of `VARIANT_KINDS`.
    """

    text: str
    part: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """One entry of the metrics catalogue.

    A task's `METRICS` maps keys below the task to metrics. A key may contain a placeholder for one
    path segment, as `{share}/auroc_macro`, which `label` and `baselines` may repeat. `baselines`
    maps the label of a null baseline to its key, below the task too. A headline is shown in the
    summary tables. `higher_is_better` is False for errors and ranks. `undefined` says why a value
    may be NaN, as "no finding has both classes"; tables show it in place of the value.
    """

    label: str
    meaning: str
    digits: int = 3
    baselines: Mapping[str, str] = field(default_factory=dict)
    headline: bool = False
    higher_is_better: bool = True
    undefined: str = ""


@dataclass(frozen=True)
class ExampleScores:
    """The rows that a metric is computed from, one for each of N independent examples, as images.

    Two models that scored the same examples are compared pairwise by these rows. `names` identify
    the examples and what was asked of them. `statistic` is a name of
    `metrics.intervals.STATISTICS`; `compute_metric` there computes the metric from `table`.
    """

    names: Sequence[str]
    table: Float[np.ndarray, "N 2 F"]
    statistic: str = "mean"


@dataclass(frozen=True)
class Result:
    """The outcome of a task: flat metrics, examples for the page, and scores of single examples.

    `scores` has the same keys as `metrics`, for those metrics that can be compared pairwise.
    """

    metrics: dict[str, float]
    rows: Sequence[Any] = ()
    scores: Mapping[str, ExampleScores] = field(default_factory=dict)


@dataclass(eq=False)
class EvalData:
    """The records that a task reads: lists of `Record`, or `StoredRecords`.

    `test` are the evaluated records. `train` and `val` are those that heads are fitted to and
    selected on; where the dataset has no `val`, or it is evaluated itself, `val` is a share of the
    training patients. `validation` is the dataset's own `val`, or None. `prior_records` are the
    training records whose mean masks serve as baselines; empty if none are wanted. `prompts` maps a
    finding to its positive and negative prompts.
    """

    name: str = ""
    findings: tuple[str, ...] = ()
    test: Sequence[Record] = ()
    train: Sequence[Record] = ()
    val: Sequence[Record] = ()
    validation: Sequence[Record] | None = None
    prior_records: Sequence[Record] = ()
    prompts: Mapping[str, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskContext:
    """Facts about the run: the seed, the folder for fitted heads, and readers of reports.

    `label_report` maps a report to the findings it states (1) or denies (0), and `find_variants` a
    report and a kind of `VARIANT_KINDS` to false variants of it. `check_stop` raises an exception
    if the run has to stop; fits call it after each epoch.
    """

    seed: int = 0
    folder: Path | None = None
    label_report: Callable[[str], Mapping[str, int]] | None = None
    find_variants: Callable[[str, str], Sequence[ReportVariant]] | None = None
    check_stop: Callable[[], None] = lambda: None


@runtime_checkable
class Task(Protocol):
    """A downstream task: a module with these names.

    `Options` is a frozen dataclass that checks its ranges in `__post_init__`. `METRICS` is the
    task's part of the metrics catalogue and `TITLE` its name on the page. `FITS_HEAD` says whether
    the task trains a head, which is then also fitted to a tower of random weights on request.
    """

    TITLE: str
    FITS_HEAD: bool
    METRICS: Mapping[str, Metric]
    Options: type

    def requirements(self, options: Any) -> tuple[str, ...]:
        """Returns the names of the `Record` fields that at least one record must have."""
        ...

    def check(self, data: EvalData, options: Any) -> None:
        """Raises UserError if the data cannot support the task with these options."""
        ...

    def evaluate(self, model: Model, data: EvalData, options: Any, context: TaskContext) -> Result:
        """Returns the metrics of a model, with keys below the task, and examples for the page."""
        ...


def check_options(task: str, options: Any, minima: Mapping[str, int | float]) -> None:
    """Raises UserError if an option of a task is not among its choices, or below its minimum.

    The choices of an option are those of its `Literal` type; `minima` maps options to numbers. A
    `learning_rate` must be above 0 in every task.
    """
    for option in dataclasses.fields(options):
        name, value = f"config.eval.{task}.{option.name}", getattr(options, option.name)
        choices = get_args(option.type) if get_origin(option.type) is Literal else ()
        if choices and value not in choices:
            names = ", ".join(str(choice) for choice in choices)
            raise UserError(f"{name} is {value!r}; use one of {names}")
        # Written as `not >=`, so that NaN is refused too.
        if option.name in minima and not value >= minima[option.name]:
            raise UserError(f"{name} is {value}; use at least {minima[option.name]}")
        # A head that cannot learn would look like a poor encoder.
        if option.name == "learning_rate" and not value > 0:
            raise UserError(f"{name} is {value}; use a number above 0")


# Examples for the page ----------------------------------------------------------------------


@dataclass(frozen=True)
class PhraseExample:
    """A phrase in an image: its truth, and its heat maps after rounds 0..T on the model's grid.

    `kind` is how the example was selected: `best`, `random` or `worst`. `name` is that of the
    phrase in its data and of the protocol, the same for any model.
    """

    kind: str
    phrase: str
    image: UInt8[np.ndarray, "Y X 1"]
    truth: Bool[np.ndarray, "Y X"]
    heat_maps: Float[np.ndarray, "N y x"]
    cnr: float
    pointing: float
    name: str = ""


@dataclass(frozen=True)
class RetrievalExample:
    """An image, its own report, and the best-ranked reports as (text, score, is a hit).

    `rank` is the rank of its own report, or of one with the same words, among `num_candidates`.
    """

    image: UInt8[np.ndarray, "Y X 1"]
    text: str
    retrieved: tuple[tuple[str, float, bool], ...]
    rank: float
    num_candidates: int


@dataclass(frozen=True)
class MaskExample:
    """A segmented image: the true and the predicted mask of the target called `name`."""

    name: str
    image: UInt8[np.ndarray, "Y X 1"]
    truth: Bool[np.ndarray, "Y X"]
    predicted: Bool[np.ndarray, "Y X"]
    dice: float


@dataclass(frozen=True)
class BoxExample:
    """An image with its true and predicted boxes (x0, y0, x1, y1; pixels), best score first."""

    image: UInt8[np.ndarray, "Y X 1"]
    truth: Float[np.ndarray, "R 4"]
    predicted: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class ReportExample:
    """An image, its reference report and the generated one, and how their findings compare."""

    image: UInt8[np.ndarray, "Y X 1"]
    reference: str
    generated: str
    correct: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    invented: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A curve of a classifier: `kind` is `roc` or `calibration`; x and y are in [0, 1]."""

    kind: str
    name: str
    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
