"""Finding a model's files: inside the package, in a folder, or on the Hugging Face hub.

The hub is reached through huggingface-hub alone, so its cache, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they
mean there, and its progress bars go to stderr.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from refmamba.errors import HubError

SMALL = "small"  # the model inside the package
NEOX = "EleutherAI/gpt-neox-20b"  # whose tokenizer the original repositories use without shipping it
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: the folder of config and weights, and the tokenizer.json (which may be missing)."""

    folder: Path
    tokenizer: Path


def resolve_model(name: str, revision: str | None = None) -> ModelFiles:
    """The files of `small`, of a local folder, or of OWNER/NAME on the hub, downloaded where they are not cached.

    A folder of that name wins over the hub. Raises HubError.
    """
    if name == SMALL:
        folder = Path(str(resources.files("refmamba").joinpath("small_model")))
        return ModelFiles(folder, folder / "tokenizer.json")
    folder = Path(name)
    if folder.is_dir():
        return ModelFiles(folder, folder / "tokenizer.json")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise HubError(f"--model {name}: there is no such folder; give `small`, a folder, or OWNER/NAME on the hub")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> ModelFiles:
    """Fetch config, tokenizer and one form of the weights (safetensors where there is one)."""
    from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError,
        OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError,
    )  # fmt: skip

    wanted, at = name, f" at revision {revision}" if revision else ""
    try:
        weights = ["*.safetensors", "*.safetensors.index.json"]
        if not constants.HF_HUB_OFFLINE and not any(f.endswith(".safetensors") for f in list_repo_files(name, revision=revision)):
            weights = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
        elif constants.HF_HUB_OFFLINE:
            weights = [*weights, "pytorch_model*"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", *TOKENIZER_FILES, *weights]))
        if (folder / "tokenizer.json").is_file():
            return ModelFiles(folder, folder / "tokenizer.json")
        wanted, at = NEOX, ""
        return ModelFiles(folder, Path(hf_hub_download(NEOX, "tokenizer.json")))
    except GatedRepoError as error:
        raise HubError(f"{wanted}: the hub asks for permission: accept its terms there, and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{wanted}: the hub has no revision {revision} of it") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{wanted}: there is no such folder, and no such model on the hub (a private one needs HF_TOKEN)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{wanted}{at}: not in the cache, and the hub cannot be reached (offline?)") from error
    except EntryNotFoundError as error:
        raise HubError(f"{wanted}{at}: a file that the model needs is not there: {_line(error)}") from error
    except HFValidationError as error:
        raise HubError(f"--model {wanted}: there is no such folder, and it is no name on the hub") from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{wanted}{at}: the download failed: {_line(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise HubError(f"{wanted}{at}: the hub cannot be reached: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
