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


NORMED = ("hellaswag", "arc_challenge")  # of which later papers report acc_norm, and the paper's baseline of the first


# Later papers, per cent: LAMBADA, HellaSwag (acc_norm), PIQA, ARC-easy, ARC-challenge (acc_norm), WinoGrande, their average,
# and the average without LAMBADA.
QUAMBA, QUAMBA2 = "Quamba, arXiv 2410.13229", "Quamba2, arXiv 2503.22879, table 11"
MAMBAQUANT = "MambaQuant, arXiv 2501.13484, its logs"
Published = tuple[float | None, ...]
SUCCESSORS: dict[str, list[tuple[str, str, Published]]] = {
    "130m": [("W8A8, static", QUAMBA, (40.61, 34.97, 63.00, None, None, 53.11, None, None))],
    "1.4b": [
        ("fp16", QUAMBA2, (64.9, 59.1, 74.2, 65.5, 32.8, 61.5, 59.7, None)),
        ("W8A8, Quamba", QUAMBA2, (61.4, 58.3, 72.7, 64.0, 32.3, 58.8, 57.9, None)),
        ("W8A8, Quamba2", QUAMBA2, (62.3, 58.6, 73.1, 64.0, 32.2, 58.5, 58.1, None)),
        ("W4A8, Quamba2", QUAMBA2, (61.5, 57.6, 72.0, 63.0, 32.2, 58.7, 57.5, None)),
        ("W8A8, static", QUAMBA, (60.43, 58.06, 72.47, None, None, 56.75, None, None)),
        ("W8A8, naive dynamic", QUAMBA, (52.20, 56.57, 70.40, None, None, 59.19, None, None)),
        ("W8A8, naive static", QUAMBA, (20.30, 46.66, 62.95, None, None, 50.51, None, None)),
    ],
    "2.8b": [
        ("fp16", QUAMBA2, (69.1, 65.9, 75.6, 69.2, 35.8, 63.0, 63.1, None)),
        ("W8A8, Quamba", QUAMBA2, (65.4, 65.1, 74.2, 68.9, 35.9, 62.6, 62.0, None)),
        ("W8A8, Quamba2", QUAMBA2, (65.7, 65.4, 74.5, 68.9, 36.7, 61.8, 62.2, None)),
        ("W4A8, Quamba2", QUAMBA2, (63.5, 64.9, 74.2, 68.2, 35.3, 62.2, 61.4, None)),
        ("W8A8, static", QUAMBA, (65.67, 65.33, 74.26, None, None, 61.17, None, None)),
    ],
}  # fmt: skip
MAMBAQUANT_SCHEMES = ("fp16", "W8A8, naive", "W8A8, best", "W4A8, naive", "W4A8, best")
MAMBAQUANT_AVERAGES: dict[str, tuple[float | None, ...]] = {  # without LAMBADA, in the order of MAMBAQUANT_SCHEMES
    "130m": (None, 41.7, 44.5, 36.6, 40.3), "370m": (None, 46.2, 50.1, 36.7, 44.6), "790m": (None, 48.2, 53.8, 35.6, 45.8),
    "1.4b": (58.6, 54.5, 58.2, 51.9, 55.6), "2.8b": (62.2, 59.2, 62.1, 53.7, 58.9),
}  # fmt: skip


def successors(size: str | None) -> list[tuple[str, str, Published]]:
    """The published rows of later papers for one of the sizes: what it is, where it is from, the figures."""
    averages = zip(MAMBAQUANT_SCHEMES, MAMBAQUANT_AVERAGES.get(size or "", ()), strict=False)
    rows = [(title, MAMBAQUANT, (*[None] * 7, value)) for title, value in averages if value is not None]
    return [*SUCCESSORS.get(size or "", []), *rows]


def paper_size(model: str) -> str | None:
    """Which of the paper's models a name means: `state-spaces/mamba-1.4b-hf` is 1.4b."""
    match = re.search(rf"mamba-({'|'.join(map(re.escape, PAPER_MODELS))})(-hf)?/?$", model)
    return match[1] if match else None
