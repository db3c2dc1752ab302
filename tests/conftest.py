"""What has to hold before any test imports jax: devices, caches, offline, shapes checked."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Compiling is most of the time of these tests: LLVM may spare itself some trouble.
    flags_of_xla = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags_of_xla}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from absl import flags  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only absl's app parses

settings.register_profile("house", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("house")

SLOW = (
    "test_resume.py",
    "test_steps.py",
    "test_train.py",
    "test_methods.py",
    "test_detection.py",
    "test_report_generation.py",
    "test_weights.py",
    "test_evaluate.py",
    "test_segmentation.py",
)


def pytest_collection_modifyitems(items):
    """Take the slowest files first, so that two processes end together."""
    items.sort(key=lambda item: item.path.name not in SLOW)


install_import_hook("plan_jax", "shape_checks.check")
