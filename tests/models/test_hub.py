"""Models by hub id: from a hub that is served here, from a cache without one, and what is never asked of it."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import huggingface_hub
import pytest
from huggingface_hub import constants

from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.models import Tokenizer, checkpoint_folder, load_decoder
from mlora_jax.models.hub import SETTINGS
from mlora_jax.run.inputs import model_folder
from tests.tiny import write_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEVER = ("pytorch_model.bin", "consolidated.safetensors", "original/params.json")  # there, and none of our business


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_into_cache(cache, model, *files):
    """A snapshot of owner/tiny with some of a model's files, as a download leaves it."""
    snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_bytes((model / name).read_bytes())
    (cache / "models--owner--tiny" / "refs").mkdir()
    (cache / "models--owner--tiny" / "refs" / "main").write_text(COMMIT)
    return snapshot


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a server: a commit, its files, and each of them."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path, files = self.path.partition("?")[0], self.server.files
        self.server.asked.append((self.command, path, self.headers.get("Authorization")))
        _, _, rest = path.partition("/owner/tiny/")
        if "/owner/tiny/" not in path:
            code = "GatedRepo" if "/gated/" in path else "RepoNotFound"
            return self.send(403 if code == "GatedRepo" else 404, b"{}", with_body, {"X-Error-Code": code})
        if rest == "revision/v0":
            return self.send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        if rest in ("revision/main", "revision/v1"):
            return self.send_json({"id": "owner/tiny", "sha": COMMIT, "private": False}, with_body)
        if rest in (f"tree/{COMMIT}", "tree/main", "tree/v1"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            return self.send_json(tree, with_body)
        name = rest.removeprefix(f"resolve/{COMMIT}/")
        extra = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        return self.send(200, files[name], with_body, extra)

    def send_json(self, values, with_body):
        self.send(200, json.dumps(values).encode(), with_body, {"Content-Type": "application/json"})

    def send(self, status, body, with_body, extra):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(model):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {file.name: file.read_bytes() for file in model.iterdir()} | dict.fromkeys(NEVER, b"no")
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


DOWNLOAD = """
import json
from mlora_jax.models import Tokenizer, checkpoint_folder, load_decoder

found = {"layers": load_decoder("owner/tiny").config.num_layers, "folder": str(checkpoint_folder("owner/tiny"))}
found["tokens"] = Tokenizer.load("owner/tiny").vocab_size
found["v1"] = str(checkpoint_folder("owner/tiny@v1"))
for name in ("owner/none", "gated/tiny", "owner/tiny@v0"):
    try:
        load_decoder(name)
    except FileNotFoundError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_a_model_is_downloaded_from_the_hub_once(hub, model, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_mine",
        "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    run = subprocess.run(
        [sys.executable, "-c", DOWNLOAD],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["layers"], found["tokens"]) == (2, Tokenizer.load(model).vocab_size)
    assert pathlib.Path(found["folder"]).is_relative_to(tmp_path / "hub" / "models--owner--tiny")
    wanted = {file.name for file in model.iterdir()} & {*SETTINGS, "model.safetensors"}
    assert {file.name for file in pathlib.Path(found["folder"]).iterdir()} == wanted
    fetched = [path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
    assert sorted(fetched) == sorted(wanted)
    assert fetched[-1] == "model.safetensors"  # After the config, which may name a model that is not supported.
    assert {token for _, path, token in hub.asked if "owner/tiny" in path} == {"Bearer hf_mine"}
    assert (
        "'owner/none' is neither a folder nor a model on the hub: check the name; if it is private"
        in found["owner/none"]
    )
    assert found["v1"] == found["folder"]  # the same commit
    assert any(path.endswith("owner/tiny/revision/v1") for _, path, _ in hub.asked)
    assert found["owner/tiny@v0"].startswith("'owner/tiny' has no branch, tag or commit 'v0' on the hub")
    assert "it is gated: accept its terms at https://huggingface.co/gated/tiny" in found["gated/tiny"]
    assert "Fetching" in run.stderr  # huggingface_hub's own progress.


def test_a_cached_model_needs_no_network(cache, model):
    snapshot = put_into_cache(cache, model, *(file.name for file in model.iterdir()))
    assert checkpoint_folder("owner/tiny") == snapshot == model_folder("owner/tiny")
    assert load_decoder("owner/tiny").config == load_decoder(model).config
    assert Tokenizer.load("owner/tiny").vocab_size == Tokenizer.load(model).vocab_size
    assert load_adapted(checkpoint="owner/tiny").name == "owner/tiny"


def test_a_revision_is_another_snapshot(cache, model):
    snapshot = put_into_cache(cache, model, *(file.name for file in model.iterdir()))
    for revision in ("main", COMMIT):
        assert checkpoint_folder(f"owner/tiny@{revision}") == snapshot
        assert load_adapted(checkpoint=f"owner/tiny@{revision}").name == f"owner/tiny@{revision}"
    message = r"nothing of its revision 'refs/pr/3' .*`hf download owner/tiny --revision refs/pr/3`"
    with pytest.raises(FileNotFoundError, match=message):
        load_decoder("owner/tiny@refs/pr/3")


def test_offline_it_is_said_what_is_missing(cache, model):
    message = r"'owner/tiny' is no folder, and the hub's cache .*cache has nothing of it \(.*offline mode.*: it lacks "
    with pytest.raises(
        FileNotFoundError, match=message + r"'config.json'. Run again with network access .*`hf download owner"
    ):
        load_decoder("owner/tiny")
    snapshot = put_into_cache(cache, model, "tokenizer.json")
    with pytest.raises(FileNotFoundError, match=f"'owner/tiny' .*{COMMIT}.* lacks 'config.json'"):
        load_decoder("owner/tiny")
    (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=f"'owner/tiny' .*{COMMIT}.* lacks 'model.safetensors'"):
        load_decoder("owner/tiny")
    assert Tokenizer.load("owner/tiny").vocab_size  # which needs no weights
    names = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("abc", names, strict=True))})
    )
    (snapshot / names[1]).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"lacks '{names[0]}', '{names[2]}': the download was cut short"):
        load_decoder("owner/tiny")


def test_weights_of_an_unsupported_model_are_not_downloaded(cache, model):
    snapshot = put_into_cache(cache, model, "config.json")
    (snapshot / "config.json").write_text('{"model_type": "gemma3_text"}')
    with pytest.raises(ValueError, match=r"config.json: model_type 'gemma3_text' is not supported.*'qwen3'"):
        load_decoder("owner/tiny")


@pytest.mark.parametrize(
    "path",
    ["./nope", "../a/b", "models/nope/x", "/models/nope", "~/nope", "nope", "a/b/", "a//b", ".a/b", "a/-b", "a/b..c",
     "a/b.git", "a/b c", "a/b@", "a/b@/x", "a/b@v1@v2", "a@v1/b", "a/b@../c", "a/b.git@v1", "",
     pathlib.Path("owner/tiny")],
)  # fmt: skip
def test_what_looks_like_a_path_is_not_sent_to_the_hub(monkeypatch, tmp_path, path):
    def never(*arguments, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    for load in (load_decoder, Tokenizer.load):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id like 'OWNER/NAME': check"):
            load(path)


def test_a_folder_goes_before_the_hub(cache, model, monkeypatch):
    monkeypatch.chdir(model.parents[0])
    (model.parents[0] / "owner").mkdir()
    (model.parents[0] / "owner" / "tiny").symlink_to(model)
    assert checkpoint_folder("owner/tiny") == pathlib.Path("owner/tiny")
