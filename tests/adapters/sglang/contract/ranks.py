"""One of two ranks: SGLang's controller over gloo, our backend, and pages that go missing.

    python ranks.py RANK FOLDER MODEL ROUNDS SEED

Both ranks write the same prompts. Then each loses pages of its own, and both are asked to read:
what SGLang makes of it must be the same in both, and no page may be wrong.
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

from backend import BASE, PAGE, Prompt, prompt
from device_pools import device_pool
from sglang.srt import runtime_context
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.server_args import ServerArgs
from test_hicache import settle
from test_linker import MEMORY, Bench, keys_of, same, until

PAGES, SLOTS = 20, 512


def main() -> None:
    rank, rounds, seed = int(sys.argv[1]), int(sys.argv[4]), int(sys.argv[5])
    meeting = Path(sys.argv[2]) / "world"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    args = ServerArgs(model_path=sys.argv[3], device="cpu", tp_size=2)
    runtime_context.publish(args, role="test")
    place = {
        "tp_rank": rank, "tp_size": 2, "pp_rank": 0, "pp_size": 1, "attn_tp_rank": rank,
        "attn_tp_size": 2, "attn_dp_rank": 0, "attn_cp_size": 1, "attn_dcp_rank": 0,
        "attn_dcp_size": 1, "dp_size": 1, "dcp_size": 1,
    }  # fmt: skip
    known = runtime_context._parallel_fields()
    here = {k: v for k, v in place.items() if k in known}
    with runtime_context.get_parallel().override(**here), host_memory_budget_scope(1 << 30):
        device = device_pool("mha", slots=SLOTS)
        info = device.get_device_pool_infos()[0].buffer_info
        host = MHATokenToKVPoolHost(
            info, 2.0, 0, PAGE, "layer_first", pin_memory=False, device_capacity_tokens=SLOTS,
            start_layer=0, end_layer=2,
        )  # fmt: skip
        allocator = PagedTokenToKVPoolAllocator(SLOTS, PAGE, device.dtype, "cpu", device, False)
        control = HiCacheController(
            allocator, host, PAGE, dist.group.WORLD, threading.Event(), io_backend="direct",
            write_policy="write_through", storage_backend="dynamic", prefetch_threshold=PAGE,
            model_name="some/model", storage_backend_extra_config=dict(BASE),
        )  # fmt: skip
        torch.manual_seed(rank)
        text = prompt(host, PAGES)
        asked = random.Random(seed)
        lost = random.Random(seed * 2 + rank)
        for _ in range(rounds):
            one_round(control, text, asked, lost)
        control.detach_storage_backend()
        linkers(rank)
    dist.destroy_process_group()


def one_round(control: Any, text: Prompt, asked: random.Random, lost: random.Random) -> None:
    storage, host = control.storage_backend, control.mem_pool_host
    control.write_storage(text.slots, text.tokens, text.keys, prefix_keys=[])
    assert control.ack_backup_queue.get(timeout=60).completed_tokens == PAGES * PAGE
    settle(storage)
    pipeline = storage._store.pipeline
    for at in range(3, PAGES, 4):  # whole chunks, by their last page
        if lost.random() < 0.3:
            key = bytes.fromhex(text.keys[at])
            pipeline._portal.call(pipeline.tiers["hot"].delete, [key])
    first = asked.randrange(PAGES)
    before = text.keys[first - 1] if first else None
    control.prefetch("a", text.tokens[first * PAGE :], before, text.keys[:first])
    hit = control.prefetch_hit_queue.get(timeout=60)
    agreed = torch.tensor([hit.storage_hit_count, -hit.storage_hit_count])
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    assert int(agreed[0]) == -int(agreed[1]) == hit.storage_hit_count
    slots = control.alloc_prefetch_host_buffers(hit, hit.storage_hit_count)
    hit.host_indices = slots
    control.prefetch_buffer.put(hit)
    came = 0
    while True:
        ack = control.ack_prefetch_queue.get(timeout=60)
        came = came if ack.completed_tokens is None else ack.completed_tokens
        if ack.completed_req:
            break
    assert came == hit.storage_hit_count
    for i in range(came // PAGE):
        page = host.get_data_page(int(slots[i * PAGE]))
        assert torch.equal(page, text.content[first + i]), f"page {first + i} is wrong"
    host.free(slots)


def linkers(rank: int) -> None:
    """A page that one rank lacks is loaded by neither; what one cannot store, both acknowledge."""
    bench, keys = Bench("mha", MEMORY, group=dist.group.WORLD), keys_of(1, 8)
    content = bench.store(keys)
    found = bench.linker.lookup("a", bench.transfer(keys))
    assert found == list(range(1, 9))
    assert same(bench.load("a", keys), content)
    pipeline = bench.linker._store.pipeline
    if rank == 1:
        pipeline._portal.call(pipeline.tiers["hot"].delete, [bytes.fromhex(keys[3])])
    assert bench.load("b", keys) is None
    assert bench.linker.start_layer_wise_loading() == -1
    if rank == 0:
        bench.linker.off = "it cannot"
    slots = bench.allocator.alloc(8 * PAGE)
    assert bench.linker.offload(bench.transfer(keys, slots))
    until(lambda: bench.linker.num_completed_offloads() == 1)
    assert bench.linker.pop_completed_offload() == (rank == 1)
    bench.linker.close()


if __name__ == "__main__":
    main()
