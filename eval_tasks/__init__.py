"""The six tasks of the paper, scored as lm-evaluation-harness scores them (docs: README, section Evaluation)."""

from refmamba.eval_tasks import copa, hellaswag, lambada, piqa, rte, winogrande

TASKS = {module.TASK.name: module.TASK for module in (lambada, hellaswag, piqa, winogrande, rte, copa)}

__all__ = ["TASKS"]
