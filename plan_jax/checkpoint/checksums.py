"""Names and checksums of the leaves of a tree, to compare two trees without keeping both."""

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns every leaf under its path; a random key becomes the numbers it consists of.

    >>> list(named_leaves({"params": [{"bias": 0}, {"kernel": 1}]}))
    ['params.0.bias', 'params.1.kernel']
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _key_to_numbers(leaf)
        for path, leaf in leaves
    }


def fingerprint(tree: PyTree) -> str:
    """Returns the SHA-256 of all leaves with their names, dtypes and shapes, sorted by name.

    >>> fingerprint({"b": np.zeros(2), "a": np.ones(3)})[:16]
    '89e2aeecf5f73d58'
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        value = np.asarray(leaf)
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def leaf_checksums(tree: PyTree) -> dict[str, int]:
    """Returns the CRC-32 of the bytes of each leaf, by name.

    >>> leaf_checksums({"a": np.zeros(1, np.float32)})
    {'a': 558161692}
    """

    def checksum(leaf: Any) -> int:
        # Seen as bytes first: numpy cannot hand a bfloat16 array to zlib.
        return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)

    leaves = named_leaves(tree)
    with ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
        return dict(zip(leaves, pool.map(checksum, leaves.values()), strict=True))


def json_checksum(value: Any) -> int:
    """Returns the CRC-32 of a value as JSON, which does not depend on the order of its keys.

    >>> json_checksum({"a": 1, "b": [2]}) == json_checksum({"b": (2,), "a": 1})
    True
    """
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def find_nonfinite(tree: PyTree) -> str:
    """Returns the name of the first leaf that is NaN or infinite anywhere, "" if there is none.

    >>> find_nonfinite({"a": np.zeros(2), "b": np.array([0, np.nan])})
    'b'
    """
    for name, leaf in named_leaves(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(np.asarray(leaf)).all():
            return name
    return ""


def describe_difference(actual: PyTree, expected: PyTree) -> str:
    """Returns the first leaf, by name, whose presence or shape differs; "" if there is none.

    The leaves may be arrays or descriptions of arrays.

    >>> describe_difference(
    ...     {"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.zeros(2), "b": np.zeros((3, 1))}
    ... )
    'b (3,) where (3, 1) is expected'
    """
    actual_shapes, expected_shapes = (
        {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
        for tree in (actual, expected)
    )
    for name in sorted({*actual_shapes, *expected_shapes}):
        shape = actual_shapes.get(name, "nothing")
        expected_shape = expected_shapes.get(name, "nothing")
        if shape != expected_shape:
            return f"{name} {shape} where {expected_shape} is expected"
    return ""


def _key_to_numbers(leaf: Any) -> Any:
    """Returns the UInt32 numbers of a random key, or of its description; other leaves unchanged."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)
