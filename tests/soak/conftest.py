"""XLA of the soak tests: many steps in a process, whose fusions are lowered as for users."""

import os

flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = flags

# Measured: these take two thirds of the time. `make soak SHORT='-m "not slow"'` omits them.
SLOW = (
    "test_a_run_that_is_killed_at_any_moment_ends_like_one_that_is_not",
    "test_two_hosts_outlive_a_pause_a_signal_and_a_death",
    "test_two_processes_that_validate_can_be_resumed",
    "test_eight_devices_step_like_one_and_sixteen_pairs_are_memorised[asg]",
    "test_eight_devices_step_like_one_and_sixteen_pairs_are_memorised[gloria]",
    "test_eight_devices_step_like_one_and_sixteen_pairs_are_memorised[mgca]",
    "test_eight_devices_step_like_one_and_sixteen_pairs_are_memorised[place]",
    "test_the_memory_of_the_local_loss",
    "test_a_step_compiles_for_a_tpu_that_is_not_there[v5e-8",
)


def pytest_collection_modifyitems(items):
    """Marks the slowest tests."""
    for item in items:
        if item.path.parent.name == "soak" and item.name.startswith(SLOW):
            item.add_marker("slow")
