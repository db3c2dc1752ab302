"""Settings of the parity tests: XLA, torch's threads, and operators that torchvision expects."""

import os
from importlib import metadata

import torch

# ReLUs near their kink flip with the rounding, so fusions are lowered as for users.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = flags
torch.set_num_threads(2)
try:
    binary = metadata.distribution("torchvision").locate_file("torchvision/_C.so")
    torch.ops.load_library(str(binary))
except OSError:
    # With torch for CPUs and torchvision for GPUs, the binary of torchvision does not load, but its
    # Python code registers two operators that only the binary declares. Models use neither.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
