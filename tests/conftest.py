"""Settings to make before any test imports jax: devices, caches, offline, shape checks."""

import os
import signal
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# nohup, and a shell that starts a command in the background, let it and its children ignore these.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, handler)

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Tests spend most of their time in compilation, so LLVM optimises nothing, and MLIR lowers no
    # fusions. The folders `parity` and `soak` have settings of their own.
    xla_flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # 0.11.2 ends at this flag
        xla_flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns when a process with threads forks

from absl import flags  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# grain's workers read absl flags, which only an absl app parses.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

# Compilation breaks any deadline. Without randomness, a failure on one machine is one on all.
settings.register_profile(
    "plan_jax", deadline=None, max_examples=25, derandomize=True, database=None
)
settings.load_profile("plan_jax")

# Measured; the order among them does not matter. Tests of other versions omit them.
SLOW_FILES = (
    "test_resume.py",
    "test_steps.py",
    "test_train.py",
    "test_methods.py",
    "test_detection.py",
    "test_report_generation.py",
    "test_weights.py",
    "test_evaluate.py",
    "test_segmentation.py",
    "test_microbatch.py",
    "test_method_devices.py",
    "test_pmap.py",
    "test_programs.py",
    "test_preflight.py",
    "test_vit.py",
    "test_command.py",
    "test_config.py",
    "test_public_builder.py",
    "test_preparation.py",
    "test_bfloat16.py",
    "test_checkpoint_copies.py",
    "test_published.py",
    "test_builder_phantom.py",
    "test_builder_nih_cxr14.py",
    "test_asg.py",
    "test_place.py",
    "test_gloria_packed.py",
    "test_hard_negatives.py",
)


def pytest_collection_modifyitems(items):
    """Marks the slowest files and runs them first, so that two processes end together."""
    for item in items:
        # Folders below mark their own.
        if item.path.name in SLOW_FILES and item.path.parent.name == "tests":
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


# Every array of the package is checked against its annotated shape, at each call.
install_import_hook("plan_jax", "shape_checks.check")
