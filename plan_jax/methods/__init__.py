"""Methods: one file each, all with the same names, so that two papers are compared by a diff."""

from plan_jax.methods import asg, convirt, gloria, mgca, place, plan

METHODS = {
    "convirt": convirt,
    "gloria": gloria,
    "mgca": mgca,
    "asg": asg,
    "place": place,
    "plan": plan,
}
