"""A Hub on loopback: as much of the Hub's HTTP API as creating, pushing, tagging and pulling a model need.

Everybody may read; writing needs the token, and so does reading a private repo.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
import traceback
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_alice"
# Bytes: weights go the way of large files, the rest the way of small ones, as on the Hub.
REGULAR_LIMIT = 60_000
LFS_POINTER_SIZE = 134  # bytes of the text file that stands for a large file in git
LFS_PUT = re.compile(r"/lfs-put/([0-9a-f]{64})$")
LFS_BATCH = re.compile(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch$")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
REPO_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(.*))?$")
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class ApiError(Exception):
    """Answered with this status and the headers from which huggingface_hub makes its exceptions."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


class Store:
    """Repos by name, and contents of files in a folder by their sha256.

    A repo is {private, refs: {branch or tag: commit}, commits: {commit: files}}, a file {sha, oid, size, lfs}.
    """

    def __init__(self, root: Path):
        self.root, self.lock = root, threading.RLock()
        self.repos: dict[str, dict[str, Any]] = {}

    def put(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        (self.root / sha).write_bytes(data)
        return sha

    def put_file(self, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as git does
        return {"sha": self.put(data), "oid": oid, "size": len(data), "lfs": False}

    def commit(self, repo: dict, branch: str, files: dict) -> str:
        sha = hashlib.sha1(json.dumps([sorted(files.items()), time.time()]).encode()).hexdigest()
        repo["commits"][sha], repo["refs"][branch] = files, sha
        return sha

    @staticmethod
    def commit_of(repo: dict, revision: str) -> str:
        sha = repo["refs"].get(revision, revision)
        if sha not in repo["commits"]:
            raise ApiError(404, "RevisionNotFound", "Revision not found")
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *args) -> None:
        """No line a request."""

    def do_HEAD(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query)
        try:
            with self.store.lock:
                self.dispatch(urllib.parse.unquote(url.path))
        except ApiError as error:
            self.refuse(error)
        except BrokenPipeError:
            pass
        except Exception as error:
            traceback.print_exc()
            self.refuse(ApiError(500, "ServerError", repr(error)))

    do_GET = do_POST = do_PUT = do_HEAD

    def dispatch(self, path: str) -> None:
        writes = self.command in ("POST", "PUT")
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if writes else b""
        if match := LFS_PUT.match(path):  # needs no token, as on the Hub: the address is the secret
            return self.lfs_put(match[1], data)
        if writes and not self.has_token():
            raise ApiError(401, "RepoNotFound", "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if LFS_BATCH.match(path):
            return self.lfs_batch(json.loads(data)["objects"])
        if match := RESOLVE.match(path):
            return self.resolve(self.repo(match[1]), match[2], match[3])
        if match := REPO_API.match(path):
            operation, _, rest = (match[2] or "").partition("/")
            return self.repo_api(match[1], self.repo(match[1]), operation, rest, data)
        raise ApiError(404, "EntryNotFound", f"no such route {path}")

    # What comes in and goes out

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        body = json.dumps(content).encode()
        self.head(status, {**(headers or {}), "Content-Type": kind, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, error: ApiError, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": error.kind, "X-Error-Message": error.message, **(headers or {})}
        self.answer({"error": error.message}, error.status, headers)

    def base(self) -> str:
        return "http://" + self.headers.get("Host")

    def has_token(self) -> bool:
        return self.headers.get("Authorization", "") == f"Bearer {TOKEN}"

    def repo(self, name: str) -> dict[str, Any]:
        """The repo, if it exists and this caller may see it: whoever may not is answered that there is none."""
        repo = self.store.repos.get(name)
        if repo is None or (repo["private"] and not self.has_token()):
            raise ApiError(404 if self.has_token() else 401, "RepoNotFound", "Repository not found")
        return repo

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'alice'}/{request['name']}"
        if name in self.store.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.base()}/{name}"}, 409)
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.store.repos[name] = {"private": private, "refs": {}, "commits": {}}
        self.store.commit(self.store.repos[name], "main", {".gitattributes": self.store.put_file(GIT_ATTRIBUTES)})
        return self.answer({"url": f"{self.base()}/{name}", "name": name, "id": "0"})

    # Large files

    def lfs_put(self, expected: str, data: bytes) -> None:
        if self.store.put(data) != expected:
            raise ApiError(400, "BadRequest", "sha256 mismatch")
        self.answer({})

    def lfs_batch(self, objects: list[dict[str, Any]]) -> None:
        result = []
        for wanted in objects:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.store.root / wanted["oid"]).exists():
                entry["actions"] = {"upload": {"href": f"{self.base()}/lfs-put/{wanted['oid']}"}}
            result.append(entry)
        self.answer({"transfer": "basic", "objects": result}, kind="application/vnd.git-lfs+json")

    # One repo

    def repo_api(self, name: str, repo: dict[str, Any], operation: str, rest: str, data: bytes) -> None:
        if operation in ("", "revision"):
            return self.answer(self.info(name, repo, self.store.commit_of(repo, rest or "main")))
        if operation == "tag":
            repo["refs"][json.loads(data)["tag"]] = self.store.commit_of(repo, rest)
            return self.answer({})
        if operation == "tree":
            revision, _, folder = rest.partition("/")
            return self.tree(repo["commits"][self.store.commit_of(repo, revision)], folder)
        if operation == "preupload":
            mode = {True: "lfs", False: "regular"}
            return self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode[file["size"] > REGULAR_LIMIT], "shouldIgnore": False}
                        for file in json.loads(data)["files"]
                    ]
                }
            )
        if operation == "commit":
            return self.commit(name, repo, rest, [json.loads(line) for line in data.splitlines()])
        raise ApiError(404, "EntryNotFound", f"no such operation {operation}")

    def card_data(self, files: dict[str, Any]) -> dict[str, str]:
        """The `name: value` lines at the head of a repo's README.md."""
        if "README.md" not in files:
            return {}
        parts = (self.store.root / files["README.md"]["sha"]).read_text(encoding="utf-8").split("---\n")
        lines = parts[1].splitlines() if len(parts) > 2 and not parts[0] else []
        pairs = [line.split(": ", 1) for line in lines if ": " in line and line[0].isalpha()]
        return {name: value.strip("\"'") for name, value in pairs}

    def info(self, name: str, repo: dict[str, Any], sha: str) -> dict[str, Any]:
        files = repo["commits"][sha]
        card = self.card_data(files)
        return {
            **{name: card[name] for name in ("pipeline_tag", "library_name") if name in card},
            **{"id": name, "modelId": name, "sha": sha, "private": repo["private"], "tags": [], "cardData": card},
            "siblings": [{"rfilename": file} for file in sorted(files)],
        }

    def tree(self, files: dict[str, Any], folder: str) -> None:
        """No repo of ours has a folder in it."""
        if folder:
            raise ApiError(404, "EntryNotFound", f"no such folder {folder}")
        result = []
        for path, file in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
            if file["lfs"]:
                entry["lfs"] = {"oid": file["sha"], "size": file["size"], "pointerSize": LFS_POINTER_SIZE}
            result.append(entry)
        self.answer(result)

    def commit(self, name: str, repo: dict[str, Any], branch: str, operations: list[dict[str, Any]]) -> None:
        files = dict(repo["commits"][self.store.commit_of(repo, branch)])
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = self.store.put_file(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                oid = value["oid"]
                files[value["path"]] = {"sha": oid, "oid": oid[:40], "size": value["size"], "lfs": True}
            elif key != "header":
                raise ApiError(400, "BadRequest", f"no such operation {key}")
        sha = self.store.commit(repo, branch, files)
        url = f"{self.base()}/{name}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: dict[str, Any], revision: str, path: str) -> None:
        """The bytes of one file."""
        sha = self.store.commit_of(repo, revision)
        file = repo["commits"][sha].get(path)
        if file is None:
            return self.refuse(ApiError(404, "EntryNotFound", "Entry not found"), {"X-Repo-Commit": sha})
        etag, size = f'"{file["sha"] if file["lfs"] else file["oid"]}"', str(file["size"])
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Content-Type": "application/octet-stream"}
        if file["lfs"]:
            headers.update({"X-Linked-Etag": etag, "X-Linked-Size": size})
        self.head(200, {**headers, "Content-Length": size})
        if self.command != "HEAD":
            self.wfile.write((self.store.root / file["sha"]).read_bytes())
        return None


@contextlib.contextmanager
def started(root: Path) -> Iterator[dict[str, str]]:
    """Gives the environment in which the Hub is the one on loopback, with `root` for its files; nobody is logged in."""
    root.mkdir(exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"store": Store(root)}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        # It has the plain protocol for large files, not the Hub's newer one.
        options = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", **options}
    finally:
        server.shutdown()
        server.server_close()
