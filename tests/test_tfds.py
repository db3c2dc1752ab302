"""An installation in which TFDS cannot be imported is one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets

from plan_jax.data.tfds import tfds

ROOT = Path(__file__).resolve().parent.parent
# As the code that protobuf 6 generated begins, run by protobuf 5.
OLD_PROTOBUF = """
from google.protobuf import runtime_version

raise runtime_version.VersionError(
    "Detected incompatible Protobuf Gencode/Runtime versions when loading schema.proto: gencode "
    "6.31.1 runtime 5.29.6. Runtime version cannot be older than the linked gencode version. See "
    "the guarantees."
)
"""


def test_tfds_is_imported():
    assert tfds is tensorflow_datasets and tfds.core.DatasetBuilder


def test_a_protobuf_that_is_too_old_is_one_sentence(tmp_path):
    package = tmp_path / "tensorflow_metadata/proto/v0"
    package.mkdir(parents=True)
    (package / "schema_pb2.py").write_text(OLD_PROTOBUF)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    result = subprocess.run(
        [sys.executable, "-m", "plan_jax.main", "--config", "testing"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "tensorflow-datasets cannot be imported (Detected incompatible Protobuf Gencode/Runtime "
        "versions when loading schema.proto: gencode 6.31.1 runtime 5.29.6); "
        'pip install "tensorflow-metadata<1.18"\n'
    )


@pytest.mark.parametrize("name", ["etils", "promise"])
def test_a_missing_package_is_one_sentence(name):
    """Of TFDS's own import only an empty module and a traceback would remain."""
    code = f"import sys; sys.modules[{name!r}] = None\nfrom plan_jax import main\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main.run(['--config', 'testing']))"],
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"tensorflow-datasets cannot be imported (import of {name} halted; None in sys.modules); "
        "pip install that package, or tensorflow-datasets again\n"
    )
