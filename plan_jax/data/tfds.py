"""Imports tensorflow_datasets (TFDS), or raises the reason why it cannot be imported.

TFDS prints the traceback of what fails in its import and leaves an empty module behind, without
`tfds.core`. That happens where protobuf is older than the code in tensorflow-metadata, or where a
package that TFDS needs is missing.
"""

import contextlib
import io

from plan_jax.types import UserError


def _describe(error: Exception, remedy: str) -> UserError:
    reason = str(error).partition("\n")[0].partition(". ")[0]
    return UserError(f"tensorflow-datasets cannot be imported ({reason}); {remedy}")


try:
    from tensorflow_metadata.proto.v0 import schema_pb2  # noqa: F401
except Exception as error:  # protobuf has an exception of its own
    raise _describe(error, 'pip install "tensorflow-metadata<1.18"') from None

try:
    with contextlib.redirect_stderr(io.StringIO()):  # for the traceback
        import tensorflow_datasets as tfds
        import tensorflow_datasets.core  # noqa: F401 - raises what the package has caught
except Exception as error:
    remedy = "pip install that package, or tensorflow-datasets again"
    raise _describe(error, remedy) from None

__all__ = ["tfds"]
