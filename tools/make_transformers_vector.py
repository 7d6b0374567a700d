"""Make tests/vectors/transformers.npz: logits of transformers' MambaForCausalLM with random weights.

    python tools/make_transformers_vector.py

The committed model is small, with sizes that are no multiple of anything; SHAPE_130M serves the test against the live
library. The weights' deviation is 0.05: at transformers' default of 0.1 a random model of 24 layers amplifies rounding so
much that transformers itself is 2e-4 away from its own float64 result.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SHAPE_130M = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24}
SHAPE_SMALL = {"vocab_size": 211, "hidden_size": 40, "num_hidden_layers": 3, "state_size": 12, "time_step_rank": 5}


def random_model(shape: dict[str, int]) -> Any:
    """A MambaForCausalLM of a shape, float32, the same for each call."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(**shape, initializer_range=0.05)
    return transformers.MambaForCausalLM(config).float().eval()


def main() -> None:
    """Write the vector, with what made it."""
    model = random_model(SHAPE_SMALL)
    tokens = np.arange(3, 200, 7)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None])).logits[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {name: np.frombuffer((Path(folder) / file).read_bytes(), np.uint8)
                 for name, file in (("config", "config.json"), ("weights", "model.safetensors"))}  # fmt: skip
    source = f"independent:transformers {transformers.__version__}, torch {torch.__version__}"
    out = Path(__file__).parents[1] / "tests" / "vectors" / "transformers.npz"
    np.savez_compressed(out, tokens=tokens, logits=logits, source=np.array(source), **files)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
