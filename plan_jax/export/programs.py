"""A model as programs of `jax.export`, which run without plan_jax and flax.

`encode_image`, `encode_text` and `heatmap` are one file each, for CPU, GPU and TPU and for any
batch. The weights are an argument and not a part of them: the three share one `model.safetensors`,
can be given other weights of the same shapes, and compile without gigabytes of constants.
`reader.py` is written beside them and shows how they are called.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import export
from jaxtyping import Array, PyTree, Shaped

from plan_jax.config import Config
from plan_jax.data.tokenizer import WORD_HASHES
from plan_jax.export.folder import WEIGHTS, add_files, read_tensors
from plan_jax.layers import cpu
from plan_jax.model import Components, build_components, load_config
from plan_jax.types import Features, TextBatch, UserError

# Those that jax.export knows; a program holds the first three unless others are asked for.
PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
DEFAULT_PLATFORMS = PLATFORMS[:3]
FOLDER, SUFFIX = "programs", ".jaxexport"
# Features that are returned, and read again by `heatmap`; those that a model has not are left out.
FIELDS = (
    "pooled",
    "local",
    "mask",
    "word_id",
    "sentence",
    "fine",
    "guide",
    "attention",
    "next_attention",
)
# Program -> its arguments after the weights, and its outputs if they are not a dict.
SIGNATURES = {
    "encode_image": (("images",), ()),
    "encode_text": (("texts",), ()),
    "heatmap": (("images", "texts"), ("maps", "weights")),
}
TEXT_FIELDS = ("tokens", "word_index", "word_id", "sentence")


def add_programs(folder: str | Path, platforms: Sequence[str] = DEFAULT_PLATFORMS) -> None:
    """Adds programs to a saved model.

    Args:
      folder: the model folder.
      platforms: platforms of `jax.export`.

    Raises:
      UserError: the folder holds no complete model, or no programs can be written for a platform.
    """
    check_platforms(platforms)
    weights = read_tensors(Path(folder))
    add_files(folder, encode_programs(load_config(folder), weights, platforms))


def encode_programs(
    config: Config, weights: Mapping[str, Any], platforms: Sequence[str] = DEFAULT_PLATFORMS
) -> dict[str, bytes]:
    """Returns the files of a model's programs, by their names inside the model's folder.

    `signature.json` lists the inputs and outputs of each program, with names, shapes and dtypes.

    Args:
      config: the config of the run.
      weights: what `folder.read_tensors` returns, or the shapes and dtypes of these arrays.
      platforms: platforms of `jax.export`, see `check_platforms`.
    """
    components = build_components(config)
    programs, grid = trace_programs(components, config, weights, platforms)
    files = {f"{name}{SUFFIX}": bytes(program.serialize()) for name, program in programs.items()}
    signature = _describe_model(components, config, grid)
    signature |= {
        "jax": jax.__version__,
        "calling_convention_version": programs["heatmap"].calling_convention_version,
        "platforms": list(programs["heatmap"].platforms),
        "programs": {name: _describe_program(name, program) for name, program in programs.items()},
    }
    files["signature.json"] = json.dumps(signature, indent=2).encode() + b"\n"
    files["reader.py"] = Path(__file__).with_name("reader.py").read_bytes()
    return {f"{FOLDER}/{name}": content for name, content in files.items()}


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises UserError if no programs can be written for these platforms, or there is none."""
    unknown = [platform for platform in platforms if platform not in PLATFORMS]
    if unknown or not platforms:
        name = repr(unknown[0]) if unknown else "none"
        raise UserError(f"platform of programs is {name}; use some of {', '.join(PLATFORMS)}")
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise UserError(
            "programs are written with flatbuffers, which is not installed; pip install flatbuffers"
        ) from None


def trace_programs(
    components: Components, config: Config, weights: Mapping[str, Any], platforms: Sequence[str]
) -> tuple[dict[str, export.Exported], tuple[int, int]]:
    """Returns the programs, lowered for all platforms, and the grid of the maps (Y, X).

    The batch is a symbol. The kernels for CPUs are not used: a program would hold both
    implementations of each operation.
    """
    encoder, method, hyper, _ = components
    data = config.data
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    (batch,) = export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, data.size, data.size, 1), jnp.uint8)
    lengths = (data.max_tokens, data.max_tokens, data.max_words, data.max_words)
    text = {
        name: jax.ShapeDtypeStruct((batch, length), jnp.int32)
        for name, length in zip(TEXT_FIELDS, lengths, strict=True)
    }

    def encode(weights: dict, inputs: Any, function: str) -> Features:
        trees = unflatten_weights(weights)
        variables = {"params": trees["params"]["encoders"], "batch_stats": trees["batch_stats"]}
        features: Any = encoder.apply(variables, inputs, method=function)
        return features

    def encode_image(weights: dict, images: Array) -> dict[str, Array]:
        return _to_dict(encode(weights, images, "encode_image"))

    def encode_text(weights: dict, texts: dict[str, Array]) -> dict[str, Array]:
        return _to_dict(encode(weights, TextBatch(**texts), "encode_text"))

    def heatmap(
        weights: dict, images: dict[str, Any], texts: dict[str, Any]
    ) -> tuple[Array, Array]:
        trees = unflatten_weights(weights)
        sides = Features(**images, grid=grid, fine_grid=fine_grid), Features(**texts)
        return method.heatmap(trees["params"]["method"], trees["memory"], *sides, hyper)

    def lower(function: Any, *inputs: Any) -> export.Exported:
        return export.export(jax.jit(function), platforms=platforms)(shapes, *inputs)

    with cpu.use_xla_only(), _no_source_paths():
        output = jax.eval_shape(partial(encode, function="encode_image"), shapes, image)
        grid, fine_grid = output.grid, output.fine_grid
        programs = {
            "encode_image": lower(encode_image, image),
            "encode_text": lower(encode_text, text),
        }
        features = [_output_shapes(program) for program in programs.values()]
        programs["heatmap"] = lower(heatmap, *features)
    return programs, (hasattr(hyper, "rounds") and fine_grid) or grid


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """Keeps the paths of source files, which name folders of this machine, out of programs."""
    option = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, limit)


def unflatten_weights(weights: Mapping[str, Shaped[Array, "..."]]) -> dict[str, Any]:
    """Returns flat arrays [...] as `params`, `batch_stats` and `memory`, half precision as float32.

    A method or a tower without arrays of a kind gets an empty dict.
    """
    trees: dict[str, Any] = {"params": {}, "batch_stats": {}, "memory": {}}
    trees |= traverse_util.unflatten_dict(
        {
            name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for name, x in weights.items()
        },
        sep="/",
    )
    trees["params"].setdefault("method", {})
    return trees


def _to_dict(features: Features) -> dict[str, Array]:
    return {name: value for name in FIELDS if (value := getattr(features, name)) is not None}


def _output_shapes(program: export.Exported) -> PyTree:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.out_avals]
    return jax.tree.unflatten(program.out_tree, shapes)


# The signature -----------------------------------------------------------------------------------


def _describe_program(name: str, program: export.Exported) -> dict[str, Any]:
    """Returns the file of a program, its arguments after the weights, and its outputs."""
    argument_names, output_names = SIGNATURES[name]
    (_, *arguments), _ = jax.tree.unflatten(program.in_tree, map(_describe_array, program.in_avals))
    outputs = jax.tree.unflatten(program.out_tree, map(_describe_array, program.out_avals))
    return {
        "file": f"{name}{SUFFIX}",
        "arguments": dict(zip(argument_names, arguments, strict=True)),
        "outputs": dict(zip(output_names, outputs, strict=True)) if output_names else outputs,
    }


def _describe_array(array: Any) -> str:
    """Returns the dtype and the shape of an array [...], as `float32[batch, 64]`."""
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"


def _describe_model(
    components: Components, config: Config, grid: tuple[int, int]
) -> dict[str, Any]:
    """Returns what prepares the inputs of the programs and reads their outputs."""
    tokenizer = components.tokenizer
    return {
        "method": config.method,
        "weights": WEIGHTS,
        "size": config.data.size,
        "grid": grid,
        "max_tokens": config.data.max_tokens,
        "max_words": config.data.max_words,
        "cls_id": tokenizer.cls_id,
        "sep_id": tokenizer.sep_id,
        "vocab_size": tokenizer.vocab_size,
        "word_hashes": WORD_HASHES,
    }
