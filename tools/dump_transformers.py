"""Write what transformers computes for some tokens, for `refmamba verify --against`. Needs torch, transformers, safetensors.

python dump_transformers.py MODEL --tokens 1,2,3 --out dump.safetensors [--dtype float32]
"""

import argparse
import json
import re
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

NAMES = {"embeddings": "embedding", "norm_f": "norm_f", "": "residual_out", "norm": "norm",
         "mixer.in_proj": "in_proj.out", "mixer.x_proj": "x_proj.out", "mixer.out_proj": "out_proj.out"}  # fmt: skip


def site(name: str) -> str | None:
    """refmamba's name of a module's output, where they are the same numbers."""
    name = name.removeprefix("backbone.")
    match = re.fullmatch(r"(layers\.\d+\.?)?(.*)", name)
    layer, rest = (match[1] or "", match[2]) if match else ("", name)
    known = rest in NAMES and bool(layer) == (rest not in ("embeddings", "norm_f"))
    return f"{layer.rstrip('.')}.{NAMES[rest]}".lstrip(".") if known else None


def main() -> None:
    """Run the model once with hooks on its modules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True, help="1,2,3")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ...; auto, transformers' default, is the stored type"
    )
    parser.add_argument("--out", default="dump.safetensors")
    args = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    arrays: dict[str, Any] = {"tokens": torch.tensor([int(token) for token in args.tokens.split(",")])}
    for name, module in model.named_modules():
        if key := site(name):
            module.register_forward_hook(lambda _, __, out, key=key: arrays.update({key: out[0].contiguous()}))
    with torch.no_grad():
        arrays["logits"] = model(arrays["tokens"][None]).logits[0].contiguous()
    about = {"tool": f"transformers {transformers.__version__}, torch {torch.__version__}", "model": args.model,
             "scheme": "fp32", "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    save_file(arrays, args.out, metadata={"about": json.dumps(about)})


if __name__ == "__main__":
    main()
