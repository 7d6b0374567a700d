"""What the paper published: sizes, schemes, tables."""

import re

PAPER_MODELS = ("130m", "370m", "790m", "1.4b", "2.8b")


PAPER_SIZES = dict(zip(PAPER_MODELS, ((768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64)), strict=True))


PAPER_SCHEMES = ("fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w8a8-mlp", "w8a8-all")


PAPER_TASKS = ("lambada", "hellaswag", "piqa", "winogrande", "rte", "copa")


# Table 1, 1.4b, per cent, in the order of PAPER_TASKS. HellaSwag is acc_norm in the first row and acc in the others.
TABLE_1 = {
    "fp32": (64.95, 59.11, 74.16, 61.4, 48.01, 79), "w8-mlp": (64.43, 44.91, 74.32, 60.06, 48.01, 77),
    "w8-all": (63.01, 44.71, 73.07, 60.06, 51.62, 76), "w4-mlp": (0.02, 25.70, 52.29, 51.54, 52.35, 56),
    "w4-all": (0.00, 25.72, 52.39, 50.99, 55.23, 64), "w8a8-mlp": (63.11, 44.42, 73.01, 60.06, 51.62, 76),
    "w8a8-all": (55.35, 43.84, 70.24, 54.3, 52.71, 75),
}  # fmt: skip


TABLE_2 = {"130m": 12.61, "2.8b": 17.49}  # points of average accuracy lost without the outliers at every site


def paper_size(model: str) -> str | None:
    """Which of the paper's models a name means: `state-spaces/mamba-1.4b-hf` is 1.4b."""
    match = re.search(rf"mamba-({'|'.join(map(re.escape, PAPER_MODELS))})(-hf)?/?$", model)
    return match[1] if match else None
