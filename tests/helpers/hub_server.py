"""A Hub on this machine, spoken to over HTTP by huggingface_hub itself: one repository's files, commit by commit."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


class HubServer(ThreadingHTTPServer):
    """Keeps each repository as a dictionary of files; parquet files are uploaded as large ones.

    Attributes:
        repositories: Files by the repository's name.
        large: Content of large files by their SHA-256.
        requests: Method and path of each request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, repository: str) -> str:
        files = self.repositories[repository]
        digests = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())
        return hashlib.sha1(repr(digests).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body, path = self.rfile.read(int(self.headers["Content-Length"])), self._path()
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/datasets/{name}"})
            return
        if path == "api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
            return
        if path.endswith("info/lfs/objects/batch"):
            upload = [
                {**file, "actions": {"upload": {"href": f"{self.server.url}/large/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": upload})
            return
        _, _, owner, name, action, *_ = path.split("/")
        files = self.server.repositories[f"{owner}/{name}"]
        if action == "preupload":
            wanted = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in wanted]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        sha = self.server.sha(f"{owner}/{name}")
        self._answer({"commitUrl": f"{self.server.url}/datasets/{owner}/{name}/commit/{sha}", "commitOid": sha})

    def do_PUT(self) -> None:
        self.server.large[self._path().rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def do_GET(self) -> None:
        parts = self._path().split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        files = self.server.repositories.get(repository)
        if files is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[0] == "datasets":
            content = files.get("/".join(parts[5:]))
            if content is None:
                self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, ETag=etag, X_Repo_Commit=self.server.sha(repository))
        elif parts[4:5] == ["tree"]:
            self._list(files, "/".join(parts[6:]), "recursive=true" in self.path.lower())
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer({"id": repository, "sha": self.server.sha(repository), "siblings": siblings})

    def _list(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if not inside and folder:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        listed: dict[str, dict] = {}
        for name, content in inside.items():
            below, _, _ = name[len(folder) + bool(folder) :].partition("/")
            path = f"{folder}/{below}".strip("/")
            if path != name and not recursive:
                listed[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            else:
                oid = hashlib.sha1(content).hexdigest()
                listed[name] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        self._answer([*listed.values()])

    do_HEAD = do_GET

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        return path


@pytest.fixture
def hub_server(monkeypatch):
    """A running `HubServer`, which huggingface_hub takes for the Hub."""
    server = HubServer()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
