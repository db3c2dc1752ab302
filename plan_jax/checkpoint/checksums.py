"""Names, checksums and one fingerprint of the arrays of a tree, to tell whether two trees agree."""

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def named(tree: PyTree) -> dict[str, Any]:
    """Give every leaf under its path; a random key as the numbers it is made of.

    >>> list(named({"params": [{"bias": 0}, {"kernel": 1}]}))
    ['params.0.bias', 'params.1.kernel']
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="."): _numbers(leaf) for path, leaf in leaves}


def fingerprint(tree: PyTree) -> str:
    """Give the SHA-256 of all leaves with their names, dtypes and shapes, in the order of names.

    >>> fingerprint({"b": np.zeros(2), "a": np.ones(3)})[:16]
    '89e2aeecf5f73d58'
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named(tree).items()):
        value = np.asarray(leaf)
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def by_leaf(tree: PyTree) -> dict[str, int]:
    """Give the CRC-32 of the bytes of each leaf, by its name.

    >>> by_leaf({"a": np.zeros(1, np.float32)})
    {'a': 558161692}
    """

    def one(leaf: Any) -> int:
        return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))

    leaves = named(tree)
    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        return dict(zip(leaves, pool.map(one, leaves.values()), strict=True))


def difference(held: PyTree, wanted: PyTree) -> str:
    """Say which leaf two trees of arrays (or of their descriptions) differ in by name or shape.

    >>> difference({"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.zeros(2), "b": np.zeros((3, 1))})
    'b (3,) where (3, 1) is expected'
    """
    shapes = [{name: tuple(leaf.shape) for name, leaf in named(t).items()} for t in (held, wanted)]
    for name in sorted({*shapes[0], *shapes[1]}):
        has, needs = (s.get(name, "nothing") for s in shapes)
        if has != needs:
            return f"{name} {has} where {needs} is expected"
    return ""


def _numbers(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if is_key and isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf) if is_key else leaf
