"""An engine that serves and is there again in milliseconds: forked from a process that has
imported all it needs. A line of JSON in, a line of JSON out; the first is its pipeline.

    {"start": seed}     an engine in a new process, which stores a prompt of 192 tokens
    {"kill": true}      SIGKILL; answered when it is gone
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest

import tierloom


def live(source: dict[str, Any], seed: int, ready: int) -> None:
    """The child: serves until it is killed."""
    rig, ids = conftest.Engine(), conftest.tokens(192, seed=seed)
    with tierloom.open(source, layout=rig.layout, model="test") as pipe:
        receipt = pipe.store(ids, rig.caches, rig.slots(len(ids))).wait()
        os.write(ready, json.dumps([pipe.serves_at, receipt.tokens]).encode())
        signal.pause()


def main() -> None:
    source, child = json.loads(sys.stdin.readline()), 0
    for line in sys.stdin:
        said = json.loads(line)
        if "start" in said:
            told, ready = os.pipe()
            child = os.fork()
            if not child:
                os.close(told)
                try:
                    live(source, said["start"], ready)
                finally:
                    os._exit(1)
            os.close(ready)
            answer = json.loads(os.read(told, 4096) or "null")
            os.close(told)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            answer = True
        print(json.dumps(answer), flush=True)
    if child:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
