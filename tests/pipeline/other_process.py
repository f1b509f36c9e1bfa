"""Another process: `python other_process.py CONFIG` stores a prompt by that config, and says so.

What it stores is what `Engine()` and `tokens(192)` are here as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import Engine, tokens

    import tierloom

    engine = Engine()
    with tierloom.open(json.loads(sys.argv[1]), layout=engine.layout, model="test") as pipe:
        receipt = pipe.store(tokens(192), engine.caches, engine.slots(192)).wait()
        print(json.dumps({"tokens": receipt.tokens, "tiers": receipt.tiers}))
