"""Write what mamba_ssm computes for some tokens, for `refmamba verify --against`. Needs mamba_ssm, safetensors and its GPU.

python dump_mamba_ssm.py MODEL --tokens 1,2,3 --out dump.safetensors [--dtype float32]
"""

import argparse
import importlib.metadata
import json
from typing import Any

import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from safetensors.torch import save_file


def main() -> None:
    """Run the model once; its blocks give what they add, and the residual that they add it to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True, help="1,2,3")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--out", default="dump.safetensors")
    args = parser.parse_args()
    model = MambaLMHeadModel.from_pretrained(args.model, device="cuda", dtype=getattr(torch, args.dtype)).eval()
    arrays: dict[str, Any] = {"tokens": torch.tensor([int(token) for token in args.tokens.split(",")])}

    def keep(i: int, output: Any) -> None:
        arrays[f"layers.{i}.out_proj.out"], arrays[f"layers.{i}.residual_in"] = (x[0].contiguous().cpu() for x in output)

    for i, block in enumerate(model.backbone.layers):
        block.register_forward_hook(lambda _, __, output, i=i: keep(i, output))
    with torch.no_grad():
        arrays["logits"] = model(arrays["tokens"][None].cuda()).logits[0].contiguous().cpu()
    about = {"tool": f"mamba_ssm {importlib.metadata.version('mamba_ssm')}, torch {torch.__version__}", "model": args.model,
             "scheme": "fp32", "dtype": args.dtype}  # fmt: skip
    save_file(arrays, args.out, metadata={"about": json.dumps(about)})


if __name__ == "__main__":
    main()
