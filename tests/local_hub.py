"""A server on this machine that speaks the protocol of the Hugging Face hub, for its real client.

Repositories are kept in memory, as lists of commits. The client lists their files, asks for the hash of each, follows
a redirect to large ones, and commits: it asks which files are large (preupload), sends these by Git LFS's batch API,
and all others in one commit as NDJSON.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".pt", ".png", ".model")  # stored by Git LFS, as the hub's .gitattributes says
USER = "someone"


class LocalHub:
    """The repositories of the server, and the requests that it answered."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # of owner/name, the newest last
        self.large: dict[str, bytes] = {}  # contents by sha256, as they were uploaded
        self.requests: list[str] = []  # method and path
        self.damaged: set[str] = set()  # names of files of which one byte is wrong when they are downloaded
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        """What the client reads, beside HF_HOME. Without xet, its other protocol, it sends large files by Git LFS."""
        variables = {"HF_TOKEN": "hf_local", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return {"HF_ENDPOINT": self.url, **variables}

    def add(self, name: str, files: dict[str, bytes] | Path) -> str:
        """Add a commit with these files to a repository, and return it."""
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir()}
        commits = self.commits.setdefault(name, [])
        kept = (commits[-1][1] if commits else {}) | files
        commit = hashlib.sha1(repr((name, len(commits), sorted(kept.items()))).encode()).hexdigest()
        commits.append((commit, kept))
        return commit

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Returns a commit and its files by the branch main or by its own name."""
        commits = self.commits.get(name, [])
        return next((c for c in reversed(commits) if revision in ("main", c[0])), None)

    def downloads(self) -> list[str]:
        """Returns the names of the files whose content was sent."""
        return [path.rpartition("/")[2] for path in self.requests if path.startswith("GET") and "/resolve/" in path]


def oid(name: str, content: bytes) -> str:
    """Returns the name of a content: sha256 of large files, git's sha1 of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Serve a hub without repositories until the block ends."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, act in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return act(self, body, **match.groupdict())
        return self._send(404, {"error": f"no such address: {path}"})

    def _send(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._send(404, {"error": code}, X_Error_Code=code, X_Error_Message=f"{code}, says the local hub")

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if name not in self.hub.commits:
            return self._missing("RepoNotFound")
        found = self.hub.at(name, revision or "main")
        if found is None:
            return self._missing("RevisionNotFound")
        commit, files = found
        siblings = [{"rfilename": file} for file in files]
        return self._send(
            200, {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
        )

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if name not in self.hub.commits:
            return self._missing("RepoNotFound")
        found = self.hub.at(name, revision)
        if found is None or file not in found[1]:
            return self._missing("EntryNotFound" if found else "RevisionNotFound")
        commit, files = found
        content, tag = files[file], f'"{oid(file, files[file])}"'
        if file in self.hub.damaged and self.command == "GET":
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"X_Repo_Commit": commit, "ETag": tag}
        if file.endswith(LARGE):
            headers |= {"X_Linked_Etag": tag, "X_Linked_Size": str(len(content))}
        return self._send(200, content, **headers)

    def create(self, body: bytes) -> None:
        order = json.loads(body)
        name = f"{order.get('organization') or USER}/{order['name']}"
        if name in self.hub.commits:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def preupload(self, body: bytes, name: str) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
        answers = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._send(200, {"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        order = json.loads(body)
        assert (order["operation"], order["hash_algo"]) == ("upload", "sha256")
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.hub.url}/large/{file['oid']}"}}}
            for file in order["objects"]
            if file["oid"] not in self.hub.large
        ]
        known = [file for file in order["objects"] if file["oid"] in self.hub.large]
        self._send(200, {"transfer": "basic", "objects": objects + known})

    def upload(self, body: bytes, name: str) -> None:
        if hashlib.sha256(body).hexdigest() != name:
            return self._send(422, {"error": "another sha256"})
        self.hub.large[name] = body
        return self._send(200, {})

    def commit(self, body: bytes, name: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.large[value["oid"]] if large else base64.b64decode(value["content"])
        commit = self.hub.add(name, files)
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def whoami(self, body: bytes) -> None:
        self._send(200, {"type": "user", "id": "1", "name": USER, "orgs": [], "auth": {}})

    def valid(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})


REPOSITORY = r"(?P<name>[^/]+/[^/]+)"
ROUTES = (
    (rf"GET /api/models/{REPOSITORY}", _Handler.info),
    (rf"GET /api/models/{REPOSITORY}/revision/(?P<revision>.+)", _Handler.info),
    (rf"(GET|HEAD) /{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{REPOSITORY}/preupload/main", _Handler.preupload),
    (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(?P<name>[0-9a-f]{64})", _Handler.upload),
    (rf"POST /api/models/{REPOSITORY}/commit/main", _Handler.commit),
    (r"POST /api/validate-yaml", _Handler.valid),
    (r"GET /api/whoami-v2", _Handler.whoami),
)
