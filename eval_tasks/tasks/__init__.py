"""The tasks, a file each: the six of the paper, and ARC's two, which later papers report."""

from refmamba.eval_tasks.tasks import arc, copa, hellaswag, lambada, piqa, rte, winogrande

TASKS = {
    task.name: task
    for task in (*(module.TASK for module in (lambada, hellaswag, piqa, winogrande, rte, copa)), arc.EASY, arc.CHALLENGE)
}

__all__ = ["TASKS"]
