"""Preparing a dataset: its folder, its lock, and one line on what is being done."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from plan_jax.types import UserError

NAMES = ("phantom", "pairs")


def prepared(name: str, data_dir: Path, config: dict[str, Any]) -> tfds.core.DatasetBuilder:
    """Return the builder of a dataset, prepared.

    Its folder is named by a hash of all fields of its configuration, or of `identity()` where the
    configuration has that: what the records depend on.

    Raises:
      UserError: for an unknown dataset or field, and what the builder finds wrong with its input.
    """
    if name == "phantom":
        from plan_jax.data.builders.phantom import Phantom as Builder
        from plan_jax.data.builders.phantom import PhantomConfig as Config
    elif name == "pairs":
        from plan_jax.data.builders.pairs import Pairs as Builder
        from plan_jax.data.builders.pairs import PairsConfig as Config
    else:
        raise UserError(f"dataset {name!r} is unknown; choose from {', '.join(NAMES)}")
    made = _configured(name, Config, config)
    with _quiet():
        builder = Builder(config=made, data_dir=data_dir)
        if not (Path(builder.data_dir) / "dataset_info.json").exists():
            _prepare(builder)
            builder = Builder(config=made, data_dir=data_dir)
    return builder


def _configured(name: str, kind: type, config: dict[str, Any]) -> tfds.core.BuilderConfig:
    """Make the configuration and name it by what the records depend on."""
    inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in inherited}
    checked = {}
    for key, value in config.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or [", ".join(fields)]
            raise UserError(f"field {key!r} of dataset {name} is unknown; did you mean {near[0]}?")
        checked[key] = _typed(f"field {key!r} of dataset {name}", value, fields[key])
    made = kind(name="", **checked)
    identity = made.identity() if hasattr(made, "identity") else None
    identity = identity or {field: getattr(made, field) for field in fields}
    told = json.dumps(identity, sort_keys=True, default=str)
    made.name = hashlib.sha256(told.encode()).hexdigest()[:12]
    return made


def _typed(what: str, value: Any, field: dataclasses.Field) -> Any:
    """Check that a value is of the kind of the field's default."""
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    kinds = {
        bool: (bool, "true or false"),
        int: (int, "a whole number"),
        float: (int | float, "a number"),
        str: (str, "a text"),
        tuple: (list | tuple, "a list"),
        dict: (Mapping, "a mapping"),
    }
    kind, told = kinds[type(default)]
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
        raise UserError(f"{what} is {value!r}; give {told}")
    return float(value) if isinstance(default, float) else value


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Prepare under a lock: of two processes one prepares, the other waits and finds it done."""
    folder = Path(builder.data_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"data folder {folder.parent} cannot be written ({error.strerror}); give another one"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "dataset_info.json").exists():
            return
        for stale in [folder, *folder.parent.glob("incomplete.*")]:
            shutil.rmtree(stale, ignore_errors=True)
        print(f"preparing {builder.name} in {folder} ... ", end="", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            builder.download_and_prepare(file_format="array_record")
        except BaseException:
            print("failed", file=sys.stderr, flush=True)
            raise
        sizes = ", ".join(f"{n} {s.num_examples}" for n, s in builder.info.splits.items())
        print(f"{sizes}; {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        for note in getattr(builder, "notes", ()):
            print(note, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from printing and drawing bars: `_prepare` says what there is to say."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
