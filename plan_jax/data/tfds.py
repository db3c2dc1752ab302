"""Imports tensorflow_datasets (TFDS), or raises the reason why it cannot be imported.

TFDS prints the traceback of what fails in its import and leaves an empty module behind, without
`tfds.core`. That happens where protobuf is older than the code in tensorflow-metadata.
"""

from plan_jax.types import UserError

try:
    from tensorflow_metadata.proto.v0 import schema_pb2  # noqa: F401
except Exception as error:  # protobuf has an exception of its own
    reason = str(error).partition("\n")[0].partition(". ")[0]
    raise UserError(
        f'tensorflow-datasets cannot be imported ({reason}); pip install "tensorflow-metadata<1.18"'
    ) from None

import tensorflow_datasets as tfds

__all__ = ["tfds"]
