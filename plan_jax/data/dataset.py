"""Datasets on disk: preparation by a TFDS builder, and random access to the records of a split."""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from plan_jax.data import schema
from plan_jax.data.builders.pairs import Pairs, PairsConfig
from plan_jax.data.builders.phantom import Phantom, PhantomConfig
from plan_jax.types import Record, UserError

# Name -> builder, configuration. A new dataset is one file under builders/ and one line here.
BUILDERS: dict[str, tuple[type, type]] = {
    "phantom": (Phantom, PhantomConfig),
    "pairs": (Pairs, PairsConfig),
}
DEFAULT_DATA_DIR = "~/.cache/plan_jax"
# The file that marks a prepared dataset: TFDS renames the folder when everything is written.
_INFO_FILE = "dataset_info.json"


# Access ---------------------------------------------------------------------------------------


class Dataset(Sequence):
    """Random access to the studies of one split.

    `dataset[i]` decodes a whole `Record`. `read_pair(i)` decodes only what training reads.
    """

    def __init__(
        self,
        source: Sequence[bytes],
        findings: Sequence[str] = (),
        anatomy_names: Sequence[str] = (),
        region_names: Sequence[str] = (),
        *,
        name: str = "",
        cache: bool = False,
    ):
        """Initialises a dataset.

        Args:
          source: serialised examples; a list of `schema.serialize(record)` will do.
          findings: names of the labels.
          anatomy_names: names of the anatomy masks.
          region_names: names of the boxes of regions.
          name: name of the dataset in messages.
          cache: keep decoded pairs in memory for the life of the process.
        """
        self.source = source
        self.findings = tuple(findings)
        self.anatomy_names = tuple(anatomy_names)
        self.region_names = tuple(region_names)
        self.name = name
        self._cache: dict[int, schema.Pair] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return schema.deserialize(self.source[index], self.anatomy_names)

    def read_pair(self, index: int) -> schema.Pair:
        """Returns image, text, labels and regions of a study; decodes nothing else."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        pair = schema.deserialize_pair(self.source[index])
        if self._cache is not None:
            # A change in place would be part of every later epoch.
            pair.image.setflags(write=False)
            self._cache[index] = pair
        return pair

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a cache of its own.
        return self.__dict__ | {"_cache": None if self._cache is None else {}}


def open_dataset(
    name: str, split: str, *, data_dir: str | None = None, cache: bool = False, **builder_config
) -> Dataset:
    """Opens a split of a dataset; prepares the dataset first if necessary.

    The dataset is in `data_dir/name/<hash of the builder's configuration>/<version>`, so another
    configuration is another folder.

    Args:
      name: `phantom` or `pairs`.
      split: name of a split, or a part of one, as `train[:50%]`.
      data_dir: folder of all datasets (None: ~/.cache/plan_jax).
      cache: keep decoded images and texts in memory.
      **builder_config: fields of the builder's configuration.

    Raises:
      UserError: for an unknown name, split or field of the configuration, and for mistakes in the
        builder's input.
    """
    builder = prepare_dataset(name, data_dir, builder_config)
    split_names = tuple(builder.info.splits)
    if split.split("[")[0] not in split_names:
        raise UserError(
            f"split {split!r} is not in dataset {name}; use one of {', '.join(split_names)}"
        )
    # `Dataset` decodes by itself: training decodes only a part of a record.
    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        source = builder.as_data_source(split, deserialize_method=raw_bytes)
    except (AssertionError, ValueError):  # of TFDS's parser of `[...]`
        raise UserError(
            f"split {split!r} cannot be read; write {split_names[0]} or {split_names[0]}[:50%]"
        ) from None
    metadata = builder.info.metadata
    return Dataset(
        source,
        metadata["findings"],
        metadata["anatomy"],
        metadata["regions"],
        name=name,
        cache=cache,
    )


def list_splits(name: str, *, data_dir: str | None = None, **builder_config) -> tuple[str, ...]:
    """Returns the names of the splits of a dataset; prepares the dataset first if necessary.

    Raises:
      UserError: as `open_dataset`.
    """
    return tuple(prepare_dataset(name, data_dir, builder_config).info.splits)


# Preparation ----------------------------------------------------------------------------------


def prepare_dataset(
    name: str, data_dir: str | None, fields: Mapping[str, Any]
) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset that is prepared, by this call or an earlier one.

    Raises:
      UserError: for an unknown dataset or field, and for mistakes in the builder's input.
    """
    config = make_builder_config(name, fields)
    config.name = _hash_builder_config(config)
    builder_class, _ = BUILDERS[name]
    root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    with _silence_tfds():
        builder = builder_class(config=config, data_dir=root)
        if not (Path(builder.data_dir) / _INFO_FILE).exists():
            _prepare_locked(builder)
            # A builder reads `info` from disk when it is created, so this one has no splits.
            builder = builder_class(config=config, data_dir=root)
    return builder


def make_builder_config(name: str, fields: Mapping[str, Any]) -> tfds.core.BuilderConfig:
    """Returns the checked configuration of a builder.

    Names and types are checked here against the configuration's dataclass, which checks its ranges
    in `__post_init__`.

    Raises:
      UserError: for an unknown dataset or field, a wrong type, or a value out of range.
    """
    if name not in BUILDERS:
        raise UserError(f"dataset {name!r} is unknown; use one of {', '.join(BUILDERS)}")
    _, config_class = BUILDERS[name]
    known_fields = {field.name: field for field in builder_fields(config_class)}
    values = {}
    for key, value in fields.items():
        if key not in known_fields:
            matches = difflib.get_close_matches(key, known_fields, 1)
            hint = f"did you mean {matches[0]}?" if matches else f"use {', '.join(known_fields)}"
            raise UserError(f"field {key!r} of dataset {name} is unknown; {hint}")
        values[key] = _check_type(name, known_fields[key], value)
    return config_class(name="", **values)


def builder_fields(config_class: type) -> list[dataclasses.Field]:
    """Returns the fields of a builder's configuration, without those that TFDS adds."""
    inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    return [field for field in dataclasses.fields(config_class) if field.name not in inherited]


def _check_type(name: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns a field's value, as a float where the field is one; raises if its type is wrong."""
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    accepted: Any
    accepted, description = {
        bool: (bool, "true or false"),
        int: (int, "an int"),
        float: (int | float, "a number"),
        str: (str, "a string"),
        tuple: (list | tuple, "a list"),
        dict: (Mapping, "a mapping"),
    }[type(default)]
    # True is an int in Python, but not a number of pixels.
    is_bool_mismatch = isinstance(value, bool) != isinstance(default, bool)
    if not isinstance(value, accepted) or is_bool_mismatch:
        raise UserError(
            f"field {field.name!r} of dataset {name} is {value!r}; it must be {description}"
        )
    return float(value) if isinstance(default, float) else value


def _hash_builder_config(config: tfds.core.BuilderConfig) -> str:
    """Returns the name of a configuration's folder, a hash of all that its records depend on.

    That is the configuration's `identity()` if it has one, else all of its fields.
    """
    if hasattr(config, "identity"):
        identity = config.identity()
    else:
        identity = {
            field.name: getattr(config, field.name) for field in builder_fields(type(config))
        }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _prepare_locked(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a dataset under a lock: of several processes one prepares it, the others wait.

    TFDS writes into a folder called `incomplete.*` and renames it at the end. A process that is
    killed leaves nothing that looks complete.
    """
    folder = Path(builder.data_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"data folder {folder.parent} cannot be written ({error.strerror}); use another one"
        ) from None
    with lock:
        # The system releases the lock of a process that dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _INFO_FILE).exists():  # another process prepared it while this one waited
            return
        # Under the lock, an incomplete folder belongs to a process that has died.
        for stale in [folder, *folder.parent.glob("incomplete.*")]:
            shutil.rmtree(stale, ignore_errors=True)
        print(f"preparing {builder.name} in {folder} ... ", end="", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            builder.download_and_prepare(file_format="array_record")
        except BaseException:  # a Ctrl-C too must end the line
            print("failed", file=sys.stderr, flush=True)
            raise
        sizes = ", ".join(
            f"{name} {info.num_examples}" for name, info in builder.info.splits.items()
        )
        print(f"{sizes}; {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        for message in getattr(builder, "messages", ()):
            print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _silence_tfds() -> Iterator[None]:
    """Silences TFDS's logs, prints and bars: `_prepare_locked` reports what a user needs."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
