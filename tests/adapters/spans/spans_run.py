"""Requests of real pipelines as spans at a real OTLP receiver; run by vLLM's environment, which has
OpenTelemetry. Prints a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import tierloom
from tierloom.adapters.engine.spans_option import spans_wanted, trace_requests

got: list[Any] = []
COUNT = int(sys.argv[1])


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for of in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {a.key: a.value.string_value for a in of.resource.attributes}["service.name"]
            got.extend((service, s) for scope in of.scope_spans for s in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def parent(i: int) -> str:
    return f"00-{i + 1:032x}-{i + 7:016x}-{1 if i % 10 else 0:02x}"  # each tenth is not sampled


def main() -> None:
    assert not spans_wanted()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tierloom.play("tiered", (2, 1, 16), tokens=64) as pipe:
        off = trace_requests([pipe])
        pipe.store().wait()
        assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
        assert all(m.enter is None for f in pipe._runners.values() for m in f.meters.values())
        off()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        os.environ["OTEL_EXPORTER_OTLP_PROTOCOL"] = "http/protobuf"
        close = trace_requests([pipe])
        with pipe.trace() as trace:  # both at once
            for i in range(COUNT):
                pipe.retrieve(pipe.tokens, pipe.caches, pipe.slots, trace=parent(i)).wait()
        pipe.store(pipe.tokens[:40], pipe.caches, pipe.slots[:40]).wait()
        noted = len(trace.spans)
    close()
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
    os.environ["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
    with tierloom.play("tiered", (2, 1, 16), tokens=64) as pipe:  # and where nobody receives
        close = trace_requests([pipe])
        assert pipe.store().wait().tokens == 64
        assert not pipe.retrieve().wait().lost
    close()
    spans = [
        {
            "name": s.name, "id": s.span_id.hex(), "parent": s.parent_span_id.hex(),
            "trace": s.trace_id.hex(), "begin": s.start_time_unix_nano,
            "end": s.end_time_unix_nano, "service": service,
        }
        for service, s in got
    ]  # fmt: skip
    print(json.dumps({"spans": spans, "noted": noted}))


if __name__ == "__main__":
    main()
