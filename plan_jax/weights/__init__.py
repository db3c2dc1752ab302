"""Published weights into our towers: read them, rename them, check every array, or load nothing.

Reading needs no torch for safetensors; files of torch are read as tensors only (`weights_only`), so
that no code in them runs. The names are in `layouts.py`.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree, Shaped

from plan_jax.types import UserError
from plan_jax.weights.convert import adapt, check, flat, rebuilt, renamed
from plan_jax.weights.layouts import HEADS, KINDS, OWN, Layout, recognise
from plan_jax.weights.sources import PACKAGE, in_package

TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "student")
GIVE = "give a folder with config.json, a .safetensors or torch file, a hub id, or package:NAME"
_OTHER_FLOATS = ("bfloat16", "float16", "float64")
_BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
State = dict[str, Shaped[np.ndarray, "..."]]


def locate(source: str) -> Path:
    """Find the file or folder that `source` names; what the hub has is fetched into its cache.

    Raises:
      UserError: if there is none.
    """
    if source.startswith(PACKAGE):
        return in_package(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    a_file = path.suffix in (".safetensors", *TORCH_FILES)
    if a_file or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"weights {source} do not exist; {GIVE}")
    return _from_hub(source)


def _from_hub(name: str) -> Path:
    """Fetch a model's config and weights, or find them in the cache; safetensors if it has them."""
    from huggingface_hub import constants, snapshot_download  # 0.3 s, and only here

    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["config.json", "pytorch_model.bin"])
    except Exception as error:  # the hub raises many kinds
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(". ")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else reason
        raise UserError(
            f"weights {name!r} are no file or folder here and in no cache of the hub, which "
            f"gave none ({reason}); run `hf download {name}` where there is a network, and give "
            "the folder that it names"
        ) from None
    return folder


def read_state(source: str) -> State:
    """Read all arrays of `source` by their names in the file; half precision becomes float32.

    `source` is a Hugging Face folder (config.json with model.safetensors, its shards, or
    pytorch_model.bin), a hub id, a .safetensors or torch file, or `package:NAME`, the model folder
    inside an installed distribution. A training checkpoint gives what is in its `state_dict` or
    `model`.

    Raises:
      UserError: if it does not exist, is damaged, needs torch, or holds no arrays.
    """
    path = locate(source)
    if path.is_dir():
        state = _read_folder(path)
    elif path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif path.suffix in TORCH_FILES:
        state = _read_torch(path)
    else:
        raise UserError(f"weights {source} are of no kind that can be read; {GIVE}")
    if not state:
        raise UserError(f"weights {source} hold no arrays; {GIVE}")
    halves = {key for key, value in state.items() if value.dtype.name in _OTHER_FLOATS}
    return {k: v.astype(np.float32) if k in halves else v for k, v in state.items()}


def _read_folder(folder: Path) -> State:
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {folder} has no config.json; {GIVE}")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    if index.is_file():
        shards = set(_json(index).get("weight_map", {}).values())
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise UserError(f"{index} names {outside[0]!r}, which is no file beside it")
        return {k: v for s in sorted(shards) for k, v in _read_safetensors(folder / s).items()}
    if (folder / "pytorch_model.bin").is_file():
        return _read_torch(folder / "pytorch_model.bin")
    raise UserError(f"folder {folder} has neither model.safetensors nor pytorch_model.bin; {GIVE}")


def _json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({error}); fetch it again") from None
    return held if isinstance(held, dict) else {}


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); fetch it again") from None


def _read_torch(path: Path) -> State:
    """Read the tensors of a file that torch wrote; nothing else in it is made, and no code runs."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"weights {path} are torch's and reading them needs torch: pip install torch, or "
            "convert them once with tools/convert_weights.py where it is installed"
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it then refuses anyway
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        if "GLOBAL" in str(error):
            raise UserError(
                f"weights {path} hold more than tensors and are not read, since that may run code; "
                "where you trust the file and have its packages, save its state dict alone: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
            ) from None
        raise UserError(f"weights {path} are damaged or not torch's; fetch them again") from None

    def tensors(part: Any) -> dict[str, Any]:
        items = part.items() if isinstance(part, Mapping) else ()
        return {str(key): value for key, value in items if isinstance(value, torch.Tensor)}

    parts = [held.get(name) for name in WRAPPERS] if isinstance(held, Mapping) else []
    chosen = next((found for found in map(tensors, parts) if found), tensors(held))
    return {
        key: (value.float() if value.is_floating_point() else value).detach().numpy()
        for key, value in chosen.items()
    }


def load_tower(
    tower: str,
    source: str,
    held: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    heads: int | None = None,
) -> dict[str, PyTree]:
    """Give the tower's {"params", "batch_stats"} filled from `source`, float32, shaped as `held`.

    `tower` is `vision` or `text`; `held` are the tower's trees, of arrays or of their shapes. The
    position embedding of a ViT is scaled to another grid, BERT's is cut, surplus layers of BERT
    are left out, and a kernel for three equal channels is summed for one; `say` tells each. With
    `heads`, it is compared with config.json: no array shows how many heads there were.

    Raises:
      UserError: if the weights cannot be read, are of no known layout, or any array of the tower
        is missing, left over or of another shape; all are listed.
    """
    state = read_state(source)
    layout = recognise(state, tower)
    if layout is None:
        some = ", ".join(sorted(state)[:3])
        raise UserError(
            f"weights {source} hold no {tower} tower of a known layout (they begin with {some}); "
            f"known are {' and '.join(KINDS[tower])}, see plan_jax/encoders/layouts.py"
        )
    wanted = flat(held)
    if OWN[layout.kind] not in wanted:
        raise UserError(
            f"weights {source} are those of a {layout.kind} and the {tower} tower is none; "
            f"choose {tower}.name to match"
        )
    if tower == "text":
        _check_config(source, heads)
    found, origin, left = renamed(state, layout)
    notes = adapt(found, wanted, layout, source)
    check(found, wanted, origin, left, f"weights {source} do not fit the {tower} tower")
    for note in notes:
        say(f"{tower} tower from {source}: {note}")
    return rebuilt(held, found)


def load_head(head: str, source: str, held: Mapping[str, Any]) -> dict[str, PyTree]:
    """Give a `Head` of kind `mlp` filled from MGCA's checkpoint, float32, shaped as `held`.

    `head` is image_global, image_local, text_global or text_local. Its first layer has a bias in
    the checkpoint and none here; BatchNorm follows, so the bias moves exactly into its mean.

    Raises:
      UserError: if an array is missing, left over or of another shape.
    """
    layout = Layout("MGCA", HEADS[head], "head")
    state = {k: v for k, v in read_state(source).items() if k.startswith(layout.prefix)}
    found, origin, left = renamed(state, layout)
    bias = found.pop("params/fc1/bias", None)
    mean = found.get("batch_stats/norm1/mean")
    if bias is not None and mean is not None and bias.shape == mean.shape:
        found["batch_stats/norm1/mean"] = mean - bias
    check(found, flat(held), origin, left, f"weights {source} do not fit the head {head}")
    return rebuilt(held, found)


def _check_config(source: str, heads: int | None) -> None:
    """Compare what no array shows with config.json, where the weights have one beside them."""
    path = locate(source)
    if not path.is_dir():
        return
    config = _json(path / "config.json")
    expected = _BERT | ({} if heads is None else {"num_attention_heads": heads})
    wrong = [
        f"{field} {config[field]} where the text tower has {ours}"
        for field, ours in expected.items()
        if field in config and config[field] != ours
    ]
    if wrong:
        raise UserError(
            f"weights {source} have {' and '.join(wrong)}; choose another tower or other weights"
        )
