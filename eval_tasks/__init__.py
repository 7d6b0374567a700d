"""The tasks of the paper, scored as lm-evaluation-harness scores them (docs: README, section Evaluation)."""
