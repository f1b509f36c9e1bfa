"""What a user gets wrong: each message names the thing, the place, the cause and the cure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tierloom.adapters.cli import commands as cli

FILES = {
    "p.yaml": "version: 1\nextends: tiered\ntiers: {warm: {capasity: 1 GiB}}\n",
    "lmcache.yaml": "chunk_size: 256\nlocal_cpu: true\n",
    "wrong.yaml": "local_cpu: maybe\ncache_policy: lur\nchunk_sise: 1\nchunk_size: many\n"
    "local_disk: 'file:/x'\nmax_local_disk_size: 1\nremote_url: 's3://127.0.0.1:9000'\n",
    "folder.yaml": "remote_url: 'file:/x'\n",
    "serde.yaml": "remote_url: 'reddis://h:1'\nremote_serde: cashegen\n",
    "mine": "mine", "empty": "", "words": "some words\n\nmore",
    "big.yaml": "version: 1\ntiers: {pool: {use: mooncake, url: 'mooncakestore://h:1/', "
    "segment: 1024 TiB}}\n",
}  # fmt: skip
MISUSES: list[tuple[str, int, list[str]]] = [
    ("chekc p.yaml", 2, ["'chekc'", "check"]),
    ("check", 2, ["Missing argument", "config"]),
    ("check p.yaml", 2, ["p.yaml:3:16: tiers.warm: unknown key 'capasity'", "mean 'capacity'?"]),
    ("check nowhere.yaml", 2, ["cannot read nowhere.yaml: No such file"]),
    ("check lmcache.yaml", 2, ["lmcache.yaml: is a conf", "tierloom import-lmcache lmcache.yaml"]),
    ("check big.yaml", 2, ["big.yaml:2:69: tiers.pool", "1024 TiB of a memory of", "segment:"]),
    ("check teired", 2, ["no preset is called 'teired'", "did you mean 'tiered'?"]),
    ("explain lmcache.yaml", 2, ["lmcache.yaml: is a conf", "tierloom import-lmcache lmcache"]),
    ("explain tiered --mermiad", 2, ["--mermiad", "--mermaid"]),
    ("schema --write no/x", 2, ["cannot write no/x: No such file"]),
    ("import-lmcache no.yaml", 2, ["no.yaml", "No such file"]),
    ("import-lmcache empty", 2, ["empty: an LMCache configuration is a mapping"]),
    ("import-lmcache lmcache.yaml --out mine", 2, ["mine is there already", "--force"]),
    ("import-lmcache wrong.yaml", 1, [
        "local_cpu: 'maybe' is not true or false, and LMCache takes it for false; known: false, tr",
        "cache_policy: no such policy: 'lur'; did you mean 'lru'?",
        "chunk_sise: no option of LMCache's; did you mean 'chunk_size'?",
        "chunk_size: wants a number, got 'many'",
        "local_disk: neither a path nor file:///PATH: 'file:/x'; did you mean '/x'?",
        "s3://127.0.0.1:9000 names no bucket", "endpoint: http://127.0.0.1:9000",
    ]),
    ("import-lmcache folder.yaml", 1, ["no tier for file:/x; a folder is written 'fs://HOST/x'"]),
    ("import-lmcache serde.yaml", 1, ["reddis://h:1; did you mean 'redis'?", "mean 'cachegen'?"]),
    ("import-lmcache", 1, ["remote_ulr: no option of LMCache's; did you mean 'remote_url'?"]),
    ("inspect", 2, ["Missing argument", "OBJECT"]),
    ("inspect nowhere", 2, ["nowhere: No such file"]),
    ("inspect words", 2, ["words: not a kept object: it does not begin with TLM1"]),
    ("inspect .@00", 2, ["."]),
    ("doctor --jsn", 2, ["--jsn", "--json"]),
    ("demo --json no/x", 2, ["cannot write no/x: No such file"]),
    ("demo --config teired", 1, ["no preset is called 'teired'", "did you mean 'tiered'?"]),
    ("quality", 2, ["pass one of --codec and --blend"]),
    ("quality --codec itn4", 2, ["itn4", "did you mean 'int4'?"]),
    ("quality --blend prob", 2, ["prob", "probe"]),
    ("quality --codec int4 --documents 0", 2, ["--documents"]),
    ("warm empty --url http://127.0.0.1:1", 2, ["no text in empty"]),
    ("warm words --url 127.0.0.1:1", 2, ["'127.0.0.1:1' is not http://HOST:PORT"]),
    ("warm words --url http://127.0.0.1:1", 2, ["http://127.0.0.1:1: ", "refused"]),
    ("calibrate --model no", 2, ["no"]),
    ("calibrate --out no/x", 2, ["cannot write no/x: No such file"]),
    ("sglang --page-size 1", 2, ["page", "--page-size 32"]),
    ("sglang --set tiers.warm.pth=/x", 2, ["tiers.warm", "'pth'", "did you mean 'path'?"]),
    ("serve --listen udp://h:1", 2, ["udp://h:1", "tcp://"]),
    ("serve --listen tcp://0.0.0.0:0", 2, ["can be reached from other hosts", "--token-file"]),
    ("serve --listen tls://127.0.0.1:0", 2, ["needs a certificate", "--cert and --key"]),
    ("serve --token-file nowhere", 2, ["nowhere: No such file", "write the secret into it"]),
    ("serve --http 0.0.0.0:0", 2, ["--http", "can be reached from other hosts", "token"]),
    ("serve --drain 5", 2, ["--drain", "'5 s'"]),
    ("serve --log-level loud", 2, ["--log-level loud", "debug, info, warning, error"]),
    ("serve --directory here", 2, ["--directory here", "--directory embedded"]),
    ("serve --config minimla", 2, ["no preset is called 'minimla'", "did you mean 'minimal'?"]),
    ("proxy", 2, ["no engine", "--decode http://HOST:PORT"]),
    ("proxy --decode h:1", 2, ["h:1", "http://"]),
    ("proxy --decode http://h:1 --host 0.0.0.0", 2, ["other hosts", "--token-file"]),
    ("proxy --decode http://h:1 --way round", 2, ["--way", "auto, after or together"]),
    ("pd", 2, ["Missing argument", "model"]),
    ("pd m --wait 5", 2, ["--wait", "'5 s'"]),
    ("bench --rounds 0", 2, ["--rounds", "greater than or equal to 1"]),
    ("bench engine rag --base-url ftp://x", 2, ["ftp://x", "http://HOST:PORT"]),
    ("standalone --kvcache-shape-spec x --once", 2, ["'x'", "(2,BLOCKS,TOKENS,HEADS,DIM)"]),
    ("store clear --url http://127.0.0.1:1", 1, ["http://127.0.0.1:1/v1/clear", "refused"]),
    ("control serve", 2, ["--directory", "TIERLOOM_DIRECTORY"]),
    ("control lookup --tokens a", 2, ["--tokens 'a'", "whole numbers"]),
    ("deploy cental --out d", 2, ["nothing is called 'cental'", "did you mean 'central'?"]),
    ("deploy central", 2, ["deploy central", "--out DIR"]),
    ("deploy systemd --out mine", 2, ["mine"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "said"), MISUSES, ids=[m[0] for m in MISUSES])
def test_a_misuse_is_explained(
    line: str, code: int, said: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LMCACHE_REMOTE_ULR", "redis://h:1")
    monkeypatch.delenv("TIERLOOM_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["tierloom", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    told = re.sub(r"[\s│]+", " ", err if code == 2 else out + err)
    assert ended.value.code == code, told
    missing = [word for word in said if word not in told]
    assert not missing, told
    assert "Traceback" not in told


def test_every_command_is_misused() -> None:
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) <= {line.split()[0] for line, *_ in MISUSES}
