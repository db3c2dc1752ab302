"""Parity with the originals in torch: what has to hold before torchvision can be imported."""

from importlib import metadata

import torch

torch.set_num_threads(2)
try:
    binary = metadata.distribution("torchvision").locate_file("torchvision/_C.so")
    torch.ops.load_library(str(binary))
except OSError:
    # torch built for CPUs beside a torchvision built for GPUs: its binary does not load, and its
    # Python describes two operators that only the binary declares. Models need neither.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
