"""A Hub endpoint on loopback, which speaks as much of the Hub's interface as publishing and loading a model need, and
a CLAP of random weights."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizer

TOKEN = "hf_loopback"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "unknown", "other"}
PIPELINE_TAGS = {"text-to-audio", "audio-to-audio", "feature-extraction"}


class LoopbackHub(ThreadingHTTPServer):
    """Repositories in memory: `{repo_id: {branch: [(commit id, {path: content})]}}`, commits oldest first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.visibility, self.large_files = {}, {}, {}
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.find(repo_id, revision)[1]

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        branches = self.repos[repo_id]
        if revision in branches:
            return branches[revision][-1]
        return next(commit for commits in branches.values() for commit in commits if commit[0] == revision)

    def commit(self, repo_id: str, branch: str, operations: list[dict]) -> str:
        files = dict(self.files(repo_id, branch))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
        history = self.repos[repo_id][branch]
        commit_id = hashlib.sha1(f"{repo_id} {branch} {len(history)}".encode()).hexdigest()
        history.append((commit_id, files))
        return commit_id


class Handler(BaseHTTPRequestHandler):
    """One method per request of the Hub's interface; names of groups are the methods' arguments."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub
    REPO, REVISION = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
    ROUTES = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
        ("POST", rf"/api/models/{REPO}/branch/{REVISION}", "create_branch"),
        ("POST", rf"/api/models/{REPO}/commit/{REVISION}", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.*))?", "tree"),
        ("GET", rf"/api/models/{REPO}(?:/revision/{REVISION})?", "model_info"),
        ("GET|HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ]

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                # Storage hands out its own addresses and sees no token of the Hub.
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid credentials."})
                arguments = {key: value for key, value in match.groupdict().items() if value is not None}
                if "repo_id" in arguments and arguments["repo_id"] not in self.server.repos:
                    return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return getattr(self, name)(**arguments)
        self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if status >= 400 and not isinstance(content, bytes):
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def create_repo(self):
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'somebody'}/{request['name']}"
        address = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **address})
        first = hashlib.sha1(repo_id.encode()).hexdigest()
        self.server.repos[repo_id] = {"main": [(first, {})]}
        self.server.visibility[repo_id] = request.get("visibility") or request.get("private")
        self.answer(200, address)

    def validate_yaml(self):
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        wrong = metadata.get("license", "other") not in LICENSES
        if wrong or metadata.get("pipeline_tag", "text-to-audio") not in PIPELINE_TAGS:
            return self.answer(400, {"error": "bad metadata", "errors": [{"message": str(metadata)}], "warnings": []})
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        files = json.loads(self.body)["files"]
        modes = {True: "lfs", False: "regular"}
        answers = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in files
        ]
        self.answer(200, {"files": answers})

    def lfs_batch(self, repo_id):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large_files[oid] = self.body
        self.answer(200, b"")

    def create_branch(self, repo_id, revision):
        branches = self.server.repos[repo_id]
        branches.setdefault(revision, list(branches["main"]))
        self.answer(200, {})

    def commit(self, repo_id, revision):
        operations = [json.loads(line) for line in self.body.splitlines()]
        commit_id = self.server.commit(repo_id, revision, operations)
        url = f"{self.server.endpoint}/{repo_id}/commit/{commit_id}"
        self.answer(200, {"success": True, "commitOid": commit_id, "commitUrl": url})

    def model_info(self, repo_id, revision="main"):
        commit_id, files = self.server.find(repo_id, revision)
        self.answer(200, {"id": repo_id, "sha": commit_id, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repo_id, revision, folder=""):
        _, files = self.server.find(repo_id, revision)
        inside = {path: content for path, content in files.items() if path.startswith(folder)}
        if folder and not inside:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        recursive = "recursive" in parse_qs(urlsplit(self.path).query)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in inside.items()
            if recursive or "/" not in path.removeprefix(folder).lstrip("/")
        ]
        self.answer(200, entries)

    def resolve(self, repo_id, revision, path):
        try:
            commit_id, files = self.server.find(repo_id, revision)
        except StopIteration:
            return self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_id}
            return self.answer(404, {"error": "Entry not found"}, headers)
        content = files[path]
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self.answer(200, content, headers)


@pytest.fixture
def loopback_hub():
    """A running Hub with no repositories."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def run_with_hub(loopback_hub, tmp_path):
    """Runs Python code in a process of its own whose Hub is the one on loopback, and returns what it printed."""

    def run(code: str, *arguments: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {
            "HF_ENDPOINT": loopback_hub.endpoint,
            "HF_HOME": str(tmp_path / "hub-cache"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    return run


@pytest.fixture
def tiny_clap_dir(tmp_path) -> Path:
    """Folder with a small CLAP and its processor, whose tokens are letters."""
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    audio = {"hidden_size": 16, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2]}
    folder = tmp_path / "clap"
    ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=512)).save_pretrained(folder)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = RobertaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    ClapProcessor(ClapFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder
