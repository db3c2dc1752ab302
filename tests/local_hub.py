"""A stand-in of the Hugging Face Hub on this machine: repositories in memory, over HTTP.

It answers what huggingface_hub asks in order to create a repository, upload a folder (large files
by LFS, small ones inside the commit) and download it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"
READER = "hf_reader"
LFS_SUFFIXES = (".safetensors", ".bin")


class LocalHub(ThreadingHTTPServer):
    """The server, with its repositories: `commits` of a repository are lists of (id, files)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits, self.private, self.gated, self.objects = {}, {}, set(), {}
        self.requests = []

    def add_commit(self, repo, files, deleted=()):
        """Adds a commit with some new files and without some old ones, and returns its id."""
        commits = self.commits.setdefault(repo, [])
        files = (commits[-1][1] if commits else {}) | files
        files = {name: content for name, content in files.items() if name not in deleted}
        name = hashlib.sha1(f"{repo} {len(commits)} {sorted(files)}".encode()).hexdigest()
        commits.append((name, files))
        return name

    def find_commit(self, repo, revision):
        """Returns the id and the files of a revision, or None."""
        commits = self.commits[repo]
        if revision == "main":
            return commits[-1] if commits else ("0" * 40, {})
        return next((commit for commit in commits if commit[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def do_PUT(self):
        self.respond()

    def respond(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token not in ("", TOKEN, READER):
            return self.fail(401, "", "Invalid credentials in Authorization header")
        routes = {
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": lambda: self.send({"errors": [], "warnings": []}),
            r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self.describe,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*": self.list_files,
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self.choose_modes,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self.commit,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.plan_upload,
            r"/lfs/([0-9a-f]{64})": self.store,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
        }
        # The longest match first: the name of a repository matches much.
        for pattern in sorted(routes, key=len, reverse=True):
            if match := re.fullmatch(pattern, path):
                groups = match.groups()
                is_repo = "models" in pattern or "resolve" in pattern or "git" in pattern
                if is_repo and not self.may_see(groups[0]):
                    return None
                return routes[pattern](*groups)
        return self.fail(404, "", f"no route {path}")

    def may_see(self, repo):
        hub = self.server
        if repo not in hub.commits or (hub.private.get(repo) and not self.token):
            self.fail(401 if not self.token else 404, "RepoNotFound", "Repository Not Found")
            return False
        if repo in hub.gated:
            self.fail(403, "GatedRepo", f"Access to model {repo} is restricted")
            return False
        return True

    def create(self):
        if not self.token:
            return self.fail(401, "", "Invalid username or password.")
        if self.token == READER:
            return self.fail(403, "", "you don't have the rights to create a model")
        options, hub = json.loads(self.body), self.server
        repo = "/".join(filter(None, (options.get("organization"), options["name"])))
        address = {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}
        if repo in hub.commits:
            return self.send(address | {"error": "You already created this model repo"}, 409)
        hub.commits[repo] = []
        is_private = options.get("private") or options.get("visibility") == "private"
        hub.private[repo] = bool(is_private)
        return self.send(address)

    def describe(self, repo, revision=None):
        commit = self.server.find_commit(repo, revision or "main")
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": name} for name in commit[1]]
        content = {"_id": "1", "id": repo, "modelId": repo, "sha": commit[0], "siblings": files}
        return self.send(content | {"private": self.server.private.get(repo, False), "tags": []})

    def list_files(self, repo, revision):
        commit = self.server.find_commit(repo, revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        entries = []
        for name, content in commit[1].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": oid_of(content)}
            if name.endswith(LFS_SUFFIXES):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.send(entries)

    def choose_modes(self, repo, revision):
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        return self.send({"files": modes})

    def plan_upload(self, repo):
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}},
            }
            for item in json.loads(self.body)["objects"]
        ]
        return self.send({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "", "wrong digest")
        self.server.objects[oid] = self.body
        return self.send({})

    def commit(self, repo, revision):
        files, deleted = {}, []
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        name = self.server.add_commit(repo, files, deleted)
        url = f"{self.server.url}/{repo}/commit/{name}"
        return self.send({"commitUrl": url, "commitOid": name, "success": True})

    def resolve(self, repo, revision, name):
        commit = self.server.find_commit(repo, revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in commit[1]:
            return self.fail(404, "EntryNotFound", f"no {name}")
        content = commit[1][name]
        digest = hashlib.sha256(content).hexdigest()
        etag = digest if name.endswith(LFS_SUFFIXES) else oid_of(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit[0]}
        return self.send_bytes(content, 200, headers)

    def send(self, content, status=200):
        self.send_bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def fail(self, status, code, message):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send_bytes(json.dumps({"error": message}).encode(), status, headers)

    def send_bytes(self, content, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def oid_of(content):
    """Returns the id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def run_hub():
    """Runs a hub on a free port of this machine as long as the context is open."""
    hub = LocalHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
