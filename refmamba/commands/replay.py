"""`refmamba replay`: a receipt's run, computed again."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from refmamba.commands.options import (
    Command,
    InputFile,
    backend_option,
    calibrate_option,
    device_option,
    json_option,
    model_options,
    option,
    percentile_option,
    print_json,
    revision_option,
)  # fmt: skip
from refmamba.errors import DataError
from refmamba.run.receipt import read_receipt, replay
from refmamba.run.session import DEFAULT_MODEL, ModelChoice, open_session

its_model_option = option(
    "Model",
    "--model",
    default="",
    help="The receipt's model: `small`, a folder, a GGUF file, or OWNER/NAME[:FILE.gguf].  [default: as the receipt says]",
)


@click.command("replay", cls=Command, examples=["refmamba replay receipt.json --backend torch"])
@click.argument("receipt", type=InputFile())
@model_options(its_model_option, revision_option, calibrate_option, percentile_option, backend_option, device_option)
@json_option
def command(receipt: Path, choice: ModelChoice, as_json: bool) -> None:
    """Compute a RECEIPT of `generate` or `logits` again, and name the first token that differs.

    Exit status: 0 the same, 1 it differs, 2 it cannot be read, or is of another model. docs/RECEIPTS.md says what it proves.
    """
    made, scheme = read_receipt(receipt)
    words = {key: made.about.get(key) for key in ("model", "revision", "calibrate")}
    if any(not isinstance(word, str | None) for word in words.values()):
        raise DataError(f"{receipt}: the receipt's about is not what docs/FORMAT.md asks for")
    calibrate = choice.calibrate or (Path(words["calibrate"]) if words["calibrate"] else None)
    revision = choice.revision or (None if choice.model else words["revision"])
    name = choice.model or words["model"] or DEFAULT_MODEL
    percentile = choice.percentile if choice.calibrate or choice.percentile != 1 else made.about.get("percentile", 1.0)
    chosen = replace(choice, model=name, scheme=scheme, revision=revision, calibrate=calibrate, percentile=percentile)
    session = open_session(chosen)
    wrong, count = replay(made, session), len(made.hashed_tokens)
    if as_json:
        print_json({"same": wrong is None, "tokens": count, "first_difference": asdict(wrong) if wrong else None,
                    "model": name, "scheme": scheme.name, "backend": session.backend.name,
                    "device": session.backend.device})  # fmt: skip
    elif wrong is None:
        click.echo(f"the same: {count} tokens, {name} under {scheme.name} on {session.backend.name}, chain {made.chain[-1]}")
    else:
        entry = f"{'tokens' if made.command == 'generate' else 'prompt_tokens'}[{wrong.number - 1}]"
        click.echo(f"differs at token {wrong.number} of {count}: {entry} is {wrong.receipt_token}, computed {wrong.token}; "
                   f"chain[{wrong.number}] is {wrong.receipt_hash}, computed {wrong.hash}")  # fmt: skip
    sys.exit(wrong is not None)
