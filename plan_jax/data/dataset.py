"""Datasets on disk: preparation by a TFDS builder, and random access to the records of a split."""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
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
from plan_jax.data.sources import MESSAGES_FILE, SourceFiles
from plan_jax.types import Record, UserError

# Name -> builder, configuration. A new dataset is one file under builders/ and one line here.
BUILDERS: dict[str, tuple[type[tfds.core.DatasetBuilder], type[tfds.core.BuilderConfig]]] = {
    "phantom": (Phantom, PhantomConfig),
    "pairs": (Pairs, PairsConfig),
}
DEFAULT_DATA_DIR = "~/.cache/plan_jax"
# The file that marks a prepared dataset: TFDS renames the folder when everything is written.
_INFO_FILE = "dataset_info.json"
_METADATA_FILE = "metadata.json"  # names of findings, anatomy and regions
# What the system says of a disk that takes no more.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
# What it says of records that may be whole.
_PASSING_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
)
MANY_FILES = 1000  # so many that hashing them takes long enough to be announced


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
        folder: Path | None = None,
        fingerprint: str = "",
        cache: bool = False,
    ):
        """Initialises a dataset.

        Args:
          source: serialised examples; a list of `schema.serialize(record)` will do.
          findings: names of the labels.
          anatomy_names: names of the anatomy masks.
          region_names: names of the boxes of regions.
          name: name of the dataset in messages.
          folder: where the records are stored, for messages.
          fingerprint: digest of what the records were made from, see `open_dataset`.
          cache: keep decoded pairs in memory for the life of the process.
        """
        self.source = source
        self.findings = tuple(findings)
        self.anatomy_names = tuple(anatomy_names)
        self.region_names = tuple(region_names)
        self.name = name
        self.folder = folder
        self.fingerprint = fingerprint
        self._cache: dict[int, schema.Pair] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        with _name_damage(self.folder):
            return schema.deserialize(self.source[index], self.anatomy_names)

    def read_pair(self, index: int) -> schema.Pair:
        """Returns image, text, labels and regions of a study; decodes nothing else."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        with _name_damage(self.folder):
            pair = schema.deserialize_pair(self.source[index])
        if self._cache is not None:
            # A change in place would be part of every later epoch.
            pair.image.setflags(write=False)
            self._cache[index] = pair
        return pair

    def read_text(self, index: int) -> str:
        """Returns the text of a study; decodes nothing else."""
        with _name_damage(self.folder):
            return schema.deserialize_text(self.source[index])

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a cache of its own.
        return self.__dict__ | {"_cache": None if self._cache is None else {}}


def open_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    cache: bool = False,
    fingerprint: str = "",
    **builder_config,
) -> Dataset:
    """Opens a split of a dataset; prepares the dataset first if necessary.

    The dataset is in `data_dir/name/<hash of the builder's configuration>/<version>`, so another
    configuration is another folder. If the files that records were made from have another content
    now, they are prepared again in a folder of their own.

    Args:
      name: `phantom` or `pairs`.
      split: name of a split, or a part of one, as `train[:50%]`.
      data_dir: folder of all datasets (None: ~/.cache/plan_jax).
      cache: keep decoded images and texts in memory.
      fingerprint: digest that manifest and files must have; "" accepts any.
      **builder_config: fields of the builder's configuration.

    Raises:
      UserError: for an unknown name, split or field of the configuration, for mistakes in the
        builder's input, and for records that are damaged.
    """
    builder, actual_fingerprint = prepare_dataset(name, data_dir, builder_config)
    folder = Path(builder.data_dir)
    if fingerprint and fingerprint != actual_fingerprint:
        raise UserError(
            "the data are not those that the model was trained on: "
            f"{_explain_difference(builder, fingerprint)}; restore them, pass "
            "another --workdir for a new run, or accept them with --config.data.fingerprint=''"
        )
    with _name_damage(folder):
        # Without this file TFDS takes the names that are in the code, which are none.
        metadata = json.loads((folder / _METADATA_FILE).read_text("utf-8"))
        names = [metadata[field] for field in ("findings", "anatomy", "regions")]
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    listed_counts = ", ".join(f"{name} {count}" for name, count in counts.items())
    base = split.split("[")[0]
    if base not in counts:
        fraction = f"{base}_fraction"
        share = getattr(builder.builder_config, fraction, None)
        remedy = f"use one of {', '.join(counts)}"
        if share is not None and metadata["split_column"]:
            remedy = "add rows of that split, or evaluate another one"
        elif share is not None:
            remedy = (
                f"none of its {metadata['num_patients']} patients fell into {base} "
                f"with {fraction} {share:g}; add rows of that split in a column `split`, or raise "
                f"{fraction}"
            )
        raise UserError(
            f"split {split!r} is not in dataset {name}, which has {listed_counts}; {remedy}"
        )
    try:
        is_empty = builder.info.splits[split].num_examples == 0
    except (AssertionError, ValueError):  # of TFDS's parser of `[...]`
        raise UserError(f"split {split!r} cannot be read; write {base} or {base}[:50%]") from None
    if is_empty:
        raise UserError(f"split {split!r} has no rows; {base} of dataset {name} has {counts[base]}")
    # `Dataset` decodes by itself: training decodes only a part of a record.
    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    with _name_damage(folder):
        # The reader of bytes alone: a reader process must not build the dataset once more.
        source = builder.as_data_source(split, deserialize_method=raw_bytes).data_source
    return Dataset(
        source,
        *names,
        name=name,
        folder=folder,
        fingerprint=actual_fingerprint,
        cache=cache,
    )


def list_splits(name: str, *, data_dir: str | None = None, **builder_config) -> tuple[str, ...]:
    """Returns the names of the splits of a dataset; prepares the dataset first if necessary.

    Raises:
      UserError: as `open_dataset`.
    """
    builder_config.pop("fingerprint", None)
    builder, _ = prepare_dataset(name, data_dir, builder_config)
    return tuple(builder.info.splits)


@contextlib.contextmanager
def _name_damage(folder: Path | None) -> Iterator[None]:
    """Turns what goes wrong when the records in a folder are read into one sentence.

    Raises:
      UserError: the records cannot be read.
    """
    try:
        yield
    except Exception as error:  # readers and parsers raise many kinds
        if isinstance(error, UserError | MemoryError):
            raise
        place = f" in {folder}" if folder else ""
        if reason := _find_system_error(error, _PASSING_ERRORS):
            fault = f"cannot be read ({reason}); correct that, and repeat the command"
        else:
            fault = "are damaged; delete the folder, and the next run prepares it again"
        raise UserError(f"the prepared records{place} {fault}") from None


# Identity -------------------------------------------------------------------------------------


def _fingerprint(config: tfds.core.BuilderConfig, sources: SourceFiles | None) -> str:
    """Returns the digests of manifest and files, or "" if records are not made from files."""
    if sources is None:
        return ""
    return f"{config.identity()['manifest'][:12]}-{sources.digest[:12]}"


def _explain_difference(builder: tfds.core.DatasetBuilder, expected: str) -> str:
    """Returns what has another content than the data of the expected fingerprint."""
    folder, config = Path(builder.data_dir), builder.builder_config
    sources = _load_sources(folder, config)
    if sources is None:
        return f"dataset {builder.name} is not made from files"
    if expected.partition("-")[0] != _fingerprint(config, sources).partition("-")[0]:
        return f"manifest {config.manifest} has another content"
    for old_folder in _list_prepared(folder.parents[1], _hash_builder_config(config)):
        old = _load_sources(old_folder, config)
        if old is not None and _fingerprint(config, old) == expected:
            return f"{_shorten(sources.compare(old))} in {config.root} changed"
    return f"files in {config.root} have another content"


def _load_sources(folder: Path, config: tfds.core.BuilderConfig) -> SourceFiles | None:
    """Returns the files that records were made from; None if the builder reads none."""
    if not hasattr(config, "root"):
        return None
    with _name_damage(folder):
        return _UNSAVED.get(folder) or SourceFiles.load(folder)


# Files whose new state could not be written, as the folder is read-only: hash them once a process.
_UNSAVED: dict[Path, SourceFiles] = {}


def _find_changes(
    folder: Path, config: tfds.core.BuilderConfig, sources: SourceFiles | None
) -> list[str]:
    """Returns the paths of files that changed since the records in `folder` were made of them."""
    if sources is None:
        return []

    def announce(count: int) -> None:
        if count >= MANY_FILES:
            print(f"checking {count} files in {config.root}", file=sys.stderr, flush=True)

    before = sources.states
    changes = sources.find_changes(config.root, announce)
    if not changes and sources.states != before:
        try:
            sources.save(folder)
        except OSError:
            _UNSAVED[folder] = sources
    return changes


def _shorten(names: Sequence[str]) -> str:
    """Returns the first name, and how many there are besides."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


# Preparation ----------------------------------------------------------------------------------


def prepare_dataset(
    name: str, data_dir: str | None, fields: Mapping[str, Any]
) -> tuple[tfds.core.DatasetBuilder, str]:
    """Prepares a dataset, unless an earlier call did.

    Returns its builder, and the digest of manifest and files, "" if there are none.

    Raises:
      UserError: for an unknown dataset or field, for mistakes in the builder's input, and if the
        records cannot be read or written.
    """
    call = json.dumps([name, data_dir, fields], sort_keys=True, default=str)
    if _opened is not None and call in _opened:
        return _opened[call]
    config = make_builder_config(name, fields)
    key = _hash_builder_config(config)
    builder_class, _ = BUILDERS[name]
    root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    with _silence_tfds():
        prepared = _find_current(root / name, key, config) or _prepare_locked(root, key, config)
        folder, sources = prepared
        config.name = folder.parent.name
        # A builder reads `info` from disk when it is created.
        with _name_damage(folder):
            builder = builder_class(config=config, data_dir=root)
        opened = builder, _fingerprint(config, sources)
    _print_messages(folder)
    if _opened is not None:
        _opened[call] = opened
    return opened


@contextlib.contextmanager
def open_once() -> Iterator[None]:
    """During it, as during a run, a dataset is checked and its messages are printed once.

    So a file that changes while a model trains does not end the training.
    """
    global _opened
    if _opened is not None:
        yield
        return
    _opened = {}
    _reported.clear()
    try:
        yield
    finally:
        _opened = None


# Datasets that a run has opened; None outside of a run.
_opened: dict[str, tuple[tfds.core.DatasetBuilder, str]] | None = None


def _list_prepared(location: Path, key: str) -> list[Path]:
    """Returns the complete folders of a configuration: `<key>/<version>`, `<key>-2/<version>`."""
    builder_class, _ = BUILDERS[location.name]
    pattern = f"{key}*/{builder_class.VERSION}/{_INFO_FILE}"
    try:
        folders = [path.parent for path in location.glob(pattern)]
    except OSError:  # `_lock` says why there can be none
        folders = []
    return sorted(folders, key=lambda folder: (len(folder.parent.name), folder.parent.name))


def _find_current(
    location: Path, key: str, config: tfds.core.BuilderConfig
) -> tuple[Path, SourceFiles | None] | None:
    """Returns the folder whose records were made from the files as they are now, and the files.

    Returns None if there is no such folder.
    """
    for folder in reversed(_list_prepared(location, key)):
        sources = _load_sources(folder, config)
        if not _find_changes(folder, config, sources):
            return folder, sources
    return None


def _print_messages(folder: Path) -> None:
    """Prints what the builder had to say about the data, once in a run."""
    if folder in _reported:
        return
    _reported.add(folder)
    path = folder / MESSAGES_FILE
    if path.exists():
        with _name_damage(folder):
            print(path.read_text("utf-8"), end="", file=sys.stderr, flush=True)


_reported: set[Path] = set()  # folders whose messages are on the screen


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


def _prepare_locked(
    root: Path, key: str, config: tfds.core.BuilderConfig
) -> tuple[Path, SourceFiles | None]:
    """Prepares a dataset under a lock: of several processes one prepares it, the others wait.

    TFDS writes into a folder called `incomplete.*` and renames it at the end. A process that is
    killed leaves nothing that looks complete. Without locks every process writes a folder of its
    own, and the first that is complete counts.

    Returns the folder of the records, and the files that they were made from.
    """
    builder_class = next(kind for kind, fields in BUILDERS.values() if isinstance(config, fields))
    location = root / builder_class.name
    with _lock(location / key) as is_locked:
        if prepared := _find_current(location, key, config):  # while this process waited
            return prepared
        outdated = _list_prepared(location, key)
        _explain_outdated(outdated, _list_older(location, key, config), config)
        names = {folder.parent.name for folder in outdated}
        config.name = next(
            name
            for name in (key if number == 1 else f"{key}-{number}" for number in itertools.count(1))
            if name not in names
        )
        folder = location / config.name / str(builder_class.VERSION)
        if is_locked:  # so an incomplete folder belongs to a process that has died
            for stale in [folder, *folder.parent.glob("incomplete.*")]:
                shutil.rmtree(stale, ignore_errors=True)
        print(
            f"preparing {builder_class.name} in {folder} ... ", end="", file=sys.stderr, flush=True
        )
        start = time.monotonic()
        builder = builder_class(config=config, data_dir=root)
        if hasattr(config, "root"):
            builder.info.metadata["origin"] = _hash_origin(config)
        try:
            builder.download_and_prepare(file_format="array_record")
        except BaseException as error:  # a Ctrl-C too must end the line
            print("failed", file=sys.stderr, flush=True)
            if not is_locked and (prepared := _find_current(location, key, config)):
                return prepared  # another process was faster
            if reason := _find_system_error(error, (*_DISK_ERRORS, *_PASSING_ERRORS)):
                raise UserError(
                    f"data folder {folder.parent} cannot be written ({reason}); "
                    f"{_describe_disk(location)}, or set config.data.dir to another folder"
                ) from None
            raise
        sizes = ", ".join(
            f"{name} {info.num_examples}" for name, info in builder.info.splits.items()
        )
        print(f"{sizes}; {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        _reported.discard(folder)
        return folder, _load_sources(folder, config)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Locks a folder, which is created if necessary; yields whether its drive has locks.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"data folder {folder} cannot be written ({error.strerror}); "
            "set config.data.dir to another folder"
        ) from None
    with lock:
        is_locked = True
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"waiting for another process that prepares {folder}"
                print(message, file=sys.stderr, flush=True)
                # The system releases the lock of a process that dies.
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network drives have no locks
            is_locked = False
            print(
                f"data folder {folder} has no locks ({error.strerror}); it is prepared without",
                file=sys.stderr,
                flush=True,
            )
        yield is_locked


def _hash_origin(config: tfds.core.BuilderConfig) -> str:
    """Returns a hash of where a manifest is and how it is read, whatever its content is."""
    place = os.path.abspath(Path(config.manifest).expanduser())
    text = json.dumps(config.identity() | {"manifest": place}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _list_older(location: Path, key: str, config: tfds.core.BuilderConfig) -> list[Path]:
    """Returns the folders of records that were made from an earlier content of the manifest."""
    folders = []
    if hasattr(config, "root"):
        for path in sorted(location.glob(f"*/*/{_METADATA_FILE}")):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                origin = json.loads(path.read_text("utf-8")).get("origin")
                if origin == _hash_origin(config) and path.parts[-3].partition("-")[0] != key:
                    folders.append(path.parent)
    return folders


def _explain_outdated(
    folders: Sequence[Path], older: Sequence[Path], config: tfds.core.BuilderConfig
) -> None:
    """Prints why records are prepared again, and how to free the space of the old ones.

    Args:
      folders: the records of the same manifest, of which files have changed.
      older: the records of an earlier content of the manifest.
      config: the builder's configuration.
    """
    unused = [*folders, *older]
    if not unused:
        return
    changed = f"manifest {config.manifest}"
    if folders:
        changes = _find_changes(folders[-1], config, _load_sources(folders[-1], config))
        changed = f"{_shorten(changes)} in {config.root}"
    size = sum(file.stat().st_size for folder in unused for file in folder.rglob("*"))
    print(
        f"{changed} changed since the records were prepared; to free {size / 1e6:.1f} MB, "
        f"delete {', '.join(str(folder.parent) for folder in unused)}",
        file=sys.stderr,
        flush=True,
    )


def _find_system_error(error: BaseException | None, numbers: Sequence[int]) -> str:
    """Returns what the system says, if that is behind an error, or ""."""
    while error is not None:
        for number in numbers:
            # Libraries in C++ pass on the words only.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


def _describe_disk(location: Path) -> str:
    """Returns the remedy for a disk that takes no more."""
    try:
        free = shutil.disk_usage(location).free
    except OSError:
        return "free the disk"
    return f"free the disk, which has {free / 1e6:.1f} MB left"


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
