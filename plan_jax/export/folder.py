"""A model folder: files that need no pickle and no orbax, each with its SHA-256.

`model.safetensors` holds the parameters in use, BatchNorm's statistics and the memory, under their
paths (`params/encoders/...`). `config.json` holds the run's config without paths of one machine,
`tokenizer.json` and `tokenizer_config.json` all that tokenises a text, `metrics.json` what was
measured and `README.md` the card. `checksums.json` lists all of them. A folder is written beside
its place and renamed, and only complete, unchanged files are read.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from plan_jax import parallel
from plan_jax.checkpoint.checksums import fingerprint
from plan_jax.config import PLACES, Config, DataConfig, ParallelConfig
from plan_jax.data.tokenizer import SAVED_BY, Tokenizer, encode_tokenizer, remove_folders
from plan_jax.logger import encode_json, report_write_errors, write_atomically
from plan_jax.types import UserError

# Raised whenever names of parameters or files change.
FORMAT = 1
LIBRARY = "plan_jax"
WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "checksums.json"
METRICS, CARD = "metrics.json", "README.md"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
REQUIRED = (CONFIG, WEIGHTS, *TOKENIZER)
DTYPES = ("float32", "float16")
PARTS = ("params", "batch_stats", "memory")
OLD = ".old"  # the end of the name of a model while it is replaced
MAX_WRITING_SECONDS = 86_400.0  # what is written for longer has lost its writer


# Writing -----------------------------------------------------------------------------------------


def encode_model(
    config: Config,
    variables: Mapping[str, PyTree],
    tokenizer: Tokenizer,
    *,
    dtype: str,
    step: int,
    about: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, bytes], str]:
    """Returns the files of a model but its card, and the fingerprint of its parameters.

    Args:
      config: the config of the run.
      variables: `params`, `batch_stats` and `memory`.
      tokenizer: the tokenizer of the model.
      dtype: float32, or float16 for parameters of half the size; the rest stays float32.
      step: updates that the parameters have seen.
      about: what the user states of the data and of licences.
      metrics: what was measured, by the name of the evaluation.

    Raises:
      UserError: `dtype` is unknown, or a parameter is too large for it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    tensors = _flatten(variables, dtype)
    # That of a saved model has the name of its folder in the config, and its own in the tokenizer.
    data = dataclasses.replace(config.data, tokenizer=tokenizer.name)
    config = dataclasses.replace(config, data=data)
    settings = {
        "library": LIBRARY,
        "format": FORMAT,
        "version": installed_version(),
        "dtype": dtype,
        "step": step,
        "about": dict(about),
        "config": remove_places(config),
    }
    files = {
        WEIGHTS: _encode_tensors(tensors),
        CONFIG: _encode_object(settings),
        METRICS: _encode_object(metrics),
    }
    files |= {name: text.encode() for name, text in encode_tokenizer(tokenizer).items()}
    return files, fingerprint(_unflatten(tensors)["params"])


def write_folder(folder: str | Path, files: Mapping[str, bytes], params_sha256: str) -> Path:
    """Writes a model folder; a model that was there is replaced as a whole.

    The old folder is renamed before the new one takes its name. A kill between these two renames
    leaves it beside its place, as `.<name>.<process>.old`, where `find_replaced` finds it.

    Raises:
      UserError: `folder` holds anything but a saved model, or cannot be written.
    """
    folder = Path(folder).resolve()  # a link to a folder stays a link
    check_replaceable(folder)
    number = f"{os.getpid()}-{threading.get_ident()}"  # of no other writer
    temporary = folder.with_name(f".{folder.name}.{number}.part")
    old = temporary.with_suffix(OLD)
    with report_write_errors(folder):
        try:
            temporary.mkdir(parents=True)
            for name, content in files.items():
                _write_file(temporary / name, content)
            _write_file(temporary / CHECKSUMS, _encode_checksums(_hash(files), params_sha256))
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                try:
                    temporary.rename(folder)
                except OSError:
                    old.rename(folder)
                    raise
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _delete_leftovers(folder)
    return folder


def _delete_leftovers(folder: Path) -> None:
    """Deletes what writers that were killed have left beside a model that is in its place."""
    for path in _list_beside(folder, OLD):
        shutil.rmtree(path, ignore_errors=True)
    for path in _list_beside(folder, ".part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > MAX_WRITING_SECONDS:
                shutil.rmtree(path)


def find_replaced(folder: Path) -> Path | None:
    """Returns the old model of a folder whose replacement was killed halfway, None if none was."""
    if os.path.exists(folder):
        return None
    folder = Path(os.path.realpath(folder)) if os.path.lexists(folder) else folder
    models = [path for path in _list_beside(folder, OLD) if is_model_folder(path)]
    return max(models, key=lambda path: path.stat().st_mtime, default=None)


def _list_beside(folder: Path, suffix: str) -> list[Path]:
    """Returns the folders beside a model that its writers have named with a suffix."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"[\d-]+" + re.escape(suffix))
    with contextlib.suppress(OSError, ValueError):  # of a name that no folder can have
        return [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]
    return []


def add_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Adds files to a model folder, by names that may contain folders, and lists their SHA-256.

    `checksums.json` is replaced last, so that a kill leaves a model that can be read.

    Raises:
      UserError: the folder holds no complete model, or cannot be written.
    """
    folder = Path(folder)
    if outside := [name for name in files if not _is_inside(name)]:
        raise UserError(f"file {outside[0]!r} is not a name inside {folder}; use a relative name")
    checksums = _read_checksums(folder)
    hashes, params_sha256 = checksums["files"], checksums["params_sha256"]
    if hashes.keys() & files.keys():  # what is about to be replaced counts no more
        hashes = {name: value for name, value in hashes.items() if name not in files}
        write_atomically(folder / CHECKSUMS, _encode_checksums(hashes, params_sha256))
    for name, content in files.items():
        with report_write_errors(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    hashes |= _hash(files)
    write_atomically(folder / CHECKSUMS, _encode_checksums(hashes, params_sha256))


def check_replaceable(folder: Path) -> None:
    """Raises UserError if a folder holds anything that is no part of a saved model."""
    with report_write_errors(folder):
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; pass the name of a new folder")
        if Path.cwd().is_relative_to(folder.resolve()):  # a shell would stay in what is renamed
            raise UserError(f"{folder} holds the working directory; pass another folder")
        first = min((path.name for path in folder.iterdir()), default="")
    if not first:
        return
    if not is_model_folder(folder):
        raise UserError(
            f"folder {folder} holds {first} and no model of plan_jax; pass a new folder"
        )
    # What Python compiles where `programs/reader.py` is imported is nobody's own.
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    names = {path.relative_to(folder).as_posix() for path in paths}
    known = {*_read_checksums(folder)["files"], CHECKSUMS}
    expected = known | {str(parent) for name in known for parent in PurePosixPath(name).parents}
    if others := names - expected:
        raise UserError(
            f"folder {folder} holds {min(others)} beside its model, which would be lost; move it,"
            " or pass a new folder"
        )


def remove_places(config: Config) -> dict[str, Any]:
    """Returns a config as nested dicts, without the paths of the machine that trained it.

    The folders of data and of programs get their defaults. Of another path only its last name
    stays, so that one can still see what the run was made of.
    """

    def replace(value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: replace(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item, name) for item in value]
        if not isinstance(value, str):
            return value
        is_place = name.removeprefix(".") in PLACES or (
            # No name on the hub has two of these; the file may have gone since it was read.
            name.startswith(".weights.") and value.count("/") > 1 and not value.startswith("hub:")
        )
        return _last_name(value) if is_place or _is_path(value) else value

    values = replace(config.to_dict())
    values["data"]["dir"] = DataConfig().dir
    values["data"]["tokenizer"] = remove_folders(config.data.tokenizer)
    values["parallel"]["cache"] = ParallelConfig().cache
    return values


def _is_path(value: str) -> bool:
    """Returns whether a string is a path here; `owner/name` and `package:NAME` are none."""
    kinds = (PurePosixPath(value), PureWindowsPath(value))
    if any(path.is_absolute() or ".." in path.parts for path in kinds) or value.startswith("~"):
        return True
    return "/" in value and os.path.exists(value)


def _last_name(value: str) -> str:
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _flatten(variables: Mapping[str, PyTree], dtype: str) -> dict[str, np.ndarray]:
    """Returns the arrays under their paths, [name] -> array of any shape, in `dtype`."""
    parts = {name: variables[name] for name in PARTS}
    tensors = {}
    for name, leaf in traverse_util.flatten_dict(parts, sep="/").items():
        array = np.asarray(leaf)
        # Statistics are few, and the memory may hold counts, which half precision cannot.
        if np.issubdtype(array.dtype, np.floating) and name.startswith("params/"):
            with np.errstate(over="ignore"):
                converted = array.astype(dtype)
            if np.isinf(converted).any() and np.isfinite(array).all():
                raise UserError(f"{name} has values too large for {dtype}; use dtype float32")
            array = converted
        tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
    return tensors


def _unflatten(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parts of a model from arrays of any shape under their paths, as float32 [...]."""
    tree: dict[str, Any] = {name: {} for name in PARTS}
    flat = {
        name: array.astype(np.float32) if array.dtype == np.float16 else array
        for name, array in tensors.items()
    }
    tree |= traverse_util.unflatten_dict(flat, sep="/")
    tree["params"].setdefault("method", {})  # of a method without parameters no name is left
    return tree


def _encode_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns arrays of any shape [...] as a safetensors file."""
    from safetensors.numpy import save

    return save(dict(tensors), metadata={"library": LIBRARY})


def _encode_object(value: Mapping[str, Any]) -> bytes:
    return (encode_json(value, indent=2, sort_keys=True) + "\n").encode()


def _hash(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _encode_checksums(hashes: Mapping[str, str], params_sha256: str) -> bytes:
    content = {"files": dict(hashes), "params_sha256": params_sha256}
    # With its own hash, so that a change in this file is not taken for one in another.
    own = hashlib.sha256(_encode_object(content)).hexdigest()
    return _encode_object(content | {"sha256": own})


def _write_file(path: Path, content: bytes) -> None:
    """Writes a file of a folder that has no name yet, down to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def installed_version() -> str:
    """Returns the version of plan_jax, "unknown" if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("plan_jax")
    return "unknown"


# Reading -----------------------------------------------------------------------------------------


def is_model_folder(folder: Path) -> bool:
    """Returns whether a folder holds a model of plan_jax, of any format and perhaps incomplete."""
    # A changed config still has to be recognised, to be reported.
    has_files = all((folder / name).is_file() for name in (CHECKSUMS, WEIGHTS))
    return has_files or read_object(folder / CONFIG).get("library") == LIBRARY


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the checked content of `config.json`: config, step, about, dtype and version.

    Raises:
      UserError: the folder is of another format, or a file is missing or not what was saved.
    """
    return _verify_folder(folder)[0]


def list_files(folder: Path) -> list[str]:
    """Returns the names of the files of a model folder, all of which are what was saved.

    Raises:
      UserError: the folder is of another format, or a file is missing or not what was saved.
    """
    _verify_folder(folder)
    return [*_read_checksums(folder)["files"], CHECKSUMS]


def read_folder(folder: Path) -> dict[str, Any]:
    """Returns the content of a model folder: its settings, `params`, `batch_stats` and `memory`.

    The arrays are float32, in whatever precision they were saved, or integers. `metrics` are those
    of `metrics.json`.

    Raises:
      UserError: the folder is of another format, or a file is missing or not what was saved.
    """
    settings, weights = _verify_folder(folder)
    tensors = _decode_tensors(weights, folder)
    metrics = read_object(folder / METRICS)
    metrics = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    return settings | _unflatten(tensors) | {"metrics": metrics}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays [...] of a model folder as they were saved, under their paths.

    Raises:
      UserError: the folder is of another format, or a file is missing or not what was saved.
    """
    return _decode_tensors(_verify_folder(folder)[1], folder)


def _decode_tensors(weights: bytes, folder: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is not a safetensors file ({error})") from None
    if foreign := [name for name in tensors if not re.match(f"({'|'.join(PARTS)})/", name)]:
        raise UserError(
            f"{folder / WEIGHTS} has an array {foreign[0]!r}, which no model of plan_jax has; save"
            " or download the model again"
        )
    return tensors


def _verify_folder(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the settings and the bytes of the weights, having checked every file.

    The card is for people, who may correct it: a change there is only reported.
    """
    settings = read_object(folder / CONFIG)
    number, version = settings.get("format"), settings.get("version", "unknown")
    if settings.get("library") == LIBRARY and number != FORMAT and isinstance(number, int):
        raise UserError(
            f"model {folder} was saved by plan_jax {version} in format {number}, and this version"
            f" reads format {FORMAT}; install that version"
        )
    hashes = _read_checksums(folder)["files"]
    weights = b""
    for name in dict.fromkeys([*REQUIRED, *hashes]):
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            if name not in REQUIRED:
                continue  # only what a model needs is fetched from the hub
            raise UserError(f"model {folder} has no {name}; save or download it again") from None
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror})") from None
        if hashlib.sha256(content).hexdigest() != hashes.get(name):
            sentence = f"{folder / name} is not the file that was saved"
            if name != CARD:
                raise UserError(f"{sentence}; save or download the model again")
            parallel.print_once(f"{sentence}; the model itself is unchanged")
        weights = content if name == WEIGHTS else weights
    _check_settings(settings, folder)
    return settings, weights


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError unless a folder says all that `encode_model` writes, and in its types.

    Hashes can be made to fit by whoever writes a folder. Its tokenizer must be one that is read
    without the classes, and the code, that a tokenizer of transformers may name.
    """
    types = {"config": dict, "about": dict, "step": int}
    wrong = [name for name, kind in types.items() if not isinstance(settings.get(name), kind)]
    if wrong or not all(isinstance(text, str) for text in settings["about"].values()):
        raise UserError(
            f"{folder / CONFIG} has no {wrong[0] if wrong else 'about'} as plan_jax writes it; save"
            " or download the model again"
        )
    if read_object(folder / TOKENIZER[1]).get("saved_by") != SAVED_BY:
        raise UserError(
            f"{folder / TOKENIZER[1]} was not written by plan_jax; save or download the model again"
        )


def _read_checksums(folder: Path) -> dict[str, Any]:
    """Returns the content of `checksums.json`.

    Raises:
      UserError: it is missing, changed, or names files outside of the folder.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        raise UserError(f"model {folder} has no {CHECKSUMS}; save or download it again")
    content = read_object(path)
    hashes, params_sha256 = content.get("files"), content.get("params_sha256")
    if not isinstance(hashes, dict) or path.read_bytes() != _encode_checksums(
        hashes, str(params_sha256)
    ):
        raise UserError(f"{path} is not the file that was saved; save or download the model again")
    if outside := [name for name in content["files"] if not _is_inside(name)]:
        raise UserError(f"{path} names {outside[0]!r}, which is not a file of its folder")
    return content


def _is_inside(name: str) -> bool:
    """Returns whether a name stays inside the folder that it is joined to."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) is not None


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
