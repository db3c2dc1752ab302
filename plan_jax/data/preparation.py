"""Preparation of datasets by TFDS builders: once, under a lock, and again when files change."""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from plan_jax.data import remote
from plan_jax.data.builders.brax import Brax, BraxConfig
from plan_jax.data.builders.chest_imagenome import ChestImagenome, ChestImagenomeConfig
from plan_jax.data.builders.chestx_det import ChestxDet, ChestxDetConfig
from plan_jax.data.builders.chexpert import Chexpert, ChexpertConfig
from plan_jax.data.builders.chexpert_plus import ChexpertPlus, ChexpertPlusConfig
from plan_jax.data.builders.covidx import Covidx, CovidxConfig
from plan_jax.data.builders.jsrt import Jsrt, JsrtConfig
from plan_jax.data.builders.mimic_cxr import MimicCxr, MimicCxrConfig
from plan_jax.data.builders.montgomery import Montgomery, MontgomeryConfig
from plan_jax.data.builders.ms_cxr import MsCxr, MsCxrConfig
from plan_jax.data.builders.nih_cxr14 import NihCxr14, NihCxr14Config
from plan_jax.data.builders.object_cxr import ObjectCxr, ObjectCxrConfig
from plan_jax.data.builders.openi import Openi, OpeniConfig
from plan_jax.data.builders.padchest import Padchest, PadchestConfig
from plan_jax.data.builders.padchest_gr import PadchestGr, PadchestGrConfig
from plan_jax.data.builders.pairs import Pairs, PairsConfig
from plan_jax.data.builders.phantom import Phantom, PhantomConfig
from plan_jax.data.builders.rexgradient import Rexgradient, RexgradientConfig
from plan_jax.data.builders.rsna_pneumonia import RsnaPneumonia, RsnaPneumoniaConfig
from plan_jax.data.builders.shenzhen import Shenzhen, ShenzhenConfig
from plan_jax.data.builders.siim_pneumothorax import SiimPneumothorax, SiimPneumothoraxConfig
from plan_jax.data.builders.tbx11k import Tbx11k, Tbx11kConfig
from plan_jax.data.builders.vindr_cxr import VindrCxr, VindrCxrConfig
from plan_jax.data.faults import DISK_ERRORS, find_system_error, name_damage
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.sources import MESSAGES_FILE, DigestCache, SourceFiles
from plan_jax.data.tfds import tfds
from plan_jax.storage import cache_folder, find_place
from plan_jax.types import UserError, check_local

# Name -> builder, configuration. A new dataset is one file under builders/ and one line here.
BUILDERS: dict[str, tuple[type[tfds.core.DatasetBuilder], type[tfds.core.BuilderConfig]]] = {
    "phantom": (Phantom, PhantomConfig),
    "pairs": (Pairs, PairsConfig),
    "brax": (Brax, BraxConfig),
    "chest_imagenome": (ChestImagenome, ChestImagenomeConfig),
    "chexpert": (Chexpert, ChexpertConfig),
    "chexpert_plus": (ChexpertPlus, ChexpertPlusConfig),
    "mimic_cxr": (MimicCxr, MimicCxrConfig),
    "ms_cxr": (MsCxr, MsCxrConfig),
    "nih_cxr14": (NihCxr14, NihCxr14Config),
    "rsna_pneumonia": (RsnaPneumonia, RsnaPneumoniaConfig),
    "siim_pneumothorax": (SiimPneumothorax, SiimPneumothoraxConfig),
    "padchest": (Padchest, PadchestConfig),
    "padchest_gr": (PadchestGr, PadchestGrConfig),
    "openi": (Openi, OpeniConfig),
    "jsrt": (Jsrt, JsrtConfig),
    "montgomery": (Montgomery, MontgomeryConfig),
    "shenzhen": (Shenzhen, ShenzhenConfig),
    "tbx11k": (Tbx11k, Tbx11kConfig),
    "rexgradient": (Rexgradient, RexgradientConfig),
    "covidx": (Covidx, CovidxConfig),
    "object_cxr": (ObjectCxr, ObjectCxrConfig),
    "vindr_cxr": (VindrCxr, VindrCxrConfig),
    "chestx_det": (ChestxDet, ChestxDetConfig),
}
DEFAULT_DATA_DIR = "~/.cache/plan_jax"
# The file that marks a prepared dataset: TFDS renames the folder when everything is written.
_INFO_FILE = remote.INFO_FILE
METADATA_FILE = "metadata.json"  # names of findings, anatomy and regions
MANY_FILES = 1000  # so many that hashing them takes long enough to be announced


# Preparation ----------------------------------------------------------------------------------


def prepare_dataset(
    name: str, data_dir: str | None, fields: Mapping[str, Any]
) -> tuple[tfds.core.DatasetBuilder, str]:
    """Prepares a dataset, unless an earlier call did.

    Returns its builder, and the digest of manifest and files, "" if there are none. A data folder
    at an address, as gs://bucket/data, has a copy on this machine, from which records are read.

    Raises:
      UserError: for an unknown dataset or field, for mistakes in the builder's input, and if the
        records cannot be read or written.
    """
    place = find_place("data folder", data_dir or "")
    call = json.dumps([name, data_dir, fields], sort_keys=True, default=str)
    if _opened is not None and call in _opened:
        return _opened[call]
    config = make_builder_config(name, fields)
    key = _hash_builder_config(config)
    builder_class, _ = BUILDERS[name]
    if place is None:
        root = Path(data_dir or DEFAULT_DATA_DIR).expanduser()
    else:
        root = cache_folder("data", place.address)
    with _silence_tfds():
        if place is not None:
            with _lock(root / name / key):
                remote.fetch_records(place, root, f"{name}/{key}", str(builder_class.VERSION))
        prepared, _ = _find_current(root / name, key, config)
        folder, sources = prepared or _prepare_locked(root, key, config)
        if place is not None:
            remote.upload_records(place, root, folder)
        config.name = folder.parent.name
        # A builder reads `info` from disk when it is created.
        with name_damage(folder):
            builder = builder_class(config=config, data_dir=root)
        opened = builder, _fingerprint(config, sources)
    _print_messages(folder)
    if _opened is not None:
        _opened[call] = opened
    return opened


def check_dataset(name: str, fields: Mapping[str, Any]) -> list[str]:
    """Reads all of a public dataset but its images; returns the lines of the summary.

    Raises:
      UserError: for a dataset that is not public, or for mistakes in its tables.
    """
    expect_public(name)
    config = make_builder_config(name, fields)
    builder_class, _ = BUILDERS[name]
    with _silence_tfds(), tempfile.TemporaryDirectory() as folder:
        config.name = "check"
        return builder_class(config=config, data_dir=folder).check()


def expect_public(name: str) -> None:
    """Raises UserError if there is no public dataset of that name."""
    names = [name for name, (kind, _) in BUILDERS.items() if issubclass(kind, PublicBuilder)]
    if name not in names:
        matches = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {matches[0]}?" if matches else f"use one of {', '.join(names)}"
        raise UserError(f"public dataset {name!r} is unknown; {hint}")


def list_facts() -> list[Facts]:
    """Returns the facts of all public datasets."""
    return [kind.facts for kind, _ in BUILDERS.values() if issubclass(kind, PublicBuilder)]


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
) -> tuple[tuple[Path, SourceFiles | None] | None, list[str]]:
    """Finds the folder whose records were made from the files as they are now.

    Returns the folder and the files, or None if there is no such folder; and the paths of files
    that changed since the newest records were made.
    """
    folders = _list_prepared(location, key)
    all_changes: list[list[str]] = []
    for folder in reversed(folders):
        sources = _load_sources(folder, config)
        all_changes.append(_find_changes(location, config, sources))
        if not all_changes[-1]:
            return (folder, sources), all_changes[0]
    return None, all_changes[0] if all_changes else []


def _print_messages(folder: Path) -> None:
    """Prints what the builder had to say about the data, once in a run."""
    if folder in _reported:
        return
    _reported.add(folder)
    path = folder / MESSAGES_FILE
    if path.exists():
        with name_damage(folder):
            print(path.read_text("utf-8"), end="", file=sys.stderr, flush=True)


_reported: set[Path] = set()  # folders whose messages are on the screen


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
        prepared, changes = _find_current(location, key, config)
        if prepared:  # while this process waited
            return prepared
        outdated = _list_prepared(location, key)
        _explain_outdated(outdated, changes, _list_earlier(location, key, config), config)
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
        # A public dataset shows a progress bar below this line.
        is_public = isinstance(config, PublicConfig)
        end = "\n" if is_public else ""
        print(
            f"preparing {builder_class.name} in {folder} ... ", end=end, file=sys.stderr, flush=True
        )
        start = time.monotonic()
        builder = builder_class(config=config, data_dir=root)
        if hasattr(config, "manifest"):
            builder.info.metadata["origin"] = _hash_origin(config)
        try:
            builder.download_and_prepare(file_format="array_record")
        except BaseException as error:  # a Ctrl-C too must end the line
            if not is_public:
                print("failed", file=sys.stderr, flush=True)
            if not is_locked and (prepared := _find_current(location, key, config)[0]):
                return prepared  # another process was faster
            if isinstance(error, UserError):  # it may quote what the system says of an image
                raise
            if reason := find_system_error(error, DISK_ERRORS):
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
        if isinstance(builder, PublicBuilder):  # its messages are a part of the summary
            print("\n".join(builder.summary), file=sys.stderr, flush=True)
            _reported.add(folder)
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


def _list_earlier(location: Path, key: str, config: tfds.core.BuilderConfig) -> list[Path]:
    """Returns the folders of records that were made from an earlier content of the manifest."""
    folders = []
    if hasattr(config, "manifest"):
        for path in sorted(location.glob(f"*/*/{METADATA_FILE}")):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                origin = json.loads(path.read_text("utf-8")).get("origin")
                if origin == _hash_origin(config) and path.parts[-3].partition("-")[0] != key:
                    folders.append(path.parent)
    return folders


def _explain_outdated(
    folders: Sequence[Path],
    changes: Sequence[str],
    earlier_folders: Sequence[Path],
    config: tfds.core.BuilderConfig,
) -> None:
    """Prints why records are prepared again, and how to free the space of the old ones.

    Args:
      folders: the records of the same manifest, of which files have changed.
      changes: the files that have changed since the last of them were made.
      earlier_folders: the records of an earlier content of the manifest.
      config: the builder's configuration.
    """
    old_folders = [*folders, *earlier_folders]
    if not old_folders:
        return
    if folders:
        if not changes:  # another process has just prepared them, on a drive without locks
            return
        changed = f"{_shorten(changes)} in {config.root}"
    else:
        changed = f"manifest {config.manifest}"
    size = 0
    with contextlib.suppress(OSError):  # the user may be deleting them
        for path in (path for folder in old_folders for path in folder.rglob("*")):
            size += path.stat().st_size
    print(
        f"{changed} changed since the records were prepared; to free {size / 1e6:.1f} MB, "
        f"delete {', '.join(str(folder.parent) for folder in old_folders)}",
        file=sys.stderr,
        flush=True,
    )


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


# Identity -------------------------------------------------------------------------------------


def _fingerprint(config: tfds.core.BuilderConfig, sources: SourceFiles | None) -> str:
    """Returns the digests of manifest and files, or "" if records are not made from files."""
    if sources is None:
        return ""
    return f"{config.digest()}-{sources.digest[:12]}"


def explain_difference(builder: tfds.core.DatasetBuilder, expected: str) -> str:
    """Returns what has another content than the data of the expected fingerprint."""
    folder, config = Path(builder.data_dir), builder.builder_config
    sources = _load_sources(folder, config)
    if sources is None:
        return f"dataset {builder.name} is not made from files"
    if expected.partition("-")[0] != config.digest():
        if isinstance(config, PublicConfig):
            return f"dataset {builder.name} was prepared with other options"
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
    with name_damage(folder):
        return SourceFiles.load(folder)


# Digests that could not be written anywhere, by location and root: hash files once a process.
_UNSAVED: dict[tuple[Path, Path], DigestCache] = {}


def _find_changes(
    location: Path, config: tfds.core.BuilderConfig, sources: SourceFiles | None
) -> list[str]:
    """Returns the paths of files that changed since records in `location` were made of them."""
    if sources is None or (isinstance(config, PublicConfig) and not config.is_present()):
        return []

    def announce(count: int) -> None:
        if count >= MANY_FILES:
            print(f"checking {count} files in {config.root}", file=sys.stderr, flush=True)

    place = (location, config.root)
    # Records may be on a read-only drive.
    folders = [location, Path(DEFAULT_DATA_DIR).expanduser()]
    cache = _UNSAVED.pop(place, None) or DigestCache(config.root, folders)
    changes = sources.find_changes(cache, announce)
    if not cache.save():
        _UNSAVED[place] = cache
    return changes


def _shorten(names: Sequence[str]) -> str:
    """Returns the first name, and how many there are besides."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


# Configuration of a builder --------------------------------------------------------------------


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


def parse_fields(name: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of a builder's configuration that a command line sets as texts.

    Raises:
      UserError: for an unknown dataset or field, or a text that is not of its type.
    """
    expect_public(name)
    _, config_class = BUILDERS[name]
    kinds = {field.name: type(_find_default(field)) for field in builder_fields(config_class)}
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        kind = kinds.get(key, str)  # `make_builder_config` says which fields there are
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False}[text.lower()]
            elif kind is tuple:
                values[key] = tuple(text.split(","))
            else:
                values[key] = kind(text)
        except (KeyError, ValueError):
            raise UserError(
                f"field {key!r} of dataset {name} is {text!r}; it must be {_DESCRIPTIONS[kind][1]}"
            ) from None
    return values


def _find_default(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def builder_fields(config_class: type) -> list[dataclasses.Field]:
    """Returns the fields of a builder's configuration, without those that TFDS adds."""
    inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    return [field for field in dataclasses.fields(config_class) if field.name not in inherited]


# Type of a field's default -> what its value may be, and how a message calls it.
_DESCRIPTIONS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "an int"),
    float: (int | float, "a number"),
    str: (str, "a string"),
    tuple: (list | tuple, "a list"),
    dict: (Mapping, "a mapping"),
}


def _check_type(name: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns a field's value, as a float where the field is one; raises if its type is wrong."""
    default = _find_default(field)
    accepted, description = _DESCRIPTIONS[type(default)]
    # True is an int in Python, but not a number of pixels.
    is_bool_mismatch = isinstance(value, bool) != isinstance(default, bool)
    if not isinstance(value, accepted) or is_bool_mismatch:
        raise UserError(
            f"field {field.name!r} of dataset {name} is {value!r}; it must be {description}"
        )
    if isinstance(value, str):
        check_local(f"field {field.name!r} of dataset {name}", value)
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
