"""Publishing, against a hub on this machine that answers as the real one does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from esft_jax import push


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits, and keeps all files as plain ones."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path, state = self.path, self.server.state
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(401, {"error": "Invalid credentials"})
        if path.endswith("/repos/create"):
            state["created"] = json.loads(body)
            return self.answer(200, {"url": f"{self.server.address}/owner/name"})
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in path:
            state["branch"] = path.rpartition("/")[2]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    state["files"][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/owner/name/commit/1"
            return self.answer(200, {"success": True, "commitOid": "1", "commitUrl": url})
        return self.answer(200, {})

    def do_GET(self):
        right = self.headers.get("Authorization") == "Bearer right"
        self.answer(200 if right else 401, {"id": "owner/name"})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.state = {"files": {}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    token = ["right"]

    def api():
        return huggingface_hub.HfApi(endpoint=server.address, token=token[0])

    monkeypatch.setattr(push, "HfApi", api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server.token = token
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("expert_cfg.json", "manifest.json", "README.md", "model.safetensors"):
        (folder / name).write_text(f"content of {name}")
    (folder / "notes.txt").write_text("private")
    (folder / ".hidden.json").write_text("private")
    return folder


def test_what_belongs_to_the_adapter_is_published(hub, adapter, capsys):
    assert push.main([str(adapter), "owner/name", "--private"]) == 0
    kept = {
        p.name: p.read_bytes()
        for p in adapter.iterdir()
        if p.name not in ("notes.txt", ".hidden.json")
    }
    assert hub.state["files"] == kept
    assert hub.state["created"]["name"] == "name" and hub.state["branch"] == "main"
    assert "published: " in capsys.readouterr().out
    assert push.main([str(adapter), "owner/name", "--branch", "second"]) == 0
    assert hub.state["branch"] == "second"


def test_what_the_hub_refuses_is_one_line(hub, adapter, capsys):
    hub.token[0] = "wrong"
    assert push.main([str(adapter), "owner/name"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: owner/name: not published: ") and error.count("\n") == 1
    hub.server_close()
    hub.shutdown()
    assert push.main([str(adapter), "owner/name"]) == 1
    assert "not published: " in capsys.readouterr().err


def test_what_is_no_result_is_refused(hub, adapter, tmp_path, capsys):
    def refused(folder, *names):
        assert push.main([str(folder), *(names or ["owner/name"])]) == 2
        assert hub.state == {"files": {}}
        return capsys.readouterr().err

    assert "no such folder" in refused(tmp_path / "none")
    assert "owner//name" in refused(adapter, "owner//name")
    (adapter / "README.md").unlink()
    assert "README.md: missing; expected a model card" in refused(adapter)
    (adapter / "model.safetensors").unlink()
    assert "expected an adapter, or a model" in refused(adapter)
