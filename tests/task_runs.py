"""Running a task of `plan_jax.tasks` on records in memory."""

from plan_jax.types import EvalData, TaskContext


def run_task(task, model, splits, options, *, findings=(), **context):
    """Returns metrics and examples.

    `splits` are fields of `EvalData`, as `test`; `context` are fields of `TaskContext`.
    """
    data = EvalData(name="records", findings=tuple(findings), **splits)
    context = TaskContext(**context)
    result = task.evaluate(model, data, options, context)
    return result.metrics, result.rows


def check_task(task, splits, options, findings=()):
    """Calls the task's check; `splits` are fields of `EvalData`, as `test`."""
    task.check(EvalData(name="records", findings=tuple(findings), **splits), options)
