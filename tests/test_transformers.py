"""The fp32 forward against transformers' MambaForCausalLM, an independent implementation.

tests/vectors/transformers.npz was made by `python tools/make_transformers_vector.py`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from refmamba.formats.folder import open_checkpoint
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import parse_scheme

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
VECTOR = Path(__file__).parent / "vectors" / "transformers.npz"
TOLERANCE = 1e-4  # of max|a-b| / max|b|


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    source = open_checkpoint(folder)
    assert not isinstance(source, QuantizedModel)
    rows, _ = Mamba(quantize_model(source, parse_scheme("fp32"))).prefill([tokens], logits="all")
    return rows[0]


def test_the_live_library_agrees_at_the_shape_of_mamba_130m(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from make_transformers_vector import SHAPE_130M, random_model

    torch = pytest.importorskip("torch")
    model = random_model(SHAPE_130M)
    model.save_pretrained(tmp_path)
    tokens = np.arange(7, 50000, 3000)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens[None])).logits[0].numpy()
    ours = logits_of(tmp_path, tokens)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= TOLERANCE


def test_the_committed_logits_agree(tmp_path: Path) -> None:
    vector = np.load(VECTOR)
    (tmp_path / "config.json").write_bytes(vector["config"].tobytes())
    (tmp_path / "model.safetensors").write_bytes(vector["weights"].tobytes())
    ours, theirs = logits_of(tmp_path, vector["tokens"]), vector["logits"]
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= TOLERANCE
