"""A machine with two devices, and one cache of programs for all notebooks."""

import os

import pytest
from run_notebook import ROOT


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Sets what kernels inherit."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Compilation is most of the time, so LLVM optimises as little as possible, and MLIR lowers no
    # fusions.
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=1"
    flags += " --xla_cpu_use_fusion_emitters=false"
    monkeypatch.setenv("XLA_FLAGS", flags)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
