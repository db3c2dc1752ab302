"""Methods: one file each, all with the same names, so that two papers are compared by a diff."""

from plan_jax.methods import convirt, gloria, plan

METHODS = {"convirt": convirt, "gloria": gloria, "plan": plan}
