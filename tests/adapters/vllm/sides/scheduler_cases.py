"""The scheduler's side of the connector, without an engine: run by vLLM's own Python.

What an engine reaches only by chance of timing is set up by hand here. Prints the names of the
cases that held.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from types import SimpleNamespace as Bag
from typing import Any

import numpy as np
from vllm.v1.request import RequestStatus

from tierloom.adapters.vllm.exchange.messages import (
    CacheEvent,
    Placed,
    WorkerInfo,
    WorkerReport,
    WorkerReports,
)
from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.adapters.vllm.scheduler.side import SchedulerSide
from tierloom.adapters.vllm.worker.pipelines import _refuse
from tierloom.stages.errors import LayoutError
from tierloom.stages.kv.chain_seed import sglang_seed
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import Chain

WHOLE = Namespace(model="m")
TOKENS = 1024


def side(load: str = "async") -> SchedulerSide:
    transfer = Bag(is_kv_consumer=True, is_kv_producer=True, engine_id="e")
    config: Any = Bag(
        kv_transfer_config=transfer,
        parallel_config=Bag(world_size=1),
        max_concurrent_batches=1,
        speculative_config=None,
    )
    group = Bag(kv_cache_spec=Bag(block_size=32))
    caches = Bag(kv_cache_groups=[group], cache_hit_alignment_tokens=32, hash_block_size=32)
    return SchedulerSide(config, caches, configured({"tierloom.load": load}))


def info() -> WorkerInfo:
    return WorkerInfo(
        namespace=WHOLE, keys="own", grain=32, chunk=256, unit=32, groups=1, tiers=("hot",),
        remote="", uses={}, worth="always", deadline=1.0, token_bytes=1000, off="",
    )  # fmt: skip


def request(name: str = "r", seed: int = 0) -> Any:
    tokens = [(seed + i) % 1000 for i in range(TOKENS)]
    return Bag(
        request_id=name, kv_transfer_params=None, prompt_embeds=None, prompt_token_ids=tokens,
        lora_request=None, num_tokens=TOKENS, num_prompt_tokens=TOKENS, all_token_ids=tokens,
        mm_features=[], block_hashes=[], cache_salt=None, num_computed_tokens=0,
        status=RequestStatus.RUNNING,
    )  # fmt: skip


def step(scheduler: SchedulerSide, *names: str, tokens: int = TOKENS, again: Any = None) -> Any:
    state = Bag(get_block_ids=lambda _: (list(range(1, TOKENS // 32 + 1)),))
    return scheduler.build_connector_meta(
        Bag(
            total_num_scheduled_tokens=tokens * len(names),
            num_scheduled_tokens=dict.fromkeys(names, tokens),
            kv_connector_block_state=state,
            preempted_req_ids=again,
        )
    )


def tell(scheduler: SchedulerSide, **told: Any) -> None:
    scheduler.update_connector_output(WorkerReports({0: WorkerReport(**told)}))


def seen(chunks: int, seed: int = 0) -> list[CacheEvent]:
    chain = Chain(WHOLE.digest, 32)
    chain.extend(np.array([(seed + i) % 1000 for i in range(TOKENS)], np.int32))
    parts = [b"".join(chain.links[i : i + 8]) for i in range(0, 8 * chunks, 8)]
    return [CacheEvent(0, "hot", True, part) for part in parts]


def a_request_waits_until_all_is_told_and_not_again() -> None:
    scheduler, first = side(), request()
    scheduler.on_new_request(first)
    assert scheduler.get_num_new_matched_tokens(first, 0) == (None, False)
    tell(scheduler, info=info(), events=seen(1), more=True)
    assert scheduler.get_num_new_matched_tokens(first, 0) == (None, False), "there is more to come"
    tell(scheduler, events=seen(4)[1:], more=False)
    assert scheduler.get_num_new_matched_tokens(first, 0) == (992, True)
    tell(scheduler, events=seen(2, seed=7), more=True)  # busy, long after the start
    second = request("s")
    scheduler.on_new_request(second)
    assert scheduler.get_num_new_matched_tokens(second, 0) == (992, True)


def a_reset_that_preempts_is_fenced_though_the_request_runs_again() -> None:
    for again, status in ((None, RequestStatus.PREEMPTED), ({"r"}, RequestStatus.RUNNING)):
        scheduler, one = side(), request()
        tell(scheduler, info=info())
        scheduler.on_new_request(one)
        saves = step(scheduler, "r").saves
        assert [save.span.tokens for save in saves] == [TOKENS]
        assert step(scheduler).fenced == []
        one.status = status
        assert step(scheduler, again=again).fenced == [saves[0].job]
        tell(scheduler, captured=[saves[0].job])
        assert step(scheduler, again=again).fenced == []


def what_waits_is_dropped_when_its_blocks_are_taken() -> None:
    for again, status in ((None, RequestStatus.PREEMPTED), ({"r"}, RequestStatus.RUNNING)):
        scheduler, one = in_doubt()
        assert step(scheduler, "r", tokens=TOKENS).saves == [], "the load may still fail"
        one.status = status
        assert step(scheduler, again=again).saves == []
        tell(scheduler, loaded=["r"])
        assert step(scheduler).saves == []
        assert not scheduler.saves.jobs  # type: ignore[union-attr]


def saves_wait_for_a_load_within_the_step() -> None:
    scheduler, _ = in_doubt()
    assert step(scheduler, "r").saves == []
    tell(scheduler, loaded=["r"])
    assert [save.request for save in step(scheduler).saves] == ["r"]


def a_load_that_failed_within_the_step_spoils_them() -> None:
    scheduler, one = in_doubt()
    assert step(scheduler, "r").saves == []
    assert scheduler.request_finished_all_groups(one, ([],)), (
        "its blocks are needed as long as the save waits"
    )
    assert step(scheduler).held == [], "and are not given back before it has gone out"
    tell(scheduler, loaded=["r"], failed=["r"])
    last = step(scheduler)
    assert (last.saves, last.held) == ([], ["r"])
    assert scheduler.report()["jobs"] == 0


def a_load_that_cannot_be_made_is_in_doubt_too() -> None:
    scheduler, one = side("layer"), request()
    tell(scheduler, info=info(), events=seen(2))
    scheduler.on_new_request(one)
    assert scheduler.get_num_new_matched_tokens(one, 0) == (512, False)
    broken = Bag(get_block_ids=lambda: ([1], [2]))  # more groups than there are
    scheduler.update_state_after_alloc(one, broken, 512)
    plan = step(scheduler, "r")
    assert [(load.span.tokens, load.layered) for load in plan.loads] == [(0, True)]
    assert plan.saves == []


def a_follow_up_does_not_wait_for_what_vllm_has_itself() -> None:
    """Its predecessor, whose blocks are in vLLM's own cache, is being saved just now."""
    scheduler, one = side(), request()
    tell(scheduler, info=info())
    scheduler.on_new_request(one)
    assert len(step(scheduler, "r").saves) == 1
    for computed, says in ((0, (None, False)), (512, (None, False)), (992, (0, False))):
        again = request(f"s{computed}")
        scheduler.on_new_request(again)
        assert scheduler.get_num_new_matched_tokens(again, computed) == says, computed


def what_was_computed_before_a_reset_is_not_saved_behind_it() -> None:
    scheduler, before = side(), request()
    tell(scheduler, info=info(), events=seen(2))
    scheduler.on_new_request(before)
    before.num_computed_tokens = 512
    assert not scheduler.reset_cache(), "there is no worker that could have done it"
    assert scheduler.get_num_new_matched_tokens(before, 0) == (0, False), (
        "nothing is known to be kept"
    )
    assert step(scheduler, "r").saves == []
    behind = request("s")
    scheduler.on_new_request(behind)
    assert [save.epoch for save in step(scheduler, "s").saves] == [1]


def a_session_that_goes_on_is_named_by_what_it_is_now() -> None:
    """vLLM drops the token that was sampled last, and puts the next input in its place."""
    scheduler, one = side(), request()
    tell(scheduler, info=info())
    scheduler.on_new_request(one)
    step(scheduler, "r")
    tracked = scheduler._requests["r"]
    old = list(tracked.chain.links)  # type: ignore[union-attr]
    one.all_token_ids = one.all_token_ids[: TOKENS - 1] + [7] * 65
    one.num_tokens = one.num_prompt_tokens = len(one.all_token_ids)
    one.num_computed_tokens = TOKENS - 1
    state = Bag(get_block_ids=lambda _: (list(range(1, 36)),))
    saves = scheduler.build_connector_meta(
        Bag(
            total_num_scheduled_tokens=65, num_scheduled_tokens={"r": 65},
            kv_connector_block_state=state, preempted_req_ids=None,
        )
    ).saves  # fmt: skip
    right = Chain(WHOLE.digest, 32)
    right.extend(np.array(one.all_token_ids, np.int32))
    assert old[:-1] == right.links[:31]
    assert old[-1] != right.links[31]
    assert tracked.chain.links == right.links  # type: ignore[union-attr]
    assert b"".join(s.span.links for s in saves).endswith(right.links[-1])


def a_worker_that_tells_twice_in_a_step_is_heard_twice() -> None:
    one, two = Placed([(0, 4)], [], probe=True), Placed([(0, 8)], [], probe=False)
    first = WorkerReport(
        info=info(), events=seen(1), more=True, captured=[1], ended=[2], answers={"q": 3, "r": 1},
        loaded=["r"], failed=["r"], costs={"hot": (1.0, 1.0), "warm": (5.0, 5.0)},
        placed={"p": one, "q": one}, proved="", broken={"p": "why"},
        landed=["v"],
    )  # fmt: skip
    later = WorkerReport(
        events=seen(2)[1:], captured=[3], ended=[4], answers={"r": 2}, loaded=["s"], failed=["s"],
        costs={"hot": (2.0, 2.0)}, placed={"p": two}, broken={"q": "how"},
        landed=["w"],
    )  # fmt: skip
    nothing = WorkerReport()
    assert all(getattr(first, f.name) != getattr(nothing, f.name) for f in fields(WorkerReport))
    other = WorkerReport(ended=[9])
    news = (
        WorkerReports({0: first})
        .aggregate(WorkerReports({1: other}))
        .aggregate(WorkerReports({0: later}))
    )
    assert news.by_worker == {
        0: WorkerReport(
            info=info(), events=seen(2), more=False, captured=[1, 3], ended=[2, 4],
            answers={"q": 3, "r": 2}, loaded=["r", "s"], failed=["r", "s"],
            costs={"hot": (2.0, 2.0), "warm": (5.0, 5.0)}, placed={"p": two, "q": one}, proved="",
            broken={"p": "why", "q": "how"}, landed=["v", "w"],
        ),
        1: other,
    }  # fmt: skip
    assert (first.events, first.ended) == (seen(1), [2]), "what was aggregated stays as it was"


def jobs_end_though_their_worker_told_twice_in_a_step() -> None:
    scheduler, one = side(), request()
    tell(scheduler, info=info())
    scheduler.on_new_request(one)
    (save,) = step(scheduler, "r").saves
    assert scheduler.request_finished_all_groups(one, ([],))
    assert scheduler.has_pending_push_work()
    parts = [
        WorkerReport(captured=[save.job]),
        WorkerReport(ended=[save.job], events=seen(4)),
        WorkerReport(events=seen(1)),
    ]
    scheduler.update_connector_output(
        WorkerReports({0: parts[0]})
        .aggregate(WorkerReports({0: parts[1]}))
        .aggregate(WorkerReports({0: parts[2]}))
    )
    assert step(scheduler).held == ["r"]
    assert not scheduler.has_pending_push_work(), "an idle engine would step for ever"


def what_a_draft_model_did_not_see_is_not_kept() -> None:
    """One request in the batch is too long for it: then it runs for none of them."""
    scheduler, one, long = side(), request(), request("long", seed=3)
    scheduler.saves._drafted = 2000  # type: ignore[union-attr]
    tell(scheduler, info=info())
    for each in (one, long):
        scheduler.on_new_request(each)
    long.num_computed_tokens = 1990
    assert "r" not in [save.request for save in step(scheduler, "r", "long", tokens=512).saves]
    one.num_computed_tokens = 512
    assert step(scheduler, "r", tokens=512).saves == []
    other = request("s", seed=5)
    scheduler.on_new_request(other)
    assert [save.request for save in step(scheduler, "s").saves] == ["s"]


def drafts_that_look_at_hidden_states_are_refused_by_name() -> None:
    def said(method: str) -> str:
        try:
            _refuse(Bag(parallel_config=Bag(), speculative_config=Bag(method=method)))
        except LayoutError as error:
            return str(error)
        return ""

    assert said("ngram") == said("draft_model") == ""
    assert said("eagle3").startswith("speculative decoding by eagle3")
    assert said("mtp").startswith("speculative decoding by mtp")


def keys_of_sglang_are_its_page_hashes() -> None:
    """Until an image: SGLang has other tokens in its place."""
    scheduler = side()
    tell(scheduler, info=info()._replace(keys="sglang"))
    image = Bag(mm_position=Bag(offset=70), mm_hash="cat", identifier="cat")
    for salt, features, alike in ((None, [], 32), ("s", [], 32), (None, [image], 2)):
        one = request()
        one.cache_salt, one.mm_features = salt, features
        scheduler.on_new_request(one)
        pages, link = [], sglang_seed(None, salt)
        for at in range(0, TOKENS, 32):
            page = np.array(one.all_token_ids[at : at + 32], "<u4").tobytes()
            link = hashlib.sha256(link + page).digest()
            pages.append(link)
        found = scheduler._requests.pop("r").links("sglang").links
        assert [a == b for a, b in zip(found, pages, strict=True)] == [i < alike for i in range(32)]


def in_doubt() -> tuple[SchedulerSide, Any]:
    """A request of which two chunks are loaded within the step, and the rest is computed."""
    scheduler, one = side("layer"), request()
    tell(scheduler, info=info(), events=seen(2))
    scheduler.on_new_request(one)
    assert scheduler.get_num_new_matched_tokens(one, 0) == (512, False)
    blocks = Bag(get_block_ids=lambda: (list(range(1, TOKENS // 32 + 1)),))
    scheduler.update_state_after_alloc(one, blocks, 512)
    return scheduler, one


CASES = [
    a_request_waits_until_all_is_told_and_not_again,
    a_reset_that_preempts_is_fenced_though_the_request_runs_again,
    what_waits_is_dropped_when_its_blocks_are_taken,
    saves_wait_for_a_load_within_the_step,
    a_load_that_failed_within_the_step_spoils_them,
    a_load_that_cannot_be_made_is_in_doubt_too,
    a_follow_up_does_not_wait_for_what_vllm_has_itself,
    what_was_computed_before_a_reset_is_not_saved_behind_it,
    a_session_that_goes_on_is_named_by_what_it_is_now,
    a_worker_that_tells_twice_in_a_step_is_heard_twice,
    jobs_end_though_their_worker_told_twice_in_a_step,
    what_a_draft_model_did_not_see_is_not_kept,
    drafts_that_look_at_hidden_states_are_refused_by_name,
    keys_of_sglang_are_its_page_hashes,
]

if __name__ == "__main__":
    for case in CASES:
        case()
        print(case.__name__, flush=True)
