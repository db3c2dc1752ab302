"""XLA of the soak tests: many steps in a process, whose fusions are lowered as for users."""

import os

flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = flags
