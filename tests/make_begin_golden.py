"""Make vectors/begin_golden.json: the tokens that lm-evaluation-harness takes for texts, begin tokens included.

    python tests/make_begin_golden.py     # needs lm_eval 0.4.13, torch, transformers

The tokenizer is the small model's, as it is and with a begin token that its post-processor adds; either way with truncation
and padding left in the file. The harness's own Hugging Face model encodes; what it would score is written down instead.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import tokenizers
import torch
import transformers
from eval_model import END, trained_tokenizer, write_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from refmamba.spec.config import MambaConfig

HERE = Path(__file__).parent
LONG = "The old man went out of the house, and there he sat for a long while. " * 3
TEXTS = ["The old man", LONG, "", " he said", f"{END}The old man", f"The {END} man", "a\r\nb\n", "naïve — €"]
PAIRS = [
    ("The old man ", "went away."), ("", " hello"), ("", f"{END}hello"), (f"{END}The old man", " went"), ("She\n\n", "said"),
    (LONG, " It was"),
]  # fmt: skip


class Recorder(HFLM):  # type: ignore[misc]  # a class without types where the harness is not installed
    """The harness's model, which notes what it would score."""

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        self.asked = [[list(before), list(after)] for _, before, after in requests]
        return [(0.0, False)] * len(requests)


def main() -> None:
    """Write the table."""
    table: dict[str, Any] = {
        "source": "independent:"
        + ", ".join(f"{library.__name__} {library.__version__}" for library in (lm_eval, transformers, tokenizers)),
        "command": "python tests/make_begin_golden.py",
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(Path(temporary), MambaConfig(d_model=8, n_layer=1, vocab_size=4096))
        network = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for adds in (False, True):
            (folder / "tokenizer.json").write_text(trained_tokenizer(adds), "utf-8")
            fast = transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), bos_token=END, eos_token=END
            )
            for add_bos in (None, False):
                model = Recorder(
                    pretrained=network, tokenizer=fast, backend="causal", max_length=2048, batch_size=1, add_bos_token=add_bos
                )
                model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)])
                table["cases"].append({
                    "adds": adds, "add_bos": add_bos,
                    "texts": [[text, model.tok_encode(text)] for text in TEXTS],
                    "pairs": [[*pair, *tokens] for pair, tokens in zip(PAIRS, model.asked, strict=True)],
                })  # fmt: skip
    (HERE / "vectors" / "begin_golden.json").write_text(json.dumps(table, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
