"""A Hugging Face hub on 127.0.0.1 with the few answers that huggingface_hub asks for, and repositories in memory."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories ``{"owner/name": {"file": bytes}}``, served while the ``with`` block lasts.

    Attributes:
      repositories: the content; changes are a new commit.
      asked: ``METHOD path`` of every request.
      gated: repositories that want the token ``hf_licensed``; others with ``hf_`` tokens are refused.
      private: repositories that answer 401 without a token.
      cut: names of files of which every answer ends too early.
    """

    def __init__(self):
        self.repositories, self.asked = {}, []
        self.gated, self.private, self.cut = set(), set(), set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository):
        files = self.repositories[repository]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(head=False)

    def do_HEAD(self):
        self._answer(head=True)

    def log_message(self, *_):
        pass

    def _answer(self, head):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        repository, rest = "/".join(words[:2]), words[2:]
        files = self.hub.repositories.get(repository)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if files is None or (repository in self.hub.private and not token):
            return self._error(404 if token else 401, "RepoNotFound")
        if repository in self.hub.gated and token != "hf_licensed":
            return self._error(403 if token else 401, "GatedRepo")
        commit = self.hub.commit(repository)
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", commit):
            return self._error(404, "RevisionNotFound")
        if not api:
            return self._file(head, files, "/".join(rest[2:]), commit)
        if rest[:1] == ["tree"]:
            entry = lambda name: {"type": "file", "path": name, "size": len(files[name]), "oid": _digest(files[name])}
            return self._json([entry(name) for name in files])
        return self._json({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def _file(self, head, files, name, commit):
        if name not in files:
            return self._error(404, "EntryNotFound")
        content = files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_digest(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content[: len(content) // 2] if name in self.hub.cut else content)
            self.close_connection = name in self.hub.cut

    def _json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:40]


def forget_settings(monkeypatch):
    """Makes the next import of huggingface_hub read the environment again; the old modules come back afterwards."""
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)


def use(monkeypatch, hub, home, **environment):
    """Points huggingface_hub to a served hub and its own cache folder."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in {**settings, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    forget_settings(monkeypatch)
