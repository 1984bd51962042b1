"""``hf://`` addresses: what is fetched, what never is, every way to fail, and that local paths need none of it."""

from __future__ import annotations

import fnmatch
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import statewise
from statewise.cli import main
from statewise.errors import WeightsError
from statewise.weights import files, hub

RWKV = "hf://owner/name"


class Hub:
    """Stands in for the client: one repository in a folder, a cache, and a network that can be cut."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.cache = folder / "repository", folder / "cache"
        self.repository.mkdir()
        self.error: Exception | None = None
        self.asked: list[tuple[str, str | None]] = []

    def add(self, *names: str) -> None:
        for name in names:
            (self.repository / name).parent.mkdir(parents=True, exist_ok=True)
            (self.repository / name).write_text("{}")

    def model_info(self, repo_id: str, *, revision: str | None) -> SimpleNamespace:
        self.asked.append((repo_id, revision))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in _names(self.repository)])

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        if local_files_only or self.error is not None:
            if not self.cache.exists():
                raise self.error or RuntimeError("nothing in the cache")
            return str(self.cache)
        for name in _names(self.repository):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.repository / name, self.cache / name)
        return str(self.cache)

    @property
    def fetched(self) -> list[str]:
        return _names(self.cache)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)  # type: ignore[arg-type]
    return made


def _tiny() -> Any:
    return statewise.create("rwkv4", vocab_size=32, num_layers=2, width=16)


def _same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_directory_is_its_configuration_and_tensors(client: Hub) -> None:
    model = _tiny()
    statewise.save(model, client.repository)
    client.add("modeling_rwkv.py", "tokenizer.json", "tokenization.py", "README.md", "old/model.safetensors", "a.pth")
    assert _same(statewise.load(RWKV), model)
    assert client.fetched == ["config.json", "model.safetensors"]
    assert client.asked == [("owner/name", None)]


def test_shards_come_with_their_index(client: Hub) -> None:
    from safetensors.torch import save_file

    model = _tiny()
    statewise.save(model, client.repository)
    (client.repository / "model.safetensors").unlink()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, client.repository / file)
        where |= dict.fromkeys(part, file)
    (client.repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    client.add("pytorch_model.bin", "model-00001-of-00002.gguf", "model.py", "xmodel-00001-of-00002.safetensors")
    assert _same(statewise.load(RWKV), model)
    assert client.fetched == ["config.json", *sorted(set(where.values())), "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("holds", "wanted"),
    [
        (["config.json", *hub.TENSORS], ["config.json", "model.safetensors"]),
        (["config.json", *hub.TENSORS[1:]], ["config.json", "model.safetensors.index.json"]),
        (["config.json", "pytorch_model.bin", "model.pth"], ["config.json", "pytorch_model.bin"]),
        (["config.json", "RWKV.pth", "x.py"], ["RWKV.pth"]),
        (["README.md", "deep/other.pth", "RWKV.pth"], ["RWKV.pth"]),
        (["model.safetensors", "tokenizer.json"], ["model.safetensors"]),
        (["odd[1].gguf", "odd1.py"], ["odd[1].gguf"]),
    ],
    ids=lambda names: " ".join(names),
)
def test_one_choice_for_every_repository(client: Hub, holds: list[str], wanted: list[str]) -> None:
    client.add(*holds)
    found = hub.local_path(RWKV)
    assert client.fetched == wanted
    assert found == (client.cache if wanted[0] == "config.json" else client.cache / wanted[0])


def test_the_order_is_that_of_a_local_directory() -> None:
    assert hub.TENSORS == files._NAMES


def test_a_file_and_a_revision_by_name(client: Hub) -> None:
    model = _tiny()
    statewise.save(model, client.repository / "RWKV-4.pth", format="rwkv")
    client.add("config.json", "deep/other.pth", "modeling.py")
    assert _same(statewise.load(f"{RWKV}@v1.0/RWKV-4.pth"), model)
    assert hub.local_path(f"{RWKV}@refs/pr/7/deep/other.pth") == client.cache / "deep/other.pth"
    assert client.fetched == ["RWKV-4.pth", "deep/other.pth"]
    assert client.asked == [("owner/name", "v1.0"), ("owner/name", "refs/pr/7")]


def test_several_checkpoints_are_listed_not_guessed_among(client: Hub) -> None:
    client.add(*(f"RWKV-{size}.pth" for size in range(10, 30)), "config.yaml")
    with pytest.raises(WeightsError, match=r"^hf://owner/name: holds 20 checkpoints; add /FILE, one of: RWKV-10\.pth,"):
        statewise.load(RWKV)
    with pytest.raises(WeightsError, match=r"has no file RWKV-1\.pth; there are: RWKV-10\.pth,.* and 8 more$"):
        statewise.load(f"{RWKV}/RWKV-1.pth")
    assert not client.cache.exists()


def test_a_repository_without_a_checkpoint(client: Hub) -> None:
    client.add("config.json", "weights.py", "model.safetensors.txt", "flax_model.msgpack")
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        statewise.load(RWKV)
    assert not client.cache.exists()


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://name",
        "hf://owner/",
        "hf:///name",
        "hf://owner/na me",
        "hf://owner/name/",
        "hf://owner/name@",
        "hf://owner/name@/model.pth",
        "hf://owner/..",
        "hf://../name",
        "hf://owner/name@../../x",
        "hf://owner/name@a..b",
        "hf://owner--x/name",
        "hf://owner/name//model.pth",
        "hf://owner/name/../other/model.pth",
        "hf://owner/name/a\\b.pth",
        "hf://owner/name/a\n.pth",
        "hf://owner/name/code.py",
        "hf://owner/name/tokenizer.json",
        "hf://owner/name/*",
        f"hf://owner/{'n' * 97}",
    ],
)
def test_a_malformed_address_is_a_callers_mistake(client: Hub, address: str) -> None:
    with pytest.raises(ValueError, match=r"^address 'hf://"):
        statewise.load(address)
    assert not client.asked


def _raised(name: str, *bases: type[Exception]) -> Exception:
    return type(name, bases or (OSError,), {})("first line\nsecond line, with an address")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_raised("RepositoryNotFoundError"), "no such repository"),
        (_raised("GatedRepoError", type("RepositoryNotFoundError", (OSError,), {})), "on request"),
        (_raised("RevisionNotFoundError"), "no such revision"),
        (_raised("OfflineModeIsEnabled", ConnectionError), "switched offline"),
        (ConnectionError("no route"), "cannot be reached"),
        (_raised("ReadTimeout", type("TimeoutException", (Exception,), {})), "does not answer"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "RuntimeError: no reason given"),
        (RuntimeError("one\ntwo"), "RuntimeError: one$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_whatever_the_client_raises_is_one_line(client: Hub, error: Exception, says: str) -> None:
    client.error = error
    with pytest.raises(WeightsError, match=says) as caught:
        statewise.load(RWKV)
    assert str(caught.value).startswith("hf://owner/name: ")
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_or_stops_short(client: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client.add("RWKV.pth")
    monkeypatch.setattr(client, "snapshot_download", lambda **_: (_ for _ in ()).throw(ConnectionResetError("reset")))
    with pytest.raises(WeightsError, match="cannot be reached"):
        statewise.load(RWKV)
    monkeypatch.setattr(client, "snapshot_download", lambda **_: str(tmp_path))
    with pytest.raises(WeightsError, match=r"RWKV\.pth did not arrive"):
        statewise.load(RWKV)


def test_what_was_fetched_once_opens_without_the_hub(client: Hub) -> None:
    model = _tiny()
    statewise.save(model, client.repository)
    statewise.load(RWKV)
    client.error = ConnectionError("no route")
    assert _same(statewise.load(RWKV), model)
    with pytest.raises(WeightsError, match=r"has no file other\.pth; there are: model\.safetensors"):
        statewise.load(f"{RWKV}/other.pth")


def test_without_the_client_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"huggingface_hub: pip install 'statewise.hub.'"):
        statewise.load(RWKV)


def test_local_paths_need_neither_client_nor_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    model = _tiny()
    statewise.save(model, tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    for path in ("owner/name", Path("owner/name"), "owner/name/model.safetensors"):
        assert _same(statewise.load(path), model)
    with pytest.raises(FileNotFoundError):
        statewise.load("owner/other")
    with pytest.raises(FileNotFoundError):  # a Path is a path
        statewise.load(Path("hf://owner/name"))


def test_loading_a_local_file_imports_no_client(tmp_path: Path) -> None:
    statewise.save(_tiny(), tmp_path / "model")
    code = "import sys, statewise; statewise.load('model'); print({'huggingface_hub', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_client_itself_switched_offline(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the optional package huggingface_hub is not installed")
    code = (
        "import statewise\n"
        "for address in ('hf://owner/name', 'hf://owner/name@main/model.pth'):\n"
        "    try: statewise.load(address)\n"
        "    except statewise.WeightsError as error: print(error)\n"
    )
    place = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("hf://owner/name: the client is switched offline (HF_HUB_OFFLINE)")
    assert second.startswith("hf://owner/name@main/model.pth: the client is switched offline")
    assert done.stderr == ""


def test_the_clients_own_cache_opens_offline(tmp_path: Path) -> None:
    """The layout is the client's: a reference to a commit, and a snapshot of it."""
    pytest.importorskip("huggingface_hub", reason="the optional package huggingface_hub is not installed")
    for name, format, file in (("ours", "statewise", ""), ("raw", "rwkv", "RWKV.pth")):
        place = tmp_path / f"hub/models--owner--{name}"
        (place / "snapshots" / COMMIT).mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(COMMIT)
        statewise.save(_tiny(), place / "snapshots" / COMMIT / file, format=format)
    code = (
        "import statewise\n"
        "for address in ('hf://owner/ours', 'hf://owner/ours@main/model.safetensors', 'hf://owner/raw',\n"
        f"                'hf://owner/raw/RWKV.pth', 'hf://owner/raw@{COMMIT}'):\n"
        "    print(statewise.load(address).config.width)\n"
    )
    place_vars = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=place_vars, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16"] * 5


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A hub on this machine: as much of its protocol as the client speaks with it here, and what it was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/owner/name/resolve/{COMMIT}/"):
                name = path.split("/", 5)[5]
                self.server.sent.append(name)  # type: ignore[attr-defined]
                content = (folder / name).read_bytes()
                self._send(content, hashlib.sha256(content).hexdigest())
            elif path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
                siblings = [{"rfilename": name} for name in _names(folder)]
                self._send(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
            elif path == f"/api/models/owner/name/tree/{COMMIT}":
                sizes = {name: (folder / name).stat().st_size for name in _names(folder)}
                files = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
                self._send(json.dumps(files).encode())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()

        do_HEAD = do_GET

        def _send(self, content: bytes, tag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    made.sent, made.folder = [], folder  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_client_fetches_from_a_hub(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the optional package huggingface_hub is not installed")
    statewise.save(_tiny(), server.folder)
    (server.folder / "modeling.py").write_text("raise SystemExit('run')")
    (server.folder / "tokenizer.json").write_text("{}")
    code = (
        "import statewise\n"
        "print(statewise.load('hf://owner/name').config.width)\n"
        "try: statewise.load('hf://owner/absent')\n"
        "except statewise.WeightsError as error: print(error)\n"
    )
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    ask = [sys.executable, "-c", code]
    done = subprocess.run(ask, env={**where, "PATH": "", "HOME": str(tmp_path)}, capture_output=True, text=True)
    width, absent = done.stdout.splitlines() or [done.stderr, ""]
    assert width == "16"
    assert absent.startswith("hf://owner/absent: no such repository")
    assert {*server.sent} == {"config.json", "model.safetensors"}
    assert "Traceback" not in done.stderr


COMMANDS: list[list[str]] = [
    ["inspect", RWKV, "--json"],
    ["generate", RWKV, "--prompt", "\x01", "--max-tokens", "2", "--tokenizer", "bytes", "--json"],
    ["verify", RWKV, "--length", "8", "--json"],
    ["evaluate", RWKV, "--data", "text", "--no-yardsticks", "--json"],
    ["convert", RWKV, "out.pth", "--to", "rwkv", "--json"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_every_command_takes_an_address(
    client: Hub,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stirred: Callable[[], Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"some words to read " * 20)
    statewise.save(stirred(), client.repository)
    assert main(arguments) == 0, capsys.readouterr().err
    assert client.fetched == ["config.json", "model.safetensors"]
    capsys.readouterr()
    client.error, client.cache = ConnectionError("no route"), tmp_path / "empty"
    (tmp_path / "out.pth").unlink(missing_ok=True)
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err == (
        "statewise: error: hf://owner/name: the hub cannot be reached, and the client's cache has not what is needed\n"
    )
    assert told.out == ""


@pytest.fixture
def stirred() -> Callable[[], Any]:
    from statewise.inference import stir

    def make() -> Any:
        model = statewise.create("rwkv4", vocab_size=256, num_layers=2, width=16)
        stir(model)
        return model

    return make
