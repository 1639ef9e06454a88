"""A hub on this machine: the calls of its protocol that fetching and pushing bundles need, for a few repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories`: by name, the commits, newest last, each as a commit id and its files.

    Attributes:
        fetched: the names of all files whose content was sent.
        private: the names of the repositories that were made private.
        ignored: names that are left out of commits, as by a .gitignore.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.fetched: list[str] = []
        self.private: list[str] = []
        self.ignored: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add_commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(repo, [])
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((commit, files))
        return commit

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repositories[repo][-1][1]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if (found := self._commit(repo, revision)) is not None:
                siblings = [{"rfilename": name, "size": len(data)} for name, data in found[1].items()]
                self._json({"id": repo, "sha": found[0], "siblings": siblings})
        elif parts[2:3] == ["resolve"] and (found := self._commit("/".join(parts[:2]), parts[3])) is not None:
            name = "/".join(parts[4:])
            if name not in found[1]:
                self._refuse("EntryNotFound")
                return
            if self.command == "GET":
                self.server.fetched.append(name)
            self._send(200, found[1][name], found[0])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[-2:] == ["repos", "create"]:
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            self.server.repositories[repo] = [("0" * 40, {".gitattributes": b""})]
            self.server.private += (
                [repo] if wanted.get("private") or wanted.get("visibility") == "private" else []
            )
            self._json({"url": f"{self.server.url}/{repo}"})
        elif parts[4:5] == ["preupload"]:
            self._json({"files": [self._preupload(file["path"]) for file in json.loads(body)["files"]]})
        elif parts[4:5] == ["commit"]:
            repo = "/".join(parts[2:4])
            lines = [json.loads(line) for line in body.splitlines()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self.server.add_commit(repo, {**self.server.files(repo), **added})
            self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})
        else:
            self._json({})  # the check of the model card

    def _preupload(self, path: str) -> dict[str, object]:
        return {"path": path, "uploadMode": "regular", "shouldIgnore": path in self.server.ignored}

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision; otherwise None, and the refusal is sent."""
        commits = self.server.repositories.get(repo)
        if commits is None:
            self._refuse("RepoNotFound")
            return None
        found = [c for c in commits if c[0] == revision] if revision != "main" else commits[-1:]
        if not found:
            self._refuse("RevisionNotFound")
            return None
        return found[0]

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, data: bytes, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""
