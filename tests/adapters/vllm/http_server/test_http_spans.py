"""A client's trace goes through vLLM's server into what tierloom loads and saves for it."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from harness import pipeline, prompt, transfer
from launch import PYTHON
from serving import Server

if TYPE_CHECKING:
    from pathlib import Path

DECODE = """
import json, sys
from pathlib import Path
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
found = [
    (s.name, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex())
    for path in sorted(Path(sys.argv[1]).iterdir())
    for of in service.ExportTraceServiceRequest.FromString(path.read_bytes()).resource_spans
    for scope in of.scope_spans for s in scope.spans
]
print(json.dumps(found))
"""
TRACE, PARENT = "0123456789abcdef" * 2, "fedcba9876543210"


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_a_clients_trace(llama: Path, logs: Path, tmp_path: Path) -> None:
    bodies = tmp_path / "bodies"
    bodies.mkdir()
    count = iter(range(1 << 30))

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            (bodies / f"{next(count):06}").write_bytes(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{receiver.server_port}/v1/traces"
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    kv = transfer(pipeline(hot={"use": "memory", "capacity": "64 MiB"}))
    flags = {"otlp-traces-endpoint": at}
    server = Server(llama, kv, logs / "server-spans.log", env=env, **flags)
    try:
        server.wait_ready()
        for _ in range(2):  # computed and saved; loaded
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
            asked = {"model": "tiny", "prompt": prompt(600, seed=5), "max_tokens": 4}
            headers = {"Content-Type": "application/json"}
            headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
            connection.request("POST", "/v1/completions", json.dumps(asked), headers)
            assert connection.getresponse().status == 200
            connection.close()
            time.sleep(1)
    finally:
        server.close()
        receiver.shutdown()
        receiver.server_close()
    done = subprocess.run(
        [PYTHON, "-c", DECODE, str(bodies)], capture_output=True, text=True, check=True
    )
    ours = [s for s in json.loads(done.stdout) if s[1] == TRACE]
    by_id = {span: name for name, _, span, _ in ours}
    named = {name: parent for name, _, _, parent in ours}
    assert named["tierloom store"] == named["tierloom retrieve"] == PARENT
    read = by_id[named["tier hot reads"]]
    assert read.startswith("stage ")
    assert by_id[named[read]] == "tierloom retrieve"
    assert "llm_request" in named, "vLLM's own, beside them"
