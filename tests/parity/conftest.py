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

# Measured: these take two thirds of the time. `.ci/run` omits them, `make parity` does not.
SLOW = (
    "test_a_step_of_mgca_with_resnet50_at_299_pixels",
    "test_a_step_of_gloria[True]",
    "test_chexpert",
    "test_padchest",
    "test_image_towers[resnet18",
    "test_resnet[resnet50-64-0-True]",
    "test_resnet[resnet50-48-1",
    "test_resnet[resnet18-96",
    "test_vit[224",
    "test_scan_and_rematerialisation_change_no_value_of_bert[changes0]",
    "test_scan_and_rematerialisation_change_no_value_of_vit[changes0]",
    "test_scan_makes_a_smaller_program_and_remat_needs_less_memory",
    "test_frozen_parameters_and_statistics_do_not_change",
    "test_frozen_layers_have_no_gradient_and_no_backward_pass[vision-vit_tiny]",
    "test_the_first_losses_and_gradients_agree[asg]",
    "test_the_first_losses_and_gradients_agree[mgca]",
    "test_the_first_losses_and_gradients_agree[place]",
    "test_a_published_model_computes_what_torch_does[Mgca]",
    "test_a_resnet_gives_equal_features_in_timm_and_torchvision[resnet34",
    "test_a_resnet_gives_equal_features_in_timm_and_torchvision[resnet50",
)


def pytest_collection_modifyitems(items):
    """Marks the slowest tests."""
    for item in items:
        if item.path.parent.name == "parity" and item.name.startswith(SLOW):
            item.add_marker("slow")
