"""Multi-round QA on a real vLLM whose own prefix cache is too small, with and without loading.

    .venv-vllm/bin/python benchmarks/multi_round.py [--json FILE] [--plot F.svg]       # 5 minutes

SmolLM2 in float32 on one thread, 256 MiB of KV cache: 5,800 tokens, of which the eight sessions
want 8,800. Every second session asks for nothing to be loaded or saved, so that both arms are in
one run, and every answer is asked for again, computed whole: it must be equal.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In the root, `adapters` and `triton_kernels` would pass for other people's packages.
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]

from tierloom.adapters.cli.commands import main as tierloom  # noqa: E402
from tierloom.adapters.demo import smollm2  # noqa: E402
from tierloom.adapters.demo.vllm_server import VllmServer, connector  # noqa: E402

WORK = (
    "multi-round-qa", "--num-users", "8", "--num-rounds", "4", "--qps", "0.2", "--answer-len", "16",
    "--shared-system-prompt", "200", "--user-history-prompt", "800", "--control", "--verify",
)  # fmt: skip
FLAGS = ("--enable-prefix-caching", "--kv-cache-memory-bytes", str(256 << 20))


def main() -> None:
    kept = connector("minimal", **{"tiers.hot.capacity": "1 GiB", "budget.arena": "512 MiB"})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vllm.log"
        model = smollm2.model_dir(progress=False)
        with VllmServer(model, kept, log, flags=FLAGS) as server:
            server.wait_ready()
            url = f"http://127.0.0.1:{server.port}/v1"
            sys.argv = ["tierloom", "bench", "engine", *WORK, "--base-url", url, *sys.argv[1:]]
            tierloom()


if __name__ == "__main__":
    main()
