"""The six tasks of the paper, a file each."""

from refmamba.eval_tasks.tasks import copa, hellaswag, lambada, piqa, rte, winogrande

TASKS = {module.TASK.name: module.TASK for module in (lambada, hellaswag, piqa, winogrande, rte, copa)}

__all__ = ["TASKS"]
