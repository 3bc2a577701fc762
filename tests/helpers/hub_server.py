"""A Hub on this machine, spoken to over HTTP by huggingface_hub itself, which keeps what it gets, commit by commit."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api


LICENCES = {"apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "cc-by-4.0", "other", "unknown"}


def problems(content: str) -> list[str]:
    """What the Hub's schema finds in a model card's front matter, as its documentation lists the fields."""
    front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(front.group(1)) if front else None
    if not isinstance(data, dict):
        return ["no front matter"]
    found, one_or_more = [], (str, list)
    for field, kinds in {"tags": list, "datasets": one_or_more, "base_model": one_or_more, "license": str}.items():
        if field in data and not isinstance(data[field], kinds):
            found.append(f'"{field}" has the wrong type')
    for field in ("base_model", "datasets"):
        values = data.get(field, [])
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                found.append(f'"{field}" {value} is no id')
    if data.get("license", "mit") not in LICENCES or ("license_name" in data and data["license"] != "other"):
        found.append(f'"license" {data["license"]} is not in the list')
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        found.append('"base_model_relation" is not in the list')
    if "base_model_relation" in data and "base_model" not in data:
        found.append('"base_model_relation" without a base_model')
    return found


class Commit(NamedTuple):
    """One commit, with the repository's files after it."""

    repository: str
    revision: str
    message: str
    files: dict[str, bytes]


class HubServer(ThreadingHTTPServer):
    """Keeps each repository as a dictionary of files; parquet and safetensors files are uploaded as large ones.

    Attributes:
        repositories: Files on the branch main by the repository's name.
        branches: Files on other branches by the repository's and the branch's name.
        commits: All of them, oldest first.
        private: Names of repositories that were made private.
        large: Content of large files by their SHA-256.
        requests: Method and path of each request.
        token: That writing needs; None accepts everybody.
        refusal: Status with which every request is answered, such as 503; None for a server that works.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: list[Commit] = []
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token: str | None = None
        self.refusal: int | None = None
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes] | None:
        """On a branch or after a commit; None where there is no such revision."""
        if revision == "main" or (repository, revision) in self.branches:
            return self.branches.get((repository, revision), self.repositories.get(repository))
        known = [commit.files for commit in self.commits if commit.repository == repository]
        known.append(self.repositories.get(repository, {}))
        return next((files for files in known if sha(files) == revision), None)


def sha(files: dict[str, bytes]) -> str:
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

    def _missing(self, what: str, code: str) -> None:
        self._answer({"error": f"{what} not found"}, 404, X_Error_Code=code, X_Error_Message=f"{what} not found")

    def _refuses(self) -> bool:
        """Whether a request was answered with an error already."""
        if self.server.refusal is not None:
            self._answer({"error": "out of order"}, self.server.refusal)
        elif (
            self.command == "POST"
            and self.server.token is not None
            and self.headers["Authorization"] != f"Bearer {self.server.token}"
        ):
            message = "Invalid credentials in Authorization header"
            self._answer({"error": message}, 401, X_Error_Message=message)
        else:
            return False
        return True

    def do_POST(self) -> None:
        body, path = self.rfile.read(int(self.headers["Content-Length"])), self._path()
        if self._refuses():
            return
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name not in self.server.repositories and (asked.get("private") or asked.get("visibility") == "private"):
                self.server.private.add(name)
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{'datasets/' * (asked.get('type') == 'dataset')}{name}"})
            return
        if path == "api/validate-yaml":
            asked = json.loads(body)
            wrong = problems(asked["content"]) if asked["repoType"] == "model" else []
            self._answer({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)
            return
        if path.endswith("info/lfs/objects/batch"):
            upload = [
                {**file, "actions": {"upload": {"href": f"{self.server.url}/large/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": upload})
            return
        _, kind, owner, name, action, revision = path.split("/", 5)
        repository = f"{owner}/{name}"
        if repository not in self.server.repositories:
            self._missing("Repository", "RepoNotFound")
        elif action == "branch":
            if self.server.files(repository, revision) is not None:
                self._answer({"error": "Reference already exists"}, 409)
                return
            self.server.branches[repository, revision] = dict(self.server.repositories[repository])
            self._answer({})
        elif (files := self.server.files(repository, revision)) is None:
            self._missing("Revision", "RevisionNotFound")
        elif action == "preupload":
            large = (".parquet", ".safetensors")
            wanted = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in wanted]})
        else:
            message = self._commit(files, body)
            self.server.commits.append(Commit(repository, revision, message, dict(files)))
            place = f"{'datasets/' * (kind == 'datasets')}{repository}/commit/{sha(files)}"
            self._answer({"commitUrl": f"{self.server.url}/{place}", "commitOid": sha(files)})

    def _commit(self, files: dict[str, bytes], body: bytes) -> str:
        """Changes the files as a commit says; gives its message."""
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return message

    def do_PUT(self) -> None:
        self.server.large[self._path().rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def do_GET(self) -> None:
        parts = self._path().split("/")
        if self._refuses():
            return
        # api/models/<owner>/<name>/<action>/<revision>/..., or [datasets/]<owner>/<name>/resolve/<revision>/<file>
        of_api = parts[0] == "api"
        parts = parts[2:] if of_api else parts[parts[0] == "datasets" :]
        repository, action, revision, rest = "/".join(parts[:2]), *(parts[2:4] + ["", "main"])[:2], parts[4:]
        if repository not in self.server.repositories:
            self._missing("Repository", "RepoNotFound")
            return
        if action == "refs":
            names = ["main", *(branch for name, branch in self.server.branches if name == repository)]
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": "0" * 40} for name in names]
            self._answer({"branches": refs, "tags": [], "converts": []})
            return
        revision = revision if len(parts) > 3 else "main"
        files = self.server.files(repository, revision)
        if files is None:
            self._missing("Revision", "RevisionNotFound")
        elif not of_api:
            content = files.get("/".join(rest))
            if content is None:
                self._missing("Entry", "EntryNotFound")
                return
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, ETag=etag, X_Repo_Commit=sha(files))
        elif action == "tree":
            self._list(files, "/".join(rest), "recursive=true" in self.path.lower())
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer({"id": repository, "sha": sha(files), "siblings": siblings})

    def _list(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if not inside and folder:
            self._missing("Entry", "EntryNotFound")
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


def use_endpoint(monkeypatch, url: str) -> None:
    """Lets huggingface_hub, and the libraries that took something of it when they were imported, use another Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub_server(monkeypatch):
    """A running `HubServer`, which huggingface_hub takes for the Hub."""
    server = HubServer()
    use_endpoint(monkeypatch, server.url)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
