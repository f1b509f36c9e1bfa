"""Opens the pipelines of SGLang's pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tierloom.adapters.engine.extra_config import ExtraConfig
from tierloom.adapters.engine.pipeline_parts import own_paths, touch_ahead
from tierloom.adapters.engine.rank import Rank
from tierloom.adapters.sglang.page_store import PageStore
from tierloom.adapters.sglang.pool import Pages, opaque_pages
from tierloom.adapters.sglang.settings import Settings, patient
from tierloom.adapters.sglang.share import share_of, side_weights
from tierloom.pipeline.pipeline import Pipeline
from tierloom.pipeline.runtime import Change
from tierloom.stages.errors import LayoutError

if TYPE_CHECKING:
    from tierloom.adapters.door.http_door import HttpDoor


def open_pages(
    said: ExtraConfig[Settings], overrides: Mapping[str, Any], pages: Pages, rank: Rank, *,
    args: Any, start_layer: int, watch: Callable[[Change], None] | bool = False,
) -> PageStore:  # fmt: skip
    """The KV pool's pages in a pipeline. `args`: SGLang's ServerArgs. Raises ConfigError,
    LayoutError."""
    share = share_of(args, said.settings, rank, pages, start_layer=start_layer)
    overrides = {**overrides, **own_paths(said.pipeline(overrides), rank.folder)}
    pipeline = Pipeline(said.pipeline(overrides), pages.layout, watch=watch, **share._asdict())
    if pipeline.off:
        pipeline.close()
        raise LayoutError(pipeline.off)
    touch_ahead(pipeline)
    return PageStore(pages, pipeline, wait=said.settings.wait, min_tokens=said.settings.min_tokens)


def open_side_pool(
    said: ExtraConfig[Settings], main: PageStore, pool: Any, name: str, rank: Rank
) -> list[PageStore]:
    """A side pool's pages, an object each, in pipelines of their own whose tiers are as large as
    their share of a page's bytes; a page is there when all have it. Raises LayoutError,
    ConfigError."""
    stages = [n.cls for graph in main.pipeline.spec.graphs.values() for n in graph.nodes]
    if any(cls.canonical for cls in stages):
        raise LayoutError("a stage of the pipeline works on tokens and heads, which these are not")
    whole, stores = main.pipeline.names, []
    chunks = {"chunk.tokens": 1, "chunk.grain": 1, "chunk.keys": "sglang", "order": "canonical"}
    for i, pages in enumerate(opaque_pages(pool)):
        ours = f"{name}{i or ''}"
        folder = "-".join(part for part in (rank.folder, ours) if part)
        overrides = patient(said) | said.overrides | chunks
        overrides |= own_paths(said.pipeline(overrides), folder)
        for tier, spec in main.pipeline.spec.tiers.items():
            if spec.cls.local and hasattr(spec.options, "capacity"):
                share = int(spec.options.capacity * pages.nbytes / main.pages.nbytes)
                overrides[f"tiers.{tier}.capacity"] = max(8 << 20, share)
        pipeline = Pipeline(
            said.pipeline(overrides), pages.layout, model=whole.model,
            weights=side_weights(whole.weights, name, pool), layers=whole.layers,
            heads=(rank.tp, rank.tp + 1), part=whole.part + ours,
        )  # fmt: skip
        touch_ahead(pipeline)
        stores.append(PageStore(pages, pipeline, wait=said.settings.wait, min_tokens=0))
    return stores


def open_rank_door(
    said: ExtraConfig[Settings], stores: Callable[[], Sequence[PageStore]]
) -> HttpDoor | None:
    """Where `tierloom.http` says; None: its port is another's. Raises ConfigError."""
    from tierloom.adapters.door.engine_door import open_engine_door
    from tierloom.adapters.door.http_door import ordered

    async def read() -> dict[str, Any]:
        pipelines = [store.pipeline for store in stores()]
        for pipeline in pipelines:  # a pool may be registered later
            pipeline.measure()
        return {str(i): pipeline.stats() for i, pipeline in enumerate(pipelines)}

    async def act(order: str, body: Mapping[str, Any], id: str) -> dict[str, Any]:
        return await ordered([store.pipeline for store in stores()], order, body, id)

    stores()[0].pipeline.measure()
    door = open_engine_door(said.settings.http, stores()[0].pipeline.spec, read, act)
    if door is not None:
        for store in stores():
            store.pipeline.introduce(door=door.url)
    return door


def sglang_rank() -> Rank:
    """The position of this process, once SGLang has placed it."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_parallel

    p, split = get_parallel(), is_dp_attention_enabled()
    tp = (p.attn_tp_rank, p.attn_tp_size) if split else (p.tp_rank, p.tp_size)
    return Rank(*tp, p.pp_rank, p.pp_size, replica() or (p.attn_dp_rank if split else 0), 1)


def replica() -> int:
    """Numbers the copies of a model that SGLang runs beside each other."""
    from sglang.srt.runtime_context import get_parallel

    try:
        return int(getattr(get_parallel(), "dp_rank", 0) or 0)
    except RuntimeError:  # no such controller has said it
        return 0
