"""Hub ids: only data files are fetched, here from a local server; offline the cache is used, or the error says so."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

from ditc.export.checkpoint.hub import is_hub_id, wanted_files
from ditc.export.checkpoint.open import open_checkpoint
from ditc.runtime.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": json.dumps({"transformer": ["diffusers", "SanaTransformer2DModel"]}).encode(),
    "README.md": b"# not needed",
    "checkpoints/net.pth": b"never fetched",
    "transformer/config.json": b'{"num_layers": 1}',
    "transformer/diffusion_pytorch_model.safetensors": save({"w": torch.ones(3)}),
    "transformer/diffusion_pytorch_model.fp16.safetensors": save({"w": torch.ones(3).half()}),
    "transformer/diffusion_pytorch_model.bin": b"never fetched",
    "transformer/modeling.py": b"never fetched",
}


class Hub(BaseHTTPRequestHandler):
    """The three calls of the hub's protocol that fetching needs: tree, revision and resolve."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/net/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in FILES.items()
            ]
            self._answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/org/net"):
            facts = {"id": "org/net", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self._answer(json.dumps(facts).encode())
        elif path.startswith("/org/net/resolve/"):
            name = path.split("/", 5)[5]
            self.server.fetched.append(name)  # type: ignore[attr-defined]
            self._answer(FILES[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A hub on a free port that holds FILES as org/net, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_fetches_safetensors_and_json_only(hub: ThreadingHTTPServer) -> None:
    checkpoint = open_checkpoint("org/net")
    assert torch.equal(checkpoint.component("transformer").tensors["w"], torch.ones(3))
    assert set(hub.fetched) == {  # type: ignore[attr-defined]
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_a_variant_fetches_that_variants_weights_only(hub: ThreadingHTTPServer) -> None:
    checkpoint = open_checkpoint("hf://org/net@main", variant="fp16")
    assert checkpoint.component("transformer").tensors.dtype("w") is torch.float16
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.fetched  # type: ignore[attr-defined]


def test_what_was_fetched_once_opens_offline(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_checkpoint("org/net")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/net").component("transformer").config["num_layers"] == 1


def test_a_model_that_the_hub_lacks_is_named(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(CheckpointError, match=r"the hub has no model org/other"):
        open_checkpoint("org/other")


# The hub's client tries a dead address for 24 s before it gives up.
@pytest.mark.parametrize("offline", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_network_and_cache_the_error_says_how_to_fetch_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CheckpointError, match=r"cannot fetch org/net: no such folder here") as caught:
        open_checkpoint("org/net")
    assert "hf download org/net" in str(caught.value.hint)


def test_a_folder_that_exists_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "net").mkdir(parents=True)
    assert not is_hub_id("org/net")
    assert is_hub_id("org/other")
    assert not any(map(is_hub_id, ("/abs/path", "./org/net2", "org", "a/b/c", "../org")))


def test_shards_indices_and_vocabularies_are_fetched_and_other_layouts_are_not() -> None:
    files = [
        "net_1024px.safetensors",
        "model_index.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.model",
        "tokenizer_3/spiece.model",
        "other/weights.model",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "deep/er/config.json",
        "unet/model.onnx",
        "text_encoders/t5xxl_fp16.safetensors",
    ]
    default = {*files[1:5], *files[6:9]}
    assert set(wanted_files(files, None)) == default
    assert set(wanted_files(files, "fp16")) == default - {files[7], files[8]} | {files[9], files[10]}


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
