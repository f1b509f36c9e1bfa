"""Who may come in: this host by its own name, others with the token; both can be renewed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from door_rig import asked, config, get
from processes import die_with_parent

import tierloom
from tierloom.adapters.door.entrance import Entrance, valid_until
from tierloom.adapters.server.log_format import write_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from servers import Certificates


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERLOOM_TOKEN", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "example.org"])
def test_other_hosts_without_a_token_are_refused(host: str) -> None:
    with pytest.raises(tierloom.ConfigError, match="can be reached from other hosts: name a token"):
        Entrance(f"{host}:0")
    with pytest.raises(tierloom.ConfigError, match="https:// needs a certificate and its key"):
        Entrance("https://127.0.0.1:0")


@pytest.mark.parametrize("at", ["", "ftp://x:1", "127.0.0.1:x", "http://a@b:1", "h:70000", "h:1/x"])
def test_what_is_no_address(at: str) -> None:
    with pytest.raises(tierloom.ConfigError, match=r"--http: url .*: write http://HOST:PORT or"):
        Entrance(at)


def test_with_a_token_only_probes_go_without(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    with asked(config()) as rig, tierloom.serve_http(rig.pipe, token_file=str(file)) as door:
        for path in ("/livez", "/readyz", "/healthz", "/health"):
            assert get(door.url, path).status_code == 200
        for path in ("/metrics", "/v1/stats", "/v1/stream", "/v1/openapi.json", "/nowhere"):
            said = get(door.url, path)
            assert (said.status_code, said.headers["www-authenticate"]) == (401, "Bearer")
            assert "Authorization: Bearer" in said.json()["detail"]
        for wrong in ("Bearer s3cre", "Bearer s3crets", "s3cret", "Basic s3cret", "Bearer"):
            assert get(door.url, "/metrics", headers={"authorization": wrong}).status_code == 401
        right = {"authorization": "Bearer s3cret"}
        assert get(door.url, "/metrics", headers=right).status_code == 200
        assert get(door.url, "/metrics", headers={**right, "host": "kv.org"}).status_code == 200
        file.write_text("")
        with pytest.raises(tierloom.ConfigError, match="is empty"):
            door.renew()
        assert get(door.url, "/metrics", headers=right).status_code == 200
        file.write_text("another")
        door.renew()
        assert get(door.url, "/metrics", headers=right).status_code == 401


def test_without_one_a_page_in_a_browser_reads_nothing() -> None:
    """It would ask by a name of its own that leads here."""
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        for name in (
            "evil.org",
            "evil.org:80",
            "localhost.evil.org",
            "127.0.0.1.evil.org",
            "",
            "x@y",
        ):
            said = get(door.url, "/v1/stats", headers={"host": name})
            assert said.status_code == 403, name
        for name in ("localhost", "localhost:99", "127.0.0.1", "[::1]:7655"):
            assert get(door.url, "/v1/stats", headers={"host": name}).status_code == 200, name


def test_tls_with_a_certificate_that_is_renewed(tmp_path: Path, certificates: Certificates) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    trust = ssl.create_default_context(cafile=str(certificates.ca))
    shutil.copy(certificates.folder / "server.crt", cert)
    shutil.copy(certificates.folder / "server.key", key)
    with asked(config()) as rig:
        door = tierloom.serve_http(rig.pipe, "https://127.0.0.1:0", cert=cert, key=key)
        assert get(door.url, "/livez", verify=trust).status_code == 200
        said = get(door.url, "/metrics", verify=trust).text
        (line,) = [x for x in said.splitlines() if x.startswith("tierloom_certificate_ends")]
        assert 86400 < float(line.split()[-1]) - time.time() < 3 * 86400
        shutil.copy(certificates.folder / "other.crt", cert)  # and not its key
        with pytest.raises(tierloom.ConfigError, match="both must be PEM"):
            door.renew()
        assert get(door.url, "/livez", verify=trust).status_code == 200
        shutil.copy(certificates.folder / "other.key", key)
        door.renew()
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            get(door.url, "/livez", verify=trust)
        door.close()


@pytest.mark.parametrize("days", [1, 20_000])
def test_until_when_a_certificate_is_valid(days: int, tmp_path: Path) -> None:
    """As openssl says it, also where its time is of the other kind (from 2050 on)."""
    cert = tmp_path / "cert"
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key"]
    made = ["openssl", "req", "-x509", *new, "-days", str(days), "-subj", "/CN=x", "-out", cert]
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    shown = subprocess.run(
        ["openssl", "x509", "-enddate", "-noout", "-in", cert], check=True, capture_output=True,
        text=True,
    ).stdout.strip().removeprefix("notAfter=")  # fmt: skip
    assert valid_until(cert) == ssl.cert_time_to_seconds(shown)


def test_a_store_says_who_may_come_in_and_reads_its_token_anew(tmp_path: Path) -> None:
    """`tierloom serve --http` as a process, up to its end."""
    token, file, log = (tmp_path / name for name in ("token", "serve.yaml", "log"))
    token.write_text("one")
    token.chmod(0o644)
    disk = {"use": "disk", "path": str(tmp_path / "kv"), "capacity": "64 MiB"}
    tiers = {"hot": {"use": "memory", "capacity": "16 MiB"}, "warm": disk}
    source = {"version": 1, "budget": {"arena": "8 MiB"}, "graphs": {}, "tiers": tiers}
    file.write_text(json.dumps(source))
    serve = [sys.executable, "-m", "tierloom.adapters.cli", "serve", "--config", file]
    serve += ["--listen", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--token-file", token]
    with log.open("wb") as err:
        child = subprocess.Popen(
            [*map(str, serve), "--log-format", "json"], stdout=subprocess.PIPE, stderr=err,
            text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}, preexec_fn=die_with_parent,
        )  # fmt: skip
    assert child.stdout is not None
    with child, child.stdout as out:
        _, said = out.readline(), out.readline()
        assert said.startswith("listening on http://127.0.0.1:"), log.read_text()
        url, one = said.split()[-1], {"authorization": "Bearer one"}
        two = {"authorization": "Bearer two"}
        try:
            assert get(url, "/readyz").json()["status"] == "ready"
            parts = get(url, "/v1/stats", headers=one).json()["parts"]
            assert list(parts["store"]["tiers"]) == ["hot", "warm"]
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            words = [line["message"] for line in lines]
            assert "keeps in hot: memory, 16 MiB at most; 0 objects, 0 B" in words
            assert any(w.startswith(f"keeps in warm: disk at {tmp_path}/kv, 64 MiB") for w in words)
            assert any(w.endswith("this host, with the token") for w in words)
            assert any(x["level"] == "warning" and "chmod 600" in x["message"] for x in lines)
            renewed(
                child, token, "two", lambda: get(url, "/metrics", headers=two).status_code == 200
            )
            assert get(url, "/metrics", headers=one).status_code == 401
            renewed(child, token, "", lambda: "are those of before" in log.read_text())
            assert get(url, "/metrics", headers=two).status_code == 200
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) == 0
        finally:
            child.kill()


def renewed(child: subprocess.Popen[str], file: Path, token: str, then: Callable[[], bool]) -> None:
    file.write_text(token)
    child.send_signal(signal.SIGHUP)
    end = time.monotonic() + 20
    while not then():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("said", [("loud", "text"), ("info", "xml")])
def test_options_of_the_log(said: tuple[str, str]) -> None:
    with pytest.raises(tierloom.ConfigError, match=r"pass (debug, info|text or json)"):
        write_log(*said)
