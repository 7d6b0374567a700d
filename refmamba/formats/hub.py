"""Finding a model's files: inside the package, in a folder, a GGUF file, or on the Hugging Face hub; and putting them there.

The hub is reached through huggingface-hub alone, so its cache, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they
mean there, and its progress bars go to stderr.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

from refmamba.errors import FileError, HubError, printable
from refmamba.formats.gguf import SUFFIX, is_gguf
from refmamba.formats.reading import exists, folder_exists, read_json

SMALL = "small"  # the model inside the package; ./small is a folder of that name
NEOX = "EleutherAI/gpt-neox-20b"  # whose tokenizer the original state-spaces repositories use and do not ship
BESIDE_WEIGHTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
TORCH = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    folder: the model's folder, or its GGUF file. tokenizer: the path of its tokenizer.json, which a broken folder may lack;
    beside a GGUF file it stands in where the file's own is not known.
    """

    folder: Path
    tokenizer: Path


def resolve_model(name: str, revision: str | None = None) -> ModelFiles:
    """The files of `small`, of a folder, of a GGUF file, or of a model on the hub, where what is not cached is downloaded.

    On the hub OWNER/NAME:FILE.gguf names a GGUF file, and OWNER/NAME the repository's only one where it has no other weights.
    A folder wins over the hub. revision: a branch, tag or commit on the hub. A model in the original layout without a
    tokenizer gets GPT-NeoX's from the hub. Raises HubError.
    """
    folder = Path(str(resources.files("refmamba") / "small_model")) if name == SMALL else Path(name)
    if not (name and folder_exists(folder)):
        if name and exists(folder) and is_gguf(folder):
            _no_revision(name, revision)
            return ModelFiles(folder, folder.with_name("tokenizer.json"))
        if name and exists(folder):
            raise HubError(f"model {name}: is a file; name the folder that it lies in")
        repository, colon, file = name.partition(":")
        is_path = repository.count("/") != 1 or name.startswith((".", "/", "~")) or is_gguf(Path(repository))
        if is_path or (colon and not is_gguf(Path(file))):
            raise HubError(f"model {name}: no such folder; give `small`, a folder, a GGUF file, or OWNER/NAME or "
                           f"OWNER/NAME:FILE{SUFFIX} on the hub")  # fmt: skip
        if colon:
            return _download_gguf(repository, file, _snapshot(repository, revision, BESIDE_WEIGHTS))
        files = _download(repository, revision)
        if is_gguf(files.folder):
            return files
        folder = files.folder
    else:
        _no_revision(name, revision)
    tokenizer = folder / "tokenizer.json"
    if not exists(tokenizer) and _original_layout(folder):
        tokenizer = _download_neox_tokenizer()
    return ModelFiles(folder, tokenizer)


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        kind = "file" if is_gguf(Path(name)) else "folder"
        raise HubError(f"model {name} is a {kind} and has no revision {revision}; revisions are of models on the hub")


def _original_layout(folder: Path) -> bool:
    try:
        return "model_type" not in read_json(folder / "config.json")
    except FileError:  # the checkpoint's reader will say what is wrong with it
        return False


def _download(name: str, revision: str | None) -> ModelFiles:
    """The folder in the cache with config, tokenizer, and one format of the weights; or the only GGUF file."""
    from huggingface_hub import constants

    folder = _snapshot(name, revision, BESIDE_WEIGHTS + SAFETENSORS)
    if not any(folder.glob("model*.safetensors")):
        files = _files(name, folder)
        gguf = sorted(file for file in files if file.endswith(SUFFIX))
        if any(fnmatchcase(file, pattern) for file in files for pattern in TORCH):
            _snapshot(name, folder.name, TORCH)
        elif len(gguf) > 1:
            names = printable(", ".join(gguf))
            raise HubError(f"model {name}: has {len(gguf)} GGUF files; name one of them, as {name}:{gguf[0]}: {names}")
        elif gguf:
            return _download_gguf(name, gguf[0], folder)
        elif constants.HF_HUB_OFFLINE:
            # before 2.0 the client takes what is left of an interrupted download for the whole
            raise HubError(f"model {name}: not in the cache, and HF_HUB_OFFLINE is set; unset it to download")
    return ModelFiles(folder, folder / "tokenizer.json")


def _download_gguf(name: str, file: str, folder: Path) -> ModelFiles:
    """A GGUF file of a repository in the cache. folder: the repository's there, with its tokenizer where it has one."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"model {name}:{file}", folder.name):
        return ModelFiles(Path(hf_hub_download(name, file, revision=folder.name)), folder / "tokenizer.json")


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the cache with a repository's files of these patterns; it is named after the commit."""
    from huggingface_hub import snapshot_download

    with _hub_errors(f"model {name}", revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _files(name: str, folder: Path) -> list[str]:
    """The names of a repository's files; where the hub cannot be asked, of those in its folder in the cache."""
    from huggingface_hub import HfApi, errors

    try:
        return [file.rfilename for file in HfApi().model_info(name, revision=folder.name).siblings or []]
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]  # of its HTTP client
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]


def _download_neox_tokenizer() -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"the model has no tokenizer.json, and that of {NEOX}", None):
        return Path(hf_hub_download(NEOX, "tokenizer.json"))


def push_files(repository: str, files: Mapping[str, Path | bytes], message: str, *, private: bool) -> str:
    """Put files into OWNER/NAME on the hub, which is made where it is not there, in one commit. Gives its address.

    files: by the name there; a path, or the content. private: of a repository that is made. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repository, operations, commit_message=message)
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise HubError(f"{repository}: the hub does not let you write there; set HF_TOKEN to a token that may") from error
        raise HubError(f"{repository}: the upload failed: {_line(error)}") from error
    except (errors.HFValidationError, errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        raise HubError(f"{repository}: the upload failed: {_line(error)}") from error
    return address


@contextmanager
def _hub_errors(what: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the client raises into a HubError of one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{what}: is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{what}: no such folder, and not on the hub, or private; check the name, or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what}: the hub has no revision {revision} of it; give a branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set; unset it to download") from error
        raise HubError(f"{what}: not in the cache, and the hub does not answer: {_line(error)}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{what}: no such folder, and no name that the hub could have") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{what}: the repository has no such file") from error
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # of its HTTP client
        raise HubError(f"{what}: the download failed: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of the error's text, or of its cause's where the client wrapped another error."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
