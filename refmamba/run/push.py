"""`refmamba push`: a model's folder on the hub, with a card that says what it is."""

from pathlib import Path

from refmamba.errors import HubError
from refmamba.formats.folder import content_hash, model_files
from refmamba.formats.gguf import is_gguf
from refmamba.formats.hub import push_files
from refmamba.formats.reading import exists, folder_exists
from refmamba.run.perplexity import text_perplexity
from refmamba.run.session import ModelChoice, Session, open_session
from refmamba.spec import SPEC_VERSION

CARD = "README.md"
FLOATS = "fp32"  # the scheme under which a folder of floats is measured


def push(folder: Path, repository: str, source: str | None, text: str, text_name: str, *, private: bool = False) -> str:
    """Put a model's folder on the hub as OWNER/NAME, its files alone and no others of the folder. Gives the address.

    A README.md in the folder is its card; where there is none it is written: scheme, specification, source (the model that
    was quantized) and the bits per byte of the text, measured now. Raises RefmambaError.
    """
    if not folder_exists(folder) or is_gguf(folder):
        raise HubError(f"{folder}: no such folder; name the one that holds the model")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise HubError(f"{repository}: give the repository as OWNER/NAME")
    session = open_session(ModelChoice(str(folder)), FLOATS)
    files: dict[str, Path | bytes] = {file.name: file for file in model_files(session.opened.files)}
    own = folder / CARD
    files[CARD] = own if exists(own) else card(session, repository, source, text, text_name).encode()
    return push_files(repository, files, f"{repository.split('/')[1]} as {session.scheme.name}", private=private)


def card(session: Session, repository: str, source: str | None, text: str, text_name: str) -> str:
    """The model card: Markdown under the hub's metadata."""
    from huggingface_hub import ModelCardData

    measured, model = text_perplexity(session, text), session.opened.checkpoint
    named = source is not None and source.count("/") == 1
    data = ModelCardData(
        base_model=source if named else None, library_name="refmamba", pipeline_tag="text-generation",
        tags=["mamba", "refmamba", session.scheme.name],
    )  # fmt: skip
    sizes = model.config
    return f"""---
{data.to_yaml()}
---

# {repository.split("/")[1]}

Mamba with {sizes.n_layer} layers, d_model {sizes.d_model} and a vocabulary of {sizes.vocab_size}, for refmamba, which
gives the same bits on every backend and machine.

| | |
| --- | --- |
| source | {source or "not stated"} |
| scheme | `{session.scheme.name}` |
| refmamba's specification | {SPEC_VERSION} |
| content SHA-256 | `{content_hash(model)}` |
| {text_name}, {measured.n_bytes} bytes | {measured.bits_per_byte:.4f} bits a byte |

    pip install refmamba
    refmamba generate --model {repository} "Once upon a time"

## What is quantized

```
{session.scheme.table()}
```
"""
