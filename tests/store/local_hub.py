"""A small server that stands in for the hub: the routes that pushing and fetching an adapter use, repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    heads: dict[str, str] = field(default_factory=dict)  # branch -> commit
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.heads[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.heads.get(revision, revision))


class LocalHub:
    """`with LocalHub() as hub`: hub.url is its address, hub.repos what it holds."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # what was uploaded as large files, by SHA-256
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Answers,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "LocalHub":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Answers(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, verb: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{verb} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{verb} {path}"):
                answer(self, body, *match.groups())
                return
        self.answer(404, {"error": f"no route {verb} {path}"})

    def answer(self, status: int, value: Any = None, *, data: bytes | None = None, **headers: str) -> None:
        content = data if data is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository; None after the refusal was sent, with the hub's own error codes."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.owner):
            self.answer(401 if not self.owner else 404, {"error": "no"}, X_Error_Code="RepoNotFound")
        elif repo.gated and not self.owner:
            self.answer(401, {"error": "no"}, X_Error_Code="GatedRepo")
        elif write and not self.owner:
            self.answer(403, {"error": "you may not write here"}, X_Error_Message="you may not write here")
        else:
            return repo
        return None

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.owner:
            self.answer(401, {"error": "Invalid credentials"})
        elif name in self.hub.repos:
            self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        else:
            repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if repo := self.repo(name, write=True):
            if branch in repo.heads:
                self.answer(409, {"error": "exists"})
            else:
                repo.heads[branch] = repo.heads["main"]
                self.answer(200, {})

    def info(self, body: bytes, name: str, _: Any = None, revision: str | None = None) -> None:
        if repo := self.repo(name):
            files = repo.files(revision or "main")
            if files is None:
                self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
                return
            sha = repo.heads.get(revision or "main", revision)
            siblings = [{"rfilename": file} for file in files]
            self.answer(200, {"id": name, "sha": sha, "private": repo.private, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if repo := self.repo(name):
            files = repo.files(revision) or {}
            rows = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            self.answer(200, rows)

    def validate(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        header = yaml.safe_load(content.split("---")[1])
        base = header.get("base_model")
        wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
        errors = [{"message": f'"base_model" with value "{base}" is not valid'}] if wrong else []
        self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self.repo(name, write=True):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.repo(name, write=True):
            objects = [
                o
                if o["oid"] in self.hub.large
                else o | {"actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def large(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        if repo := self.repo(name, write=True):
            lines = [json.loads(line) for line in body.splitlines()]
            files, message = dict(repo.files(branch) or {}), ""
            for each in lines:
                value = each["value"]
                if each["key"] == "header":
                    message = value["summary"]
                elif each["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif each["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                else:
                    assert each["key"] == "deletedFile"
                    del files[value["path"]]
            sha = repo.commit(branch, files, message)
            self.answer(
                200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}
            )

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if repo := self.repo(name):
            data = (repo.files(revision) or {}).get(file)
            if data is None:
                self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
                return
            sha = repo.heads.get(revision, revision)
            self.answer(200, data=data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    ("POST /api/repos/create", Answers.create),
    ("POST /api/validate-yaml", Answers.validate),
    (rf"POST /api/models/{_NAME}/branch/(.+)", Answers.branch),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", Answers.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", Answers.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Answers.batch),
    (r"PUT /large/(\w+)", Answers.large),
    (rf"GET /api/models/{_NAME}/tree/(.+)", Answers.tree),
    (rf"GET /api/models/{_NAME}(/revision/(.+))?", Answers.info),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", Answers.resolve),
]
