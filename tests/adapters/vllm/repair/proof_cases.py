"""When the proofs of a repair hold and when they fail, in real engines: run by vLLM's own Python.

    python proof_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import kinds  # noqa: E402
import models  # noqa: E402
from engines import Engine  # noqa: E402

from tierloom.adapters.vllm.repair import engine_model as finding  # noqa: E402
from tierloom.adapters.vllm.repair.engine_model import EngineModel  # noqa: E402
from tierloom.adapters.vllm.repair.forward import ModelInput, Repair  # noqa: E402
from tierloom.adapters.vllm.repair.proofs import prove, read_rotation  # noqa: E402
from tierloom.stages.errors import LayoutError  # noqa: E402
from tierloom.stages.kv.rope import Rotation  # noqa: E402

FOLDER = Path(sys.argv[1])
BLOCKS = (7, 3)


def proved(repair: Repair, rotation: Rotation | None = None) -> str | None:
    found = read_rotation(repair.model.rotary) if rotation is None else rotation
    return prove(repair, BLOCKS, found)


class WrongIds(Repair):
    def compute(self, batch: ModelInput, *rest: Any, **how: Any) -> None:
        super().compute(batch._replace(ids=batch.ids.long()), *rest, **how)


class Strided(Repair):
    def compute(self, batch: ModelInput, *rest: Any, **how: Any) -> None:
        apart = torch.zeros(len(batch.ids), 2, dtype=torch.int64)
        apart[:, 0] = batch.positions
        super().compute(batch._replace(positions=apart[:, 0]), *rest, **how)


class OtherSlots(Repair):
    """The rows of a sequence's tokens change places."""

    def compute(self, batch: ModelInput, *rest: Any, **how: Any) -> None:
        super().compute(batch._replace(slots=batch.slots.flip(0)), *rest, **how)


class NextSlots(Repair):
    """Rows land one token further on."""

    def slots(self, block_ids: Sequence[int]) -> Any:
        return np.roll(super().slots(block_ids), -1)

    def batch(self, *given: Any) -> ModelInput:
        made = super().batch(*given)
        return made._replace(slots=made.slots + 1)


class OtherOrder(Repair):
    """Sequences are told in another order than their tokens."""

    def compute(self, batch: ModelInput, *rest: Any, **how: Any) -> None:
        super().compute(
            batch._replace(lengths=batch.lengths[::-1], seen=batch.seen[::-1]), *rest, **how
        )


class SeenTooFew(Repair):
    def compute(self, batch: ModelInput, *rest: Any, **how: Any) -> None:
        fewer = [max(n, s - 1) for n, s in zip(batch.lengths, batch.seen, strict=True)]
        super().compute(batch._replace(seen=fewer), *rest, **how)


def every_kind_of_rope_is_proved() -> None:
    made = {name: kinds.llama(FOLDER / name, name) for name in kinds.ROPES}
    made["gptj"] = kinds.gptj(FOLDER / "gptj")
    for name, folder in made.items():
        with Engine(folder) as engine:
            assert proved(engine.repair()) is None, name


def layers_of_two_thetas_and_windows_in_one_group_are_proved() -> None:
    folder = models.gemma(FOLDER / "gemma")
    with Engine(folder, disable_hybrid_kv_cache_manager=True) as engine:
        repair = engine.repair()
        assert len(set(read_rotation(repair.model.rotary).kind.tolist())) == 2
        assert proved(repair) is None
    with Engine(folder) as engine:
        assert "several KV cache groups" in refused(engine)


def half_precision_is_proved() -> None:
    folder = models.llama(FOLDER / "llama")
    for dtype in ("bfloat16", "float16"):
        with Engine(folder, dtype=dtype) as engine:
            assert proved(engine.repair()) is None, dtype
            assert proved(engine.repair(OtherSlots)) is not None, dtype
            assert "K is not turned" in str(proved(engine.repair(), other_theta(engine))), dtype


def other_theta(engine: Engine, by: float = 1.01) -> Rotation:
    rotation = read_rotation(engine.model().rotary)
    half = rotation.freqs.shape[1]
    return rotation._replace(freqs=rotation.freqs * by ** -(np.arange(half) / half))


def each_mistake_is_found() -> None:
    with Engine(models.llama(FOLDER / "llama")) as engine:
        assert proved(engine.repair()) is None
        for kind in (OtherSlots, NextSlots, OtherOrder, SeenTooFew, Strided):
            assert "some computed over the others" in str(proved(engine.repair(kind))) or (
                "poison" in str(proved(engine.repair(kind)))
            ), kind
        right = read_rotation(engine.model().rotary)
        for wrong in (
            other_theta(engine),
            right._replace(interleaved=True),
            right._replace(freqs=right.freqs[:, :8]),
            right._replace(kind=np.array([0, 0, -1, 0], np.int32)),
        ):
            assert "K is not turned" in str(proved(engine.repair(), wrong)), wrong
        assert "not of these layers" in str(
            proved(engine.repair(), right._replace(kind=right.kind[:3]))
        )


def models_without_rope_fail_and_are_refused() -> None:
    rope = np.array(10000.0 ** -(np.arange(16) / 16))[None]
    for name, folder in (
        ("bloom", kinds.bloom(FOLDER / "bloom")),
        ("gpt2", kinds.gpt2(FOLDER / "gpt2")),
    ):
        with Engine(folder) as engine:
            assert "has no rotary embedding" in refused(engine), name
            group = engine.groups()[0]
            layers = {n: engine.layers[n] for n in group.names}
            module = finding._owner(list(layers.values()))
            model = EngineModel(module, layers, (None,) * 2, torch.device("cpu"))
            repair = Repair(model, engine.config, engine.kv, group)
            for kind in (0, -1) if name == "gpt2" else (0,):
                rotation = Rotation(rope, np.full(2, kind, np.int32))
                assert "not turned as we turn it" in str(proved(repair, rotation)), (name, kind)


def refused(engine: Engine) -> str:
    try:
        engine.model()
    except LayoutError as why:
        return str(why)
    raise AssertionError("the model was not refused")


def only_exact_calls_pass_in_a_compiled_model() -> None:
    with Engine(models.llama(FOLDER / "llama"), enforce_eager=False) as engine:
        assert proved(engine.repair()) is None
        assert proved(engine.repair(WrongIds)) is not None
        assert proved(engine.repair(Strided)) is not None


CASES = [each_mistake_is_found, models_without_rope_fail_and_are_refused]
CAMPAIGN = [
    every_kind_of_rope_is_proved,
    layers_of_two_thetas_and_windows_in_one_group_are_proved,
    half_precision_is_proved,
]
COMPILED = [only_exact_calls_pass_in_a_compiled_model]

if __name__ == "__main__":
    for case in globals()[sys.argv[2]]:
        case()
        print(case.__name__, flush=True)
