"""Blending's policies on SmolLM2: KL against recomputed share.

    PYTHONPATH=benchmarks python -m quality.blend rag seq edit --choose   # a policy's parameters
    PYTHONPATH=benchmarks python -m quality.blend rag seq edit            # and what it then costs
    PYTHONPATH=benchmarks python -m quality.blend --report

Each set writes a file of its own under --folder after every document, and goes on where it ended.
`--report` writes benchmarks/results/blend-smollm2.json, .md and .png. Choosing and judging are on
different texts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from quality.blend_figures import write
from rich.console import Console

from tierloom.adapters.quality.blend_arms import PEER, RANDOM, BlendArm, Case, selective_of
from tierloom.adapters.quality.blend_sets import JUDGED, KINDS, prompts
from tierloom.adapters.quality.subject import load_subject
from tierloom.stages.blend.budget import BlendOptions

RESULTS = Path(__file__).resolve().parent.parent / "results"
_OPTIONS = BlendOptions()
DEFAULT = BlendArm("probe", 0, _OPTIONS.share, _OPTIONS.ceiling)


def candidates() -> dict[str, BlendArm]:
    """What the default is chosen from."""
    share = _OPTIONS.share
    return (
        {f"probe, heads {heads}": BlendArm("probe", heads, 1.0, share) for heads in (0, 4, 16)}
        | {
            f"probe, near {near:g}": BlendArm("probe", 0, 1.0, share, near)
            for near in (4, 8, 32, 128, math.inf)
        }
        | {"none": BlendArm("none"), "peer": PEER, "heads 16": BlendArm("heads", 16)}
    )


def judged(reused: int, seams: int, tokens: int, layers: int, asked: int) -> dict[str, BlendArm]:
    """The default beside every policy at 12 and at 30 % of token-layers."""
    arms = {
        "none": BlendArm("none"), "default": DEFAULT, "peer": PEER,
        "peer, alone": PEER._replace(alone=True), "heads 16": BlendArm("heads", 16),
    }  # fmt: skip
    for part in (0.12, 0.30):
        at = f" {part:.0%}"
        checked = reused / tokens / layers
        arms |= {
            f"heads{at}": BlendArm("heads", round(part * tokens / seams)),
            f"deviation{at}": BlendArm("deviation", share=(part - checked) * layers / (layers - 1)),
            f"probe{at}": BlendArm("probe", 0, 1.0, (part * tokens - asked) / reused),
            f"random{at}": BlendArm(RANDOM, share=part * tokens / reused),
        }
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--choose", action="store_true", help="candidates, on the other texts")
    parser.add_argument("--documents", type=int, default=JUDGED)
    parser.add_argument("--folder", type=Path, default=Path("blend"), help="of the figures")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        write(given.folder, RESULTS / "blend-smollm2")
        return
    given.folder.mkdir(exist_ok=True)
    console, subject = Console(highlight=False), load_subject("smollm2")
    selective, layers = selective_of(subject), subject.shape.layers
    for kind in (k for k in KINDS if k in given.sets):
        path = given.folder / f"{kind}{'-choosing' if given.choose else ''}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for prompt, _ in zip(
            prompts(kind, subject.encode, judging=not given.choose),
            range(given.documents), strict=False,
        ):  # fmt: skip
            if prompt.name in found:
                continue
            case, work = Case(subject, selective, prompt), prompt.work
            reused = int(work.covered().sum())
            arms = candidates() if given.choose else judged(
                reused, len(prompt.pieces), work.tokens, layers, prompt.asked
            )  # fmt: skip
            found[prompt.name] = {name: case.judge(arm) for name, arm in arms.items()}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(path)
            console.print(f"{kind} {len(found)}: {prompt.name}")


if __name__ == "__main__":
    main()
