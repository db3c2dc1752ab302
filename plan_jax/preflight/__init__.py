"""Preflight: the memory, traffic and time of a training step, from its compiled program."""

from plan_jax.preflight.compile import compile_step as compile_step
from plan_jax.preflight.report import format_report as format_report
from plan_jax.preflight.report import to_dict as to_dict
from plan_jax.preflight.topology import find_target as find_target
from plan_jax.preflight.topology import make_target as make_target
