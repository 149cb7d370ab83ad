"""A server that says what W&B's says, as far as a run, its history and its files need: `with WandbStub() as server`.

History is kept by line, as the real one does: whoever writes names the line that it starts at.
"""

import base64
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbStub(ThreadingHTTPServer):
    """`runs`: by id, what was said of each; `history(id)`: its rows; `files`: what was uploaded, by path."""

    daemon_threads = True

    def __init__(self, key="k" * 40):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.key, self.runs, self.lines, self.files, self.artifacts = key, {}, {}, {}, []
        self.num_received = 0  # rows of history
        self.lock, self.answers = threading.RLock(), threading.Event()
        self.answers.set()  # cleared: it takes requests and says nothing

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.answers.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients hang up

    def history(self, run):
        return [json.loads(line) for _, line in sorted(self.lines.get(run, {}).items())]

    # -- what is asked of it -------------------------------------------------------------------------------------------
    def query(self, name, values):
        project = {"id": "p", "name": values.get("project") or "none", "entity": {"id": "e", "name": "me"}}
        if name == "Viewer":
            account = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "admin": False}
            return {"viewer": account | {"teams": {"edges": []}}}
        if name == "RunResumeStatus":
            return {"model": project | {"bucket": self._bucket(values["name"])}}
        if name == "UpsertBucket":
            known = values["name"] in self.runs
            given = {key: value for key, value in values.items() if value is not None}
            self.runs[values["name"]] = self.runs.get(values["name"], {}) | given
            bucket = self._bucket(values["name"]) | {"description": None, "sweepName": None, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if name == "CreateRunFiles":
            urls = [{"name": file, "uploadUrl": f"{self.url}/files/{values['run']}/{file}"} for file in values["files"]]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": urls}}
        return self._artifact_query(name, values)

    def _artifact_query(self, name, values):
        if name == "CreateArtifact":
            self.artifacts.append(values["input"])
            artifact = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if name == "CreateArtifactManifest":
            file = {"id": "f", "uploadUrl": f"{self.url}/manifests/{values['artifactID']}", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": f"m{values['artifactID']}", "file": file}}}
        if name == "CreateArtifactFiles":
            nodes = [
                {
                    "storagePath": None,
                    "uploadUrl": f"{self.url}/artifacts/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
                for file in values["input"]["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "d"}}}
        return None

    def _bucket(self, run):
        if run not in self.runs:
            return None
        lines = self.lines.get(run, {})
        tail = [lines[max(lines)]] if lines else []
        return {
            "id": f"b-{run}",
            "name": run,
            "displayName": self.runs[run].get("displayName"),
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": self.runs[run].get("config", "{}"),
            "tags": self.runs[run].get("tags", []),
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer({})

    def do_PUT(self):
        data = self._body()
        with self.server.lock:
            self.server.files[self.path] = data
        self._answer({})

    def do_POST(self):
        data = self._body()
        if self.path.endswith("/file_stream"):
            found = json.loads(data).get("files", {}).get("wandb-history.jsonl")
            if found:
                with self.server.lock:
                    lines = self.server.lines.setdefault(self.path.split("/")[-2], {})
                    lines |= dict(enumerate(found["content"], found["offset"]))
                    self.server.num_received += len(found["content"])
            self._answer({})
        elif self.path == "/graphql":
            asked = json.loads(data)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            with self.server.lock:
                found = self.server.query(name, asked.get("variables") or {})
            self._answer({"errors": [{"message": f"{name} is not known"}]} if found is None else {"data": found})
        else:
            self._answer({})

    def _body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, what):
        self.server.answers.wait()
        given = self.headers.get("Authorization", "")
        is_known = base64.b64decode(given.removeprefix("Basic ")).decode().endswith(":" + self.server.key)
        is_known = is_known or self.command == "PUT" or "/otel/" in self.path  # W&B's own telemetry
        data = json.dumps(what if is_known else {"error": "not logged in"}).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
