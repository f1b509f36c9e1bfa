"""A prefiller and a decoder without a model: vLLM's scheduler and the connector's sides,
twice, and a real listener between them. Run by vLLM's Python.

    .venv-vllm/bin/python tests/adapters/vllm/sides/pd_run.py MODEL ROUNDS [SEED [crowd]]

`crowd`: 32 prompts at once, at a decoder that has room for an eighth of them. Prints one line of
JSON: what was run, and what was wrong.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from typing import Any

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import sim
import sim_run
import zmq
from sim_stage import V1, Case, Model

from tierloom.stages.kv.object import object_bytes

CROWD = 32
ASKS = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
        "remote_block_ids": None, "remote_host": None, "remote_port": None}  # fmt: skip
PUSHED = ("do_remote_prefill", "remote_engine_id", "remote_request_id", "remote_host",
          "remote_port", "tp_size")  # fmt: skip
STAGES = [(V1,), (V1,), (V1, V1)]
PREFILLER = {"serve.tiers": ["hot"], "serve.ticket": "30 s"}
DECODER = {"handoff.peers": ["127.0.0.1"], "handoff.wait": "20 s"}
OFFERED = {"serve.tiers": ["hot"], "handoff.offers": True}
"""Of a decoder, where the prefiller opens."""
BAD_SPECS = (
    None, 7, [], {}, {"req_id": "1"}, {"req_id": 1}, {"receiver_init_port": []},
    {"receiver_init_port": ["7"]}, {"receiver_init_port": [1 << 16]}, {"receiver_host": ""},
    {"receiver_host": "192.0.2.1"}, {"receiver_host": "\ud800"}, {"req_id": "\ud800"},
    {"receiver_init_port": 1}, {"receiver_init_port": [1] * 2000}, {"req_id": "z" * 70_000},
)  # fmt: skip
"""What LMCache's proxy would not say to a prefiller; mappings: these entries instead."""


def bad_params(rng: random.Random, good: dict[str, Any]) -> Any:
    """What no decoder can use, and some of it a client's malice."""
    changes: list[dict[str, Any]] = [
        {"remote_port": "1"}, {"remote_port": 0}, {"remote_port": 1 << 40}, {"remote_port": True},
        {"remote_port": None}, {"remote_host": 7}, {"remote_host": None}, {"remote_host": ""},
        {"remote_host": "x" * 100_000}, {"remote_host": "192.0.2.1"}, {"remote_host": "\0"},
        {"remote_request_id": None}, {"remote_request_id": ["a"]},
        {"remote_request_id": "y" * 60_000}, {"remote_request_id": "\ud800"},
        {"do_remote_prefill": "yes"}, {"do_remote_prefill": 1}, {"transfer_id": 5},
        {"remote_port": 1},
    ]  # fmt: skip
    made = good | rng.choice(changes)
    if rng.random() < 0.2:
        made.pop(rng.choice(sorted(made)))
    return made if rng.random() < 0.9 else {"disagg_spec": {"req_id": "z"}, "ret_first_tok": True}


class Errors(logging.Handler):
    """What broke: it costs but a miss, which no answer shows."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Pair:
    """A prefiller and a decoder of other block sizes, their caches small and reused at once; of one
    pipeline stage or two."""

    def __init__(self, model: str, rng: random.Random, *, tells: bool) -> None:
        """`tells`: LMCache's proxy is in use, too."""
        self.rng, self.tells = rng, tells
        load, save = rng.choice(["async", "layer"]), rng.choice(["step", "layer"])
        same = {"order": "canonical", "layers": 4}
        block = rng.choice([16, 32, 64, 96])
        one = Case(rng.choice(STAGES), save=save, block=block, blocks=4 + 1300 // block, **same)
        block = rng.choice([16, 32, 64, 128])
        stages = (V1,) if tells else rng.choice(STAGES)  # offers go to one worker
        if len(stages) > 1:  # in which nothing goes layer by layer
            load = "async"
        two = Case(stages, load=load, block=block, blocks=4 + 1300 // block, decode=False,
                   prefix=rng.random() < (0.3 if tells else 0.5), **same)  # fmt: skip
        config = sim_run.config(model, "")
        self.notes = zmq.Context.instance().socket(zmq.PULL)
        at = f"127.0.0.1:{self.notes.bind_to_random_port('tcp://127.0.0.1')}"
        telling = {"handoff.peers": ["127.0.0.1"], "handoff.proxy": at}
        self.p = sim.World(one, config, PREFILLER | (telling if self.tells else {}))
        self.d = sim.World(
            two, sim_run.config(model, ""), DECODER | (OFFERED if self.tells else {})
        )
        self.count = 0

    def prefill(self, prompt: list[int], kv: dict[str, Any] = ASKS) -> dict[str, Any]:
        """What the prefiller says of a prompt, which it has computed."""
        name = f"p{self.count}"
        self.count += 1
        self.p.add(name, prompt, 1, kv=kv)
        while self.p.scheduler.requests.get(name) is not None:
            self.p.step()
        return self.p.told.pop(name)

    def decode(self, prompt: list[int], kv: Any, answer: int = 5, **more: Any) -> None:
        name = f"d{self.count}"
        self.count += 1
        self.d.add(name, prompt, answer, kv=kv, **more)
        self.d.until_idle()
        self.check(name, prompt, answer)

    def together(self, prompt: list[int], told: dict[str, Any], answer: int = 5) -> None:
        """Both are asked at once, in any order; the prefiller is where an older answer says. They
        have a name in common: one of its own, or the X-Request-Id of vLLM's toy push proxy."""
        name, ticket = f"d{self.count}", f"t-{self.count}"
        self.count += 1
        kv = {key: told[key] for key in PUSHED} | {"remote_request_id": ticket}
        theirs = {"transfer_id": ticket} if self.rng.random() < 0.5 else {}
        made = f"cmpl-{ticket}-0-{self.rng.randrange(1 << 32):08x}"
        came, open_ = self.figures(self.d)["bytes"], self.figures(self.p)["tickets"]
        self.d.add(name, prompt, answer, kv=kv | theirs)
        for _ in range(self.rng.choice([0, 3])):
            self.d.step()
        self.p.add(f"p{name}" if theirs else made, prompt, 1, kv=ASKS | theirs)
        end = time.monotonic() + 30
        while self.p.scheduler.has_requests() or self.d.scheduler.has_requests():
            self.p.step()
            self.d.step()
            assert time.monotonic() < end, "still busy"
        self.p.until_idle()
        self.d.until_idle()
        self.check(name, prompt, answer)
        while self.figures(self.d)["bytes"] > came and self.figures(self.p)["tickets"] > open_:
            assert time.monotonic() < end, "what landed was promised by another name"
            time.sleep(0.01)

    def told(self, prompt: list[int]) -> None:
        """The prefiller is told of the decoder, which goes on behind the first token."""
        name, pipe = f"t{self.count}", self.d.stages[0].connector.worker.pipelines[0].pipeline
        port = int(pipe.serves_at.rpartition(":")[2])
        spec: Any = {"req_id": name, "receiver_host": "127.0.0.1", "receiver_init_port": [port]}
        bad = self.rng.random() < 0.2
        if bad:
            change = self.rng.choice(BAD_SPECS)
            spec = spec | change if isinstance(change, dict) and change else change
        said = self.prefill(prompt, {"ret_first_tok": True, "disagg_spec": spec})
        states: list[int] = []
        Model.grow(states, prompt)
        assert said == {"first_tok": Model.following(states[-1])}, said
        self.p.until_idle()
        before, most = self.loaded(), len(prompt) // 32 * 32
        if not bad:
            assert self.notes.poll(30_000), "the proxy waits"
            assert name.encode() in self.notes.recv()
        while bad and self.notes.poll(100):
            self.notes.recv()
        self.decode([*prompt, said["first_tok"]], None)
        if not (bad or self.d.case.prefix):
            assert self.loaded() - before == most * (most >= self.d.case.block), prompt

    def check(self, name: str, prompt: list[int], answer: int) -> None:
        states: list[int] = []
        Model.grow(states, prompt)
        for said in self.d.said[name]:
            assert said == Model.following(states[-1]), f"a wrong answer to {name}"
            Model.grow(states, [said])
        assert len(self.d.said[name]) == answer

    def forget(self) -> None:
        """Nothing of what came before is in the decoder's memory, or the prefiller's."""
        for world in (self.p, self.d):
            for stage in world.stages:
                pipe = stage.connector.worker.pipelines[0].pipeline
                pipe.clear()
                pipe.changes()
            world.scheduler.connector.scheduler.reports.cache.directory.clear()

    def figures(self, world: sim.World) -> dict[str, int]:
        """Of all workers together, behind all that was posted to their loops by now."""
        total: Counter[str] = Counter()
        for stage in world.stages:
            pipe = stage.connector.worker.pipelines[0].pipeline
            pipe._portal.call(asyncio.sleep, 0)
            total.update(pipe.stats()["handoff"])
        return total

    def loaded(self) -> int:
        data = self.d.stages[0].connector.worker.transfer_log.stats.data
        return int(data.get("load_tokens", 0))

    def close(self) -> None:
        self.notes.close(0)
        for world in (self.d, self.p):  # in this order: each has put a patch over the last one's
            world.close()


def play(pair: Pair, rounds: int) -> None:
    """Prompts that go from one to the other, among them some whose params are another's."""
    rng, prompts = pair.rng, []
    told: list[tuple[list[int], dict[str, Any]]] = []
    for _ in range(rounds):
        (prompt,) = sim_run.prompts(rng, 1, rng.choice([1, 2, 33, 64, 65, 300, 700, 1200]))
        if prompts and rng.random() < 0.4:
            prompt = (rng.choice(prompts)[: rng.randint(0, 500)] + prompt)[:1200]
        prompts.append(prompt)
        what = rng.random()
        if pair.tells and rng.random() < 0.3:
            pair.told(prompt)
            continue
        if told and rng.random() < 0.3:
            before, most = pair.loaded(), (len(prompt) - 1) // 32 * 32
            pair.together(prompt, told[-1][1])
            if not pair.d.case.prefix:
                assert pair.loaded() - before == most * (most >= pair.d.case.block), prompt
            continue
        params = pair.prefill(prompt)
        assert params["remote_block_ids"] == []
        told.append((prompt, params))
        if what < 0.15:  # somebody else's ticket
            params = rng.choice(told)[1]
        elif what < 0.3:
            params = bad_params(rng, params)
        elif what < 0.5:  # what is left of them by vLLM's toy push proxy
            params = {key: params[key] for key in PUSHED}
        before, most = pair.loaded(), (len(prompt) - 1) // 32 * 32
        pair.decode(prompt, params)
        if what >= 0.3 and not pair.d.case.prefix:  # up to the last grain, in the middle of a block
            assert pair.loaded() - before == most * (most >= pair.d.case.block), (prompt, params)
        if rng.random() < 0.1:  # another tenant's
            before = pair.loaded()
            pair.decode(prompt, told[-1][1], cache_salt=str(rng.random()))
            assert pair.loaded() == before, prompt
        if rng.random() < 0.15:  # again, with what an older answer said
            pair.decode(*rng.choice(told))
        if rng.random() < 0.1:
            pair.forget()
        if rng.random() < 0.1:  # given up on either side
            pair.p.add("gone", prompt, 1, kv=ASKS)
            pair.p.step()
            pair.p.abort("gone")
            pair.p.until_idle()
            pair.d.add("gone", prompt, 5, kv=params)
            pair.d.step()
            pair.d.abort("gone")
            pair.d.until_idle()


class Crowd(Pair):
    """A decoder whose landing area has room for an eighth of what is asked for at once."""

    def __init__(self, model: str, rng: random.Random) -> None:
        self.rng, self.count, self.most = rng, 0, 0.0
        case = Case(save="layer", order="canonical", blocks=700, budget=2048, decode=False)
        self.p = sim.World(case, sim_run.config(model, ""), dict(PREFILLER))
        pipe = self.p.stages[0].connector.worker.pipelines[0].pipeline
        need = CROWD * 8 * object_bytes(pipe.geometry, case.chunk, case.grain, 2)
        assert need >= 4 << 20
        small = {"budget.arena": need // 8 * 2}  # hand-offs have half of it
        self.d = sim.World(case, sim_run.config(model, ""), DECODER | small)
        self.notes = zmq.Context.instance().socket(zmq.PULL)

    def round(self) -> None:
        """All answered, none of them wrong, and nothing held for any."""
        prompts = [[self.rng.randrange(sim.VOCAB) for _ in range(512)] for _ in range(CROWD)]
        names = [f"c{self.count}-{i}" for i in range(CROWD)]
        self.count += 1
        together = self.rng.random() < 0.5
        (kv,) = [self.prefill([1] * 64)] if together else [ASKS]
        told = [kv | {"transfer_id": name, "remote_request_id": name} for name in names]
        if together:
            for name, prompt, params in zip(names, prompts, told, strict=True):
                self.d.add(name, prompt, 2, kv=params)
            self.d.step()
        for name, prompt in zip(names, prompts, strict=True):
            self.p.add(f"p{name}", prompt, 1, kv=ASKS | ({"transfer_id": name} if together else {}))
        began = time.monotonic()
        if together:
            while self.d.scheduler.has_requests():
                self.p.step()
                self.d.step()
                assert time.monotonic() - began < 60, "still busy"
        self.p.until_idle()
        if not together:
            began = time.monotonic()
            for name, prompt in zip(names, prompts, strict=True):
                self.d.add(name, prompt, 2, kv=self.p.told.pop(f"p{name}"))
            self.d.until_idle(60)
        self.most = max(self.most, time.monotonic() - began)
        for name, prompt in zip(names, prompts, strict=True):
            self.check(name, prompt, 2)
        assert self.figures(self.d)["landing"] == 0
        self.forget()
        for world in (self.p, self.d):
            assert not world.leaks(), world.leaks()


def crowd(model: str, rounds: int, rng: random.Random) -> dict[str, Any]:
    made, done = Crowd(model, rng), 0
    try:
        for done in range(1, rounds + 1):  # noqa: B007 (said of a round that fails)
            made.round()
        said = made.figures(made.d)
        return {"rounds": done, "longest": round(made.most, 2), "wrong": [], **said}
    except Exception as error:
        logging.exception("a crowd failed")
        return {"rounds": done, "wrong": [f"{type(error).__name__}: {error}"[:600]]}
    finally:
        made.close()


def several_workers(model: str) -> None:
    """Nothing is handed over to an engine of two pipeline stages: all is computed, and right."""
    config = sim_run.config(model, "")
    world = sim.World(Case(runners=(V1, V1), order="canonical"), config, dict(DECODER))
    kv = {"do_remote_prefill": True, "remote_request_id": "x", "remote_host": "127.0.0.1"}
    prompt, states = [7] * 100, list[int]()
    try:
        world.add("one", prompt, 3, kv=kv | {"remote_port": 1})
        world.until_idle()
        Model.grow(states, prompt)
        assert world.said["one"][0] == Model.following(states[-1])
        assert not world.leaks(), world.leaks()
    finally:
        world.close()


def main(model: str, rounds: str, seed: str = "0", what: str = "") -> None:
    logging.getLogger("tierloom.vllm").setLevel(logging.ERROR)
    logging.getLogger("tierloom").addHandler(errors := Errors())
    rng, began, wrong = random.Random(int(seed)), time.monotonic(), []
    total = dict.fromkeys(("rounds", "landed", "load_tokens", "requests", "read_late"), 0)
    if what == "crowd":
        said = crowd(model, int(rounds), rng)
        said["wrong"] += errors.said[:5]
        print("\nRESULT " + json.dumps(said | {"seconds": round(time.monotonic() - began, 1)}))
        return
    several_workers(model)
    left = int(rounds)
    while left > 0:
        count = min(left, 40)
        pair = Pair(model, random.Random(rng.randrange(1 << 30)), tells=left // 40 % 2 == 0)
        try:
            play(pair, count)
            leaks = pair.p.leaks() + pair.d.leaks()
            assert not leaks, leaks
            landing = pair.figures(pair.d)
            assert landing["landing"] == 0, landing
            assert not errors.said, errors.said
            late = pair.p.read_late + pair.d.read_late
            counts = (count, landing["landed"], pair.loaded(), pair.count, late)
            for name, n in zip(total, counts, strict=True):
                total[name] += n
        except Exception as error:
            logging.exception("a pair failed")
            wrong.append(f"{type(error).__name__}: {error}"[:600])
        finally:
            pair.close()
        left -= count
    print("\nRESULT " + json.dumps({
        **total, "wrong": wrong[:20], "seconds": round(time.monotonic() - began, 1)
    }))  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("vllm").setLevel(logging.ERROR)
    main(*sys.argv[1:])
