"""Another process, which stores what it is told to: a line of JSON in, a line of JSON out.

What it stores is what `Engine()` and `tokens(192)` are here as well. `clear`: and then forgets all
that is kept under the same name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Other:
    def __init__(self, env: dict[str, str]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def stores(self, config: dict[str, Any], model: str, *, clear: bool = False) -> dict[str, Any]:
        """Its receipt, and how many objects it cleared."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([config, model, clear]) + "\n")
        self._child.stdin.flush()
        said: dict[str, Any] = json.loads(self._child.stdout.readline())
        return said

    def close(self) -> None:
        self._child.communicate(timeout=30)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.append(str(Path(__file__).parents[1] / "stages" / "tiers"))
    from conftest import Engine, tokens

    import tierloom

    for line in sys.stdin:
        (config, model, clear), engine = json.loads(line), Engine()
        with tierloom.open(config, layout=engine.layout, model=model) as pipe:
            got = pipe.store(tokens(192), engine.caches, engine.slots(192)).wait()
            cleared = pipe.clear() if clear else 0
            said = {"tokens": got.tokens, "tiers": got.tiers, "lost": len(got.lost)}
            print(json.dumps(said | {"cleared": cleared}), flush=True)
