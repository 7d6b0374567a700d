"""The hub, through the real client in a process of its own, against a server on this machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from eval_model import write_small
from hub_server import HubServer, Repository

import refmamba
from refmamba.commands.main import refmamba as command_line
from refmamba.errors import HubError, JSONError
from refmamba.formats.hub import ModelFiles, resolve_model
from refmamba.run.session import ModelChoice, open_model

HF = {
    "config.json": b'{"model_type": "mamba"}', "model.safetensors": b"weights of main" * 1000, "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }", "generation_config.json": b"{  }", "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted", "hf-F16.gguf": b"not wanted",
}  # fmt: skip
SHARDED = {
    "config.json": b'{"model_type": "mamba"}', "model.safetensors.index.json": b"{}", "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two",
}  # fmt: skip
ORIGINAL = {"config.json": b'{"d_model": 768}', "pytorch_model.bin": b"zip", "original.gguf": b"not wanted"}
GGUF = {"gguf-F32.gguf": (Path(__file__).parent / "fuzz/seeds/gguf/model.gguf").read_bytes(), "README.md": b"not wanted"}
SEVERAL = {"config.json": b"{}", "tokenizer.json": b"own", "a.gguf": b"not wanted", "b.gguf": b"b", "c/d.gguf": b"d"}
SECRET = "hf_secretsecret"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    repositories = {
        "state/hf": Repository({"main": HF, "early": HF | {"model.safetensors": b"weights of early"}}),
        "state/sharded": Repository({"main": SHARDED}),
        "state/gguf": Repository({"main": GGUF}),
        "state/several": Repository({"main": SEVERAL}),
        "state/original": Repository({"main": ORIGINAL}),
        "state/no-tokenizer": Repository({"main": {name: HF[name] for name in ("config.json", "model.safetensors")}}),
        "state/private": Repository({"main": HF}, token=SECRET),
        "state/gated": Repository({"main": HF}, gated=True),
        "EleutherAI/gpt-neox-20b": Repository({"main": {"tokenizer.json": b"neox", "model.safetensors": b"not wanted"}}),
    }
    with HubServer(repositories) as server:
        yield server


PROGRAM = """
import sys
from refmamba.errors import CheckpointError, HubError
from refmamba.formats.hub import resolve_model
try:
    files = resolve_model(*sys.argv[1:])
except HubError as error:
    sys.exit(f"HubError: {error}")
print(files.folder)
print(files.tokenizer)
"""


class Client:
    """Runs resolve_model in a process with a cache of its own."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
        self.env = kept | {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "PYTHONPATH": str(Path(refmamba.__file__).parents[1]),
        }  # fmt: skip

    def run(self, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", PROGRAM, *words]
        return subprocess.run(command, env=self.env | env, cwd=self.home, capture_output=True, text=True, timeout=60)

    def resolve(self, *words: str, **env: str) -> ModelFiles:
        done = self.run(*words, **env)
        assert done.returncode == 0, done.stderr
        folder, tokenizer = done.stdout.splitlines()
        return ModelFiles(Path(folder), Path(tokenizer))

    def error(self, *words: str, **env: str) -> str:
        """The error, which is one line, and no traceback."""
        done = self.run(*words, **env)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        *noise, last = done.stderr.splitlines()  # the client may have warned before
        assert not any("HubError" in line for line in noise)
        assert last.startswith("HubError: ")
        return last.removeprefix("HubError: ")

    def refmamba(self, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """The command."""
        command = [sys.executable, "-m", "refmamba", *words]
        return subprocess.run(command, env=self.env | env, cwd=self.home, capture_output=True, text=True, timeout=100)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub.endpoint, tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_download_has_one_format_of_the_weights(hub: HubServer, client: Client) -> None:
    files = client.resolve("state/hf")
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert contents(files.folder) == {name: HF[name] for name in names}
    assert files.tokenizer == files.folder / "tokenizer.json"
    assert hub.downloads() == names


def test_second_run_downloads_nothing_and_needs_no_network(hub: HubServer, client: Client) -> None:
    files = client.resolve("state/hf")
    hub.requests.clear()
    assert client.resolve("state/hf") == files
    assert hub.downloads() == []
    hub.requests.clear()
    assert client.resolve("state/hf", HF_HUB_OFFLINE="1") == files
    assert hub.requests == []
    hub.down = True
    assert client.resolve("state/hf") == files


def test_shards(client: Client) -> None:
    assert contents(client.resolve("state/sharded").folder) == SHARDED


def test_the_only_gguf_file_is_the_model_where_there_are_no_other_weights(hub: HubServer, client: Client) -> None:
    done = client.refmamba("info", "state/gguf")
    assert "GGUF file" in done.stdout, done.stderr
    assert hub.downloads() == ["gguf-F32.gguf"]
    hub.requests.clear()
    files = client.resolve("state/gguf", HF_HUB_OFFLINE="1")
    assert files.folder.read_bytes() == GGUF["gguf-F32.gguf"]
    assert hub.requests == []
    hub.down = True
    assert client.resolve("state/gguf") == files


def test_an_export_is_called_after_the_gguf_file(client: Client) -> None:
    pytest.importorskip("gguf")
    done = client.refmamba("export", "state/gguf:gguf-F32.gguf", "out", "--format", "gguf", "--type", "F16")
    assert (done.returncode, done.stdout.strip()) == (0, str(Path("out", "gguf-F32-F16.gguf"))), done.stderr
    assert [file.name for file in (client.home / "out").iterdir()] == ["gguf-F32-F16.gguf"]


def test_of_several_gguf_files_one_is_named(hub: HubServer, client: Client) -> None:
    message = client.error("state/several")
    assert (
        message == "model state/several: has 3 GGUF files; name one of them, as state/several:a.gguf: a.gguf, b.gguf, c/d.gguf"
    )
    assert hub.downloads() == ["config.json", "tokenizer.json"]
    files = client.resolve("state/several:c/d.gguf")
    assert (files.folder.read_bytes(), files.tokenizer.read_bytes()) == (b"d", b"own")
    assert client.resolve("state/several:b.gguf", "main").folder.read_bytes() == b"b"
    assert client.resolve("state/several:b.gguf", HF_HUB_OFFLINE="1").folder.read_bytes() == b"b"
    assert hub.downloads() == ["b.gguf", "config.json", "d.gguf", "tokenizer.json"]
    for file in ("e.gguf", "../b.gguf"):
        assert f"model state/several:{file}: " in client.error(f"state/several:{file}")


def test_original_repository_gets_the_tokenizer_of_neox(hub: HubServer, client: Client) -> None:
    files = client.resolve("state/original")
    assert contents(files.folder) == {name: ORIGINAL[name] for name in ("config.json", "pytorch_model.bin")}
    assert files.tokenizer.read_bytes() == b"neox"
    assert hub.downloads() == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert client.resolve("state/original", HF_HUB_OFFLINE="1") == files


def test_other_repositories_do_not_get_a_foreign_tokenizer(hub: HubServer, client: Client) -> None:
    files = client.resolve("state/no-tokenizer")
    assert files.tokenizer == files.folder / "tokenizer.json"
    assert not any("neox" in path for _, path in hub.requests)


def test_revision(hub: HubServer, client: Client) -> None:
    early = client.resolve("state/hf", "early").folder
    assert (early / "model.safetensors").read_bytes() == b"weights of early"
    assert (client.resolve("state/hf").folder / "model.safetensors").read_bytes() == HF["model.safetensors"]
    assert client.resolve("state/hf", early.name).folder == early  # the commit
    assert client.resolve("state/hf", "early", HF_HUB_OFFLINE="1").folder == early
    assert "has no revision late" in client.error("state/hf", "late")


def test_token_is_passed(client: Client) -> None:
    assert "model state/private" in client.error("state/private")
    assert (client.resolve("state/private", HF_TOKEN=SECRET).folder / "model.safetensors").is_file()


def test_unknown_repository(client: Client) -> None:
    message = client.error("state/unknown")
    assert "model state/unknown" in message
    assert "not on the hub" in message


def test_gated_repository(client: Client) -> None:
    assert "state/gated: is gated" in client.error("state/gated")


def test_offline_and_not_cached(hub: HubServer, client: Client) -> None:
    assert "HF_HUB_OFFLINE is set" in client.error("state/hf", HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_interrupted_download_is_not_taken_for_a_model(client: Client) -> None:
    (client.resolve("state/hf").folder / "model.safetensors").unlink()
    assert "not in the cache" in client.error("state/hf", HF_HUB_OFFLINE="1")


def test_hub_that_fails_or_is_not_there(hub: HubServer, client: Client) -> None:
    hub.down = True
    assert "does not answer" in client.error("state/hf")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "does not answer" in client.error("state/hf", HF_ENDPOINT=nobody)
    assert "model state/hf" in client.error("state/hf", HF_ENDPOINT="nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./state/hf",
        "/state/hf",
        "~/hf",
        "a/b/c",
        "",
        "state/h f",
        "state/",
        "state/hf.gguf",
        "state/hf:config.json",
        "state/hf:",
        "a/b/c:d.gguf",
    ],
)
def test_names_that_are_no_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="no such folder") as raised:
        resolve_model(name)
    assert "\n" not in str(raised.value)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("state").mkdir()
    Path("state/hf").write_text("weights")
    with pytest.raises(HubError, match="model state/hf: is a file; name the folder"):
        resolve_model("state/hf")


def test_folder_wins_and_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("state/hf")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert resolve_model("state/hf") == ModelFiles(folder, folder / "tokenizer.json")
    with pytest.raises(HubError, match="has no revision early"):
        resolve_model("state/hf", "early")


def test_small_is_the_model_in_the_package_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    assert resolve_model("small").folder == Path(refmamba.__file__).parent / "small_model"
    assert resolve_model("./small").folder == Path("small")


def test_local_folder_in_the_original_layout_gets_the_tokenizer_of_neox(client: Client, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes(ORIGINAL["config.json"])
    files = client.resolve("mine")
    assert files.tokenizer.read_bytes() == b"neox"
    (tmp_path / "mine" / "tokenizer.json").write_text("own")
    assert client.resolve("mine").tokenizer == Path("mine/tokenizer.json")


def test_a_broken_config_asks_the_hub_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said by the checkpoint's reader, with the file's name."""
    (tmp_path / "config.json").write_text('{"d_model": 768', encoding="utf-8")
    monkeypatch.setattr("refmamba.formats.hub._download_neox_tokenizer", lambda: pytest.fail("asked the hub"))
    assert resolve_model(str(tmp_path)) == ModelFiles(tmp_path, tmp_path / "tokenizer.json")
    with pytest.raises(JSONError, match=r"config\.json: not JSON"):
        open_model(ModelChoice(str(tmp_path)))


# --- push -------------------------------------------------------------------------------------------------------------

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A small folder under int8, with a file that is not the model's."""
    folder = refmamba.quantize(write_small(tmp_path / "floats"), tmp_path / "mine", scheme="int8")
    (folder / "secret.txt").write_text("not the model's")
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def test_a_folder_is_pushed_and_comes_back(hub: HubServer, client: Client, quantized: Path) -> None:
    hub.writer = SECRET
    words = ("push", str(quantized), "me/mine", "--source", "state/hf", "--text", "text.txt")
    done = client.refmamba(*words, HF_TOKEN=SECRET)
    assert (done.returncode, done.stdout) == (0, f"{hub.endpoint}/me/mine\n"), done.stderr
    pushed = hub.repositories["me/mine"].revisions["main"]
    assert sorted(pushed) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert all(pushed[file.name] == file.read_bytes() for file in quantized.iterdir() if file.name != "secret.txt")
    bits = refmamba.load(quantized).perplexity(TEXT).bits_per_byte
    card = pushed["README.md"].decode()
    assert card.startswith("---\nbase_model: state/hf\nlibrary_name: refmamba\n")
    for line in ("| source | state/hf |", "| scheme | `int8` |", f"| refmamba's specification | {refmamba.SPEC_VERSION} |",
                 f"| text.txt, {len(TEXT)} bytes | {bits:.4f} bits a byte |", "scheme int8"):  # fmt: skip
        assert line in card.splitlines(), line
    assert contents(client.resolve("me/mine").folder).keys() == pushed.keys() - {"README.md"}


def test_who_may_not_write_is_told_in_one_line(hub: HubServer, client: Client, quantized: Path) -> None:
    """Also: a README.md in the folder is the card, and nothing is measured."""
    (quantized / "README.md").write_text("mine")
    done = client.refmamba("push", str(quantized), "me/mine", HF_TOKEN="hf_wrong")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        "refmamba: me/mine: the hub does not let you write there; set HF_TOKEN to a token that may"
    )
    assert "Traceback" not in done.stderr
    assert "scoring" not in done.stderr
    assert "me/mine" not in hub.repositories


@pytest.mark.parametrize(
    ("folder", "repository", "words"),
    [("nowhere", "me/mine", "nowhere: no such folder"), (".", "mine", "give the repository as OWNER/NAME"),
     (".", "me/", "give the repository as OWNER/NAME"), (".", "me/mi/ne", "give the repository as OWNER/NAME")],
)  # fmt: skip
def test_what_cannot_be_pushed_is_told_before_any_work(folder: str, repository: str, words: str) -> None:
    done = CliRunner().invoke(command_line, ["push", folder, repository])
    assert isinstance(done.exception, HubError)
    assert words in str(done.exception)
