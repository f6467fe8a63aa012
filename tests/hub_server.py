"""A stand-in for the Hub on this machine: the HTTP endpoints that huggingface_hub calls.

Written from the protocol, so that huggingface_hub itself, unchanged, can push and pull: making a
repository, asking how files are to be sent, git-lfs's batch of uploads, a commit as lines of JSON,
listings, and files by revision, large ones behind a redirect.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGE = (".onnx", ".safetensors", ".png", ".pte")
"""What the Hub's own .gitattributes gives to git-lfs."""


@dataclass
class Repo:
    """Files by name, at each commit."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit by hash, or the last of the only branch."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """All that the server holds, and what it was asked."""

    address: str = ""
    storage: str = ""
    """Where large files are: another host, to which a client must not show its token."""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """By SHA-256, uploaded and perhaps not committed."""
    asked: list[str] = field(default_factory=list)
    read_only: set[str] = field(default_factory=set)
    storage_full: bool = False
    damaged: dict[str, bytes] = field(default_factory=dict)
    """File names whose content is sent as this."""


def blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content: bytes) -> bytes:
    """What git has in the place of a large file."""
    oid = hashlib.sha256(content).hexdigest()
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
    ).encode()


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self._resolve(*self._place())

    def do_GET(self) -> None:
        place = self._place()
        match place:
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                self._tree(f"{owner}/{name}", revision)
            case ["large", oid]:
                assert "Authorization" not in self.headers
                self._send(200, self.hub.large[oid])
            case _:
                self._resolve(*place)

    def do_PUT(self) -> None:
        oid, content = self._place()[-1], self._body()
        if self.hub.storage_full:
            return self._fail(403, "Storage limit reached")
        if hashlib.sha256(content).hexdigest() != oid:
            return self._fail(400, "not the content of that hash")
        self.hub.large[oid] = content
        return self._send(200, b"")

    def do_POST(self) -> None:
        place, body = self._place(), self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "Invalid credentials in Authorization header")
        match place:
            case ["api", "validate-yaml"]:
                return self._validate(json.loads(body))
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "models", owner, name, "preupload", "main"]:
                return self._preupload(f"{owner}/{name}", json.loads(body))
            case [owner, git, "info", "lfs", "objects", "batch"]:
                return self._batch(f"{owner}/{git.removesuffix('.git')}", json.loads(body))
            case ["verify"]:
                known = json.loads(body)
                same = len(self.hub.large.get(known["oid"], b"")) == known["size"]
                return self._json({}) if same else self._fail(404, "was not uploaded")
            case ["api", "models", owner, name, "commit", "main"]:
                return self._commit(f"{owner}/{name}", body)
        return self._fail(404, "no such endpoint")

    # What each endpoint does ----------------------------------------------------------------

    def _validate(self, asked: dict) -> None:
        """README.md must begin with metadata; as the Hub does, by YAML."""
        import yaml

        _, head, _ = asked["content"].split("---\n", 2)
        values = yaml.safe_load(head)
        errors = [] if isinstance(values, dict) else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _create(self, asked: dict) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.read_only:
            return self._fail(403, "You don't have the rights to create a model here")
        url = {"url": f"{self.hub.address}/{repo}"}
        if repo in self.hub.repos:
            return self._json(url | {"error": "You already created this model repo"}, status=409)
        self.hub.repos[repo] = Repo(private=asked.get("visibility") == "private")
        return self._json(url)

    def _preupload(self, repo: str, asked: dict) -> None:
        here = self.hub.repos[repo].commits[-1][1]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(file["path"], here) if file["path"] in here else None,
            }
            for file in asked["files"]
        ]
        self._json({"files": files})

    def _oid(self, name: str, files: dict[str, bytes]) -> str:
        content = files[name]
        return hashlib.sha256(content).hexdigest() if is_large(name) else blob_id(content)

    def _batch(self, repo: str, asked: dict) -> None:
        assert asked["operation"] == "upload"
        assert repo in self.hub.repos
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.hub.address}/upload/{one['oid']}"}
            verify = {"href": f"{self.hub.address}/verify"}
            actions = {} if one["oid"] in self.hub.large else {"upload": upload, "verify": verify}
            objects.append(one | ({"actions": actions} if actions else {}))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        head, *operations = (json.loads(line) for line in body.splitlines())
        assert head["key"] == "header"
        files = dict(self.hub.repos[repo].commits[-1][1])
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        self.hub.repos[repo].commits.append((oid, files))
        self.hub.repos[repo].messages.append(head["value"]["summary"])
        url = f"{self.hub.address}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def _info(self, repo: str, revision: str) -> None:
        found = self._at(repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for name, content in files.items():
            git = pointer(content) if is_large(name) else content
            one = {"rfilename": name, "size": len(content), "blobId": blob_id(git)}
            if is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": len(git)}
            siblings.append(one)
        self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        found = self._at(repo, revision)
        if found is None:
            return
        entries = []
        for name, content in found[1].items():
            git = pointer(content) if is_large(name) else content
            one = {"type": "file", "path": name, "size": len(content), "oid": blob_id(git)}
            if is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(git)}
            entries.append(one)
        self._json(entries)

    def _resolve(self, *place: str) -> None:
        if len(place) < 5 or place[2] != "resolve":
            return self._fail(404, "no such page")
        found = self._at("/".join(place[:2]), place[3])
        if found is None:
            return None
        commit, files = found
        name = "/".join(place[4:])
        if name not in files:
            return self._fail(404, "Entry not found", code="EntryNotFound")
        content = files[name]
        sent = self.hub.damaged.get(name, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"'}
        if not is_large(name):
            return self._send(200, sent, headers)
        oid = hashlib.sha256(content).hexdigest()
        self.hub.large[oid] = sent
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{oid}"',
            "Location": f"{self.hub.storage}/large/{oid}",
        }
        return self._send(302, b"", headers)

    # Plumbing -------------------------------------------------------------------------------

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The files at a revision; answers itself if there are none."""
        known = self.hub.repos.get(repo)
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if known is None or (known.private and not signed):
            self._fail(401, "Repository not found", code="RepoNotFound")
            return None
        found = known.at(revision)
        if found is None:
            self._fail(404, "Invalid rev id", code="RevisionNotFound")
        return found

    def _place(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        return [unquote(part) for part in path.strip("/").split("/")]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, values: object, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        hub.storage = hub.address.replace("127.0.0.1", "localhost")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
