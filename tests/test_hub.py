"""`--push_to_hub` against a Hub on this machine that speaks the few calls it takes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import yaml

import qdora
from qdora.arguments import flags_of
from qdora.cli import main
from tests.test_train import QUICK


class Hub(ThreadingHTTPServer):
    """Knows one token; `refuse` names the calls that fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuse: dict[str, int] = {}
        self.calls: list[str] = []
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_good"
            self.answer("whoami", {"name": "ada", "type": "user"}, 200 if known else 401)
        else:
            self.answer(self.path, {"error": "no such page"}, 404)

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            name = f"ada/{json.loads(body)['name']}"
            self.answer("create", {"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self.answer("validate", {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer("preupload", {"files": files})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            files = [entry["value"] for entry in entries if entry["key"] == "file"]
            self.server.files.update({file["path"]: base64.b64decode(file["content"]) for file in files})
            url = f"{self.server.url}/ada/out/commit/1"
            self.answer("commit", {"commitUrl": url, "commitOid": "1", "success": True})
        else:
            self.answer(self.path, {"error": "no such page"}, 404)

    def answer(self, call: str, content: dict[str, Any], status: int = 200) -> None:
        self.server.calls.append(call)
        status = self.server.refuse.get(call, status)
        body = json.dumps(content if status == 200 else {"error": f"{call} refused"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    place = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + place)
    yield server
    server.shutdown()
    server.server_close()


def flags(base: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    paths = {"model_name_or_path": str(base), "dataset": str(data), "output_dir": str(out)}
    return {**QUICK, **paths, "max_steps": 1, "save_steps": 1, "push_to_hub": True, "hub_token": "hf_good", **more}


def test_the_adapter_and_its_card_go_up_once(hub: Hub, tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "run2" / "checkpoint-3").mkdir(parents=True)
    for name in (".env", "train.jsonl", "run2/adapter_config.json", "run2/checkpoint-3/optimizer.pt"):
        (out / name).write_text("mine")
    qdora.train(**flags(tiny_nf4, pairs_file, out, validation_split_percentage=10, eval_steps=1))
    assert [call for call in hub.calls if not call.startswith("/")][:2] == ["whoami", "create"]
    assert hub.calls.count("commit") == 1
    assert hub.files.keys() == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "log.csv", "loss.png"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }
    assert "# ada/out\n" in hub.files["README.md"].decode()
    assert 'from_pretrained(base, "ada/out")' in hub.files["README.md"].decode()
    for name, content in hub.files.items():
        assert content == (out / name).read_bytes(), name
    head = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert head["library_name"] == "peft"


def test_what_is_refused_is_refused_before_the_training(
    hub: Hub, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, refused, message in [
        ({"hub_token": "hf_bad"}, {}, "--push_to_hub: not logged in to http://127.0.0.1:"),
        ({"hub_model_id": "bob/notes"}, {"create": 403}, "--push_to_hub: ada may not write to bob/notes ("),
        ({"hub_strategy": "checkpoint"}, {}, "--hub_strategy checkpoint: checkpoints stay here"),
    ]:
        hub.refuse = refused
        settings = flags(tiny_nf4, pairs_file, tmp_path / "out", **changes)
        assert main(["train", *flags_of(settings)]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert "commit" not in hub.calls
    hub.refuse, hub.calls = {}, []
    settings = flags(tiny_nf4, tmp_path / "absent.jsonl", tmp_path / "out")
    assert main(["train", *flags_of(settings)]) == 2
    assert not hub.calls  # no empty repository is left there


def test_an_upload_that_fails_leaves_the_adapter(
    hub: Hub, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse, out = {"commit": 403}, tmp_path / "out"
    assert main(["train", *flags_of(flags(tiny_nf4, pairs_file, out))]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the adapter is in {out}, but was not uploaded to ada/out: " in line
    assert f"`hf upload ada/out {out} --include 'adapter_*' README.md 'tokenizer*'` tries again" in line
    qdora.load_model(tiny_nf4, adapter=out)
    assert (out / "README.md").is_file()


def test_a_model_pushed_by_hand_is_an_adapter(hub: Hub, tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=qdora.AdapterConfig(rank=2))
    model.push_to_hub("out", token="hf_good")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    assert "model.safetensors" not in hub.files
