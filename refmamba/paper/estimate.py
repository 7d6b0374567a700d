"""What a reproduction would take: hours, memory and downloads, before anything is run."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refmamba.backend import Backend
from refmamba.eval_tasks.load import Dataset
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats.scheme import open_scheme
from refmamba.paper.published import PAPER_SIZES, paper_size
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Positions
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS

# For the estimate only. Characters a document of the published data: contexts, each once; contexts, once a choice;
# continuations. Means of the first 40 to 500 documents of each task, for ARC of all.
HUB_CHARACTERS = {
    "lambada": (316.7, 316.7, 6.7), "hellaswag": (134.7, 538.8, 292.5), "piqa": (55.0, 110.0, 204.2),
    "winogrande": (160.4, 160.4, 50.1), "rte": (361.2, 722.4, 11.0), "copa": (41.5, 83.0, 60.9),
    "arc_easy": (131.6, 526.2, 94.3), "arc_challenge": (149.6, 598.3, 120.3),
}  # fmt: skip


CHARACTERS_A_TOKEN = 4.0  # of English text under GPT-NeoX's tokenizer


BLOCK = MambaConfig(768, 1, vocab_size=4096)  # what is timed: a block of the smallest model's width, and a part of its head


MEMORY, BYTES_A_PARAMETER = 0.8e9, 11  # of a process at its peak: 2.1 GB and 4.7 GB were measured at 130m's and 370m's shape


def parameters(config: MambaConfig) -> int:
    """How many numbers the checkpoint holds."""
    return sum(math.prod(shape) for shape in config.shapes().values())


def config_of(model: str) -> MambaConfig:
    """A model's sizes: the paper's from its name, without a download; else from its files. Raises RefmambaError."""
    if size := paper_size(model):
        d_model, n_layer = PAPER_SIZES[size]
        return MambaConfig(d_model, n_layer, vocab_size=50280)
    return open_model(ModelChoice(model)).checkpoint.config


@dataclass(frozen=True)
class Work:
    """What an evaluation runs: documents, and characters of contexts (each once; once a choice) and of continuations."""

    documents: int
    shared: float
    repeated: float
    continuations: float

    def tokens(self, scheme: str) -> tuple[float, float]:
        """Tokens through the blocks and through the head. Where states cannot be forked every context runs once a choice,
        and every token has logits."""
        if open_scheme(scheme).whole_sequence:
            whole = (self.repeated + self.continuations) / CHARACTERS_A_TOKEN
            return whole, whole
        return (self.shared + self.continuations) / CHARACTERS_A_TOKEN, self.continuations / CHARACTERS_A_TOKEN


def work_of(datasets: Sequence[Dataset], limit: int | None) -> Work:
    """The work of datasets that are there."""
    documents = [document for data in datasets for document in data.documents[:limit]]
    shared = sum(sum(map(len, set(document.contexts))) for document in documents)
    repeated = sum(sum(map(len, document.contexts)) for document in documents)
    return Work(len(documents), shared, repeated, sum(sum(map(len, document.continuations)) for document in documents))


def work_on_hub(tasks: Sequence[str], limit: int | None) -> Work:
    """The work of the published data, without a download."""
    counts = {task: min(limit or TASKS[task].hub.rows, TASKS[task].hub.rows) for task in tasks}
    sums = (sum(n * HUB_CHARACTERS[task][part] for task, n in counts.items()) for part in range(3))
    return Work(sum(counts.values()), *sums)


class _Random:
    """Weights of BLOCK that nobody trained."""

    config = BLOCK
    _rng = np.random.default_rng(0)

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""
        return self._rng.normal(0, 0.02, BLOCK.shapes()[name]).astype(np.float32)


def speed(scheme: str, backend: Backend) -> tuple[float, float]:
    """Parameter-tokens a second of the blocks and of the head, here and now: (both) parameters x tokens / seconds."""
    shapes = BLOCK.shapes()
    ones = {f"layers.0.{layer}": np.ones(shapes[f"layers.0.{layer}.weight"][1], np.float32) for layer in LINEAR_LAYERS}
    calibration = ones | {f"{site}.rotated": m for site, m in ones.items()} | {"lm_head": np.ones(BLOCK.d_model, np.float32)}
    runner = backend.load(quantize_model(_Random(), open_scheme(scheme), calibration))
    sequences = [np.arange(64)] * (1 if open_scheme(scheme).whole_sequence else 8)

    def seconds(logits: Positions) -> float:
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            runner.prefill(sequences, logits=logits)[1].arrays()  # the device has finished when the state is here
            best = min(best, time.perf_counter() - start)
        return best

    tokens, blocks = 64 * len(sequences), seconds("none")
    head = max(seconds("all") - blocks, 1e-9)
    of_head = BLOCK.vocab_size * BLOCK.d_model
    return (parameters(BLOCK) - of_head) * tokens / blocks, of_head * tokens / head


def duration(hours: float) -> str:
    """`9.5 h`, `12 min` or `3 s`."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def plan(
    models: Sequence[str], names: Mapping[str, str], work: Work, ablated: Work, ablations: int, fetched: bool, backend: Backend
) -> str:  # fmt: skip
    """Size, memory and time of each model, as tables; the speed is measured on one block, here and now.

    names: of the rows, each with its scheme. work: of each row. ablated: of each ablation.
    """
    configs = {model: config_of(model) for model in models}
    speeds = {scheme: speed(scheme, backend) for scheme in {*names.values(), "fp32"}}

    def hours(config: MambaConfig, scheme: str, work: Work) -> float:
        (run, scored), (blocks, head) = work.tokens(scheme), speeds[scheme]
        of_head = config.vocab_size * config.d_model
        return (run * (parameters(config) - of_head) / blocks + scored * of_head / head) / 3600

    lines = ["| model | parameters | download at most | memory |", "|---|---|---|---|"]
    for model, config in configs.items():
        count = parameters(config)
        download = f"{4 * count / 1e9:.2f} GB" if "/" in model and not Path(model).exists() else "none"
        lines.append(f"| {model} | {count / 1e6:.0f} M | {download} | {(BYTES_A_PARAMETER * count + MEMORY) / 1e9:.1f} GB |")
    lines += ["", f"Time for {work.documents} documents:", "", "| scheme | " + " | ".join(models) + " |"]
    lines.append("|---|" + "---|" * len(models))
    rows = {name: [hours(config, scheme, work) for config in configs.values()] for name, scheme in names.items()}
    rows[f"{ablations} ablations, fp32"] = [ablations * hours(config, "fp32", ablated) for config in configs.values()]
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(map(duration, row)) + " |")
    data = f"data: about {2e-6 * (work.shared + work.continuations):.0f} MB; " if fetched else ""
    lines += [
        "",
        f"{data}memory: of one process; with --workers N there are N + 1. Time: at {CHARACTERS_A_TOKEN:g} characters a",
        f"token and the speed of a block {BLOCK.d_model} wide on the backend {backend.name} ({backend.device}), measured now.",
        "Loading a model for each row comes on top. Documents that FOLDER has from a run before are not run again.",
    ]
    return "\n".join(lines)
