"""A Hub on loopback: as much of the Hub's HTTP API as creating, pushing, tagging and pulling a repo need.

Only the standard library. `python hub_server.py --root DIR --port 0` prints `READY http://127.0.0.1:PORT`, the value
for HF_ENDPOINT. Without `--token TOKEN=USER` everybody may do everything; with it, writing needs one of
the tokens, and so does reading a private repo.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import threading
import time
import traceback
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOCK = threading.RLock()
LFS_POINTER_SIZE = 134  # bytes of the text file that stands for a large file in git
COPY_CHUNK = 1 << 20
READING_POSTS = re.compile(r"/paths-info/|/lfs-put/")  # need no token, as on the Hub: the upload address is the secret
LFS_PUT = re.compile(r"/lfs-put/([0-9a-f]{64})$")
LFS_BATCH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch$")
RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
REPO_API = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?$")
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def git_oid(data: bytes) -> str:
    """The id that git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class ApiError(Exception):
    """Answered with this status and the headers from which huggingface_hub makes its exceptions."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


class Store:
    """Repos in `db.json`, contents in `blobs/` by sha256.

    A repo is {private, owner, created, refs: {branch or "tag:" + tag: commit}, commits: {commit: {files, title, parent,
    date}}}, a file of a commit {sha, oid, size, lfs}.
    """

    def __init__(self, root: str):
        self.root = root
        self.path = os.path.join(root, "db.json")
        self.repos: dict[str, dict[str, Any]] = {}
        os.makedirs(os.path.join(root, "blobs"), exist_ok=True)
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.repos = json.load(file)

    def save(self) -> None:
        with open(self.path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(self.repos, file)
        os.replace(self.path + ".tmp", self.path)

    def blob(self, sha: str) -> str:
        return os.path.join(self.root, "blobs", sha)

    def put(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        with open(self.blob(sha), "wb") as file:
            file.write(data)
        return sha

    def put_file(self, data: bytes) -> dict[str, Any]:
        return {"sha": self.put(data), "oid": git_oid(data), "size": len(data), "lfs": False}

    def commit(self, repo: dict, branch: str, files: dict, title: str, parent: str | None) -> str:
        payload = json.dumps([sorted(files.items()), title, parent, time.time()]).encode()
        sha = hashlib.sha1(payload).hexdigest()
        repo["commits"][sha] = {"files": files, "title": title, "parent": parent, "date": now()}
        repo["refs"][branch] = sha
        self.save()
        return sha

    @staticmethod
    def commit_of(repo: dict, revision: str) -> str:
        """The commit that a branch, a tag, a commit or its first 7 letters name."""
        revision = urllib.parse.unquote(revision)
        for name in (revision, "tag:" + revision):
            if name in repo["refs"]:
                return repo["refs"][name]
        if len(revision) >= 7:
            for sha in repo["commits"]:
                if sha.startswith(revision):
                    return sha
        raise ApiError(404, "RevisionNotFound", "Revision not found")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store
    regular_limit: int  # bytes; a larger file goes through LFS
    tokens: dict[str, str]

    def log_message(self, *args) -> None:
        """No line a request."""

    def do_HEAD(self) -> None:
        self.route()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def route(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query)
        try:
            with LOCK:
                self.dispatch(urllib.parse.unquote(url.path))
        except ApiError as error:
            self.refuse(error)
        except BrokenPipeError:
            pass
        except Exception as error:
            traceback.print_exc()
            self.refuse(ApiError(500, "ServerError", repr(error)))

    def dispatch(self, path: str) -> None:
        has_body = self.command in ("POST", "PUT", "DELETE")
        data = self.body() if has_body else b""
        if self.tokens and has_body and not READING_POSTS.search(path) and not self.user():
            raise ApiError(401, "RepoNotFound", "Invalid username or password.")
        if path == "/api/whoami-v2":
            return self.who_am_i()
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/repos/delete":
            return self.delete(json.loads(data))
        if path == "/api/models":
            return self.list_models()
        if match := LFS_PUT.match(path):
            return self.lfs_put(match[1], data)
        if LFS_BATCH.match(path):
            return self.lfs_batch(json.loads(data)["objects"])
        if match := RESOLVE.match(path):
            return self.resolve(self.repo(match[1] or "models", match[2]), match[3], match[4])
        if match := REPO_API.match(path):
            kind, repo_id, rest = match[1], match[2], match[3] or ""
            return self.repo_api(repo_id, self.repo(kind, repo_id), rest.split("/"), data)
        raise ApiError(404, "EntryNotFound", f"no such route {path}")

    # What comes in and goes out

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, error: ApiError, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": error.kind, "X-Error-Message": error.message, **(headers or {})}
        self.answer({"error": error.message}, error.status, headers)

    def base(self) -> str:
        return "http://" + self.headers.get("Host")

    def user(self) -> str | None:
        authorization = self.headers.get("Authorization", "")
        return self.tokens.get(authorization[7:]) if authorization.startswith("Bearer ") else None

    def repo(self, kind: str, repo_id: str) -> dict[str, Any]:
        """The repo, if it exists and this caller may see it: whoever may not is told that there is none."""
        repo = self.store.repos.get(f"{kind}:{repo_id}")
        anonymous = bool(self.tokens) and not self.user()
        if repo is None or (repo["private"] and anonymous):
            raise ApiError(401 if anonymous else 404, "RepoNotFound", "Repository not found")
        return repo

    # The whole Hub

    def who_am_i(self) -> None:
        if self.tokens and not self.user():
            raise ApiError(401, "Unauthorized", "Invalid credentials")
        name = self.user() or "local"
        access = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        self.answer({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": access})

    def create(self, request: dict[str, Any]) -> None:
        kind = (request.get("type") or "model") + "s"
        owner = request.get("organization") or self.user() or "local"
        repo_id = request["name"] if "/" in request["name"] else f"{owner}/{request['name']}"
        url = f"{self.base()}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        key = f"{kind}:{repo_id}"
        if key in self.store.repos:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        private = bool(request.get("private")) or request.get("visibility") == "private"
        repo = {"private": private, "owner": owner, "refs": {}, "commits": {}, "created": now()}
        self.store.repos[key] = repo
        files = {".gitattributes": self.store.put_file(GIT_ATTRIBUTES)}
        self.store.commit(repo, "main", files, "initial commit", None)
        return self.answer({"url": url, "name": repo_id, "id": "0"})

    def delete(self, request: dict[str, Any]) -> None:
        kind, owner = (request.get("type") or "model") + "s", request.get("organization")
        repo_id = f"{owner}/{request['name']}" if owner else request["name"]
        if self.store.repos.pop(f"{kind}:{repo_id}", None) is None:
            raise ApiError(404, "RepoNotFound", "Repository not found")
        self.store.save()
        self.answer({})

    def list_models(self) -> None:
        search = (self.query.get("search") or [""])[0]
        author = (self.query.get("author") or [""])[0]
        models = [
            self.info(key.split(":", 1)[1], repo, repo["refs"]["main"])
            for key, repo in self.store.repos.items()
            if key.startswith("models:") and not (repo["private"] and self.tokens and not self.user())
        ]
        self.answer([m for m in models if search in m["id"] and (not author or m["author"] == author)])

    # Large files

    def lfs_put(self, expected: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != expected:
            raise ApiError(400, "BadRequest", "sha256 mismatch")
        self.store.put(data)
        self.answer({})

    def lfs_batch(self, objects: list[dict[str, Any]]) -> None:
        result = []
        for wanted in objects:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not os.path.exists(self.store.blob(wanted["oid"])):
                entry["actions"] = {"upload": {"href": f"{self.base()}/lfs-put/{wanted['oid']}"}}
            result.append(entry)
        self.answer({"transfer": "basic", "objects": result}, kind="application/vnd.git-lfs+json")

    # One repo

    def repo_api(self, repo_id: str, repo: dict[str, Any], parts: list[str], data: bytes) -> None:
        operation, rest = parts[0], "/".join(parts[1:])
        if operation in ("", "revision"):
            return self.answer(self.info(repo_id, repo, self.store.commit_of(repo, rest or "main")))
        if operation == "refs":
            return self.answer(self.refs(repo))
        if operation == "branch" and self.command == "POST":
            return self.create_branch(repo, rest, json.loads(data or b"{}"))
        if operation == "tag" and self.command == "POST":
            repo["refs"]["tag:" + json.loads(data)["tag"]] = self.store.commit_of(repo, rest)
            self.store.save()
            return self.answer({})
        if operation == "commits":
            return self.answer(self.history(repo, self.store.commit_of(repo, parts[1])))
        if operation == "tree":
            files = repo["commits"][self.store.commit_of(repo, parts[1])]["files"]
            recursive = (self.query.get("recursive") or ["false"])[0].lower() in ("true", "1")
            return self.answer(self.tree(files, "/".join(parts[2:]), recursive))
        if operation == "paths-info":
            return self.paths_info(repo["commits"][self.store.commit_of(repo, parts[1])]["files"], data)
        if operation == "preupload":
            return self.preupload(json.loads(data)["files"])
        if operation == "commit":
            return self.commit(repo_id, repo, rest, [json.loads(line) for line in data.splitlines()])
        if operation == "discussions":
            return self.answer({"discussions": [], "count": 0, "start": 0, "numClosedDiscussions": 0})
        raise ApiError(404, "EntryNotFound", f"no such operation {operation}")

    def card_data(self, files: dict[str, Any]) -> dict[str, str]:
        """The `name: value` lines at the head of a repo's README.md."""
        if "README.md" not in files:
            return {}
        with open(self.store.blob(files["README.md"]["sha"]), encoding="utf-8") as file:
            parts = file.read().split("---\n")
        lines = parts[1].splitlines() if len(parts) > 2 and not parts[0] else []
        pairs = [line.split(": ", 1) for line in lines if ": " in line and line[0].isalpha()]
        return {name: value.strip("\"'") for name, value in pairs}

    def info(self, repo_id: str, repo: dict[str, Any], sha: str) -> dict[str, Any]:
        commit = repo["commits"][sha]
        card = self.card_data(commit["files"])
        return {
            "cardData": card,
            **{name: card[name] for name in ("pipeline_tag", "library_name") if name in card},
            "_id": sha[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": sha,
            "private": repo["private"],
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": repo["created"],
            "lastModified": commit["date"],
            "siblings": [{"rfilename": name} for name in sorted(commit["files"])],
        }

    @staticmethod
    def refs(repo: dict[str, Any]) -> dict[str, Any]:
        branches, tags = [], []
        for name, sha in repo["refs"].items():
            if name.startswith("tag:"):
                tags.append({"name": name[4:], "ref": "refs/tags/" + name[4:], "targetCommit": sha})
            else:
                branches.append({"name": name, "ref": "refs/heads/" + name, "targetCommit": sha})
        return {"branches": branches, "tags": tags, "converts": []}

    def create_branch(self, repo: dict[str, Any], name: str, request: dict[str, Any]) -> None:
        if name in repo["refs"]:
            raise ApiError(409, "Conflict", "Reference already exists")
        repo["refs"][name] = self.store.commit_of(repo, request.get("startingPoint") or "main")
        self.store.save()
        self.answer({})

    @staticmethod
    def history(repo: dict[str, Any], sha: str | None) -> list[dict[str, Any]]:
        result = []
        while sha:
            commit = repo["commits"][sha]
            authors = [{"user": "local"}]
            result.append(
                {"id": sha, "title": commit["title"], "message": "", "date": commit["date"], "authors": authors}
            )
            sha = commit["parent"]
        return result

    def tree(self, files: dict[str, Any], folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        result, folders = [], set()
        for name in sorted(files):
            if not name.startswith(prefix):
                continue
            segments = name[len(prefix) :].split("/")
            for depth in range(1, len(segments) if recursive else min(2, len(segments))):
                path = prefix + "/".join(segments[:depth])
                if path not in folders:
                    folders.add(path)
                    result.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
            if recursive or len(segments) == 1:
                result.append(self.entry(name, files[name]))
        return result

    @staticmethod
    def entry(path: str, file: dict[str, Any]) -> dict[str, Any]:
        result = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
        if file["lfs"]:
            result["lfs"] = {"oid": file["sha"], "size": file["size"], "pointerSize": LFS_POINTER_SIZE}
        return result

    def paths_info(self, files: dict[str, Any], data: bytes) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(data)["paths"]
        else:
            paths = urllib.parse.parse_qs(data.decode()).get("paths", [])
        self.answer([self.entry(path, files[path]) for path in paths if path in files])

    def preupload(self, files: list[dict[str, Any]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > self.regular_limit else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.answer({"files": modes})

    def commit(self, repo_id: str, repo: dict[str, Any], branch: str, operations: list[dict[str, Any]]) -> None:
        parent = self.store.commit_of(repo, branch)
        files, title = dict(repo["commits"][parent]["files"]), ""
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") and value["parentCommit"] != parent:
                    raise ApiError(412, "PreconditionFailed", "A commit has happened since")
            elif key == "file":
                files[value["path"]] = self.store.put_file(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not os.path.exists(self.store.blob(value["oid"])):
                    raise ApiError(400, "BadRequest", "LFS object missing")
                oid, size = value["oid"], value["size"]
                files[value["path"]] = {"sha": oid, "oid": oid[:40], "size": size, "lfs": True}
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {name: file for name, file in files.items() if not name.startswith(folder)}
            else:
                raise ApiError(400, "BadRequest", f"no such operation {key}")
        sha = self.store.commit(repo, branch, files, title, parent)
        url = f"{self.base()}/{repo_id}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: dict[str, Any], revision: str, path: str) -> None:
        """The bytes of one file, or a range of them."""
        sha = self.store.commit_of(repo, revision)
        file = repo["commits"][sha]["files"].get(path)
        if file is None:
            return self.refuse(ApiError(404, "EntryNotFound", "Entry not found"), {"X-Repo-Commit": sha})
        size, status = file["size"], 200
        first, last = 0, size - 1
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file["oid"]}"', "Accept-Ranges": "bytes"}
        if file["lfs"]:
            headers.update(
                {"ETag": f'"{file["sha"]}"', "X-Linked-Etag": f'"{file["sha"]}"', "X-Linked-Size": str(size)}
            )
        if wanted := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first = int(wanted[1])
            last = min(int(wanted[2]) if wanted[2] else last, last)
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        remaining = last - first + 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(remaining))
        self.end_headers()
        if self.command == "HEAD":
            return None
        with open(self.store.blob(file["sha"]), "rb") as source:
            source.seek(first)
            while remaining > 0:
                chunk = source.read(min(remaining, COPY_CHUNK))
                self.wfile.write(chunk)
                remaining -= len(chunk)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="folder for the repos")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--regular-limit", type=int, default=10 << 20, help="bytes above which a file goes through LFS")
    parser.add_argument("--token", action="append", default=[], help="TOKEN=USER; may be repeated")
    arguments = parser.parse_args()
    Handler.store = Store(arguments.root)
    Handler.regular_limit = arguments.regular_limit
    Handler.tokens = dict(token.split("=", 1) for token in arguments.token)
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    server.daemon_threads = True
    sys.stdout.write(f"READY http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
