"""What an engine's adapter must know of a pipeline, and set in it, before it is opened or then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.ops.lookup import Lookup

if TYPE_CHECKING:
    from tierloom.pipeline.pipeline import Pipeline


def lookup_node(spec: PipelineSpec) -> Any:
    """The lookup stage of the retrieve graph, if there is one."""
    graph = spec.graphs.get("retrieve")
    return next((n for n in graph.nodes if issubclass(n.cls, Lookup)), None) if graph else None


def keeps_content(spec: PipelineSpec) -> bool:
    """Stores keep text with its token ids."""
    graph = spec.graphs.get("store")
    nodes = graph.nodes if graph else ()
    return any(issubclass(n.cls, Lookup) and n.options.by == "content" for n in nodes)


def asked_tiers(spec: PipelineSpec) -> list[str]:
    """The tiers that a retrieve asks, best first."""
    plan = lookup_node(spec)
    return (plan.options.tiers if plan else None) or list(spec.tiers)


def own_paths(spec: PipelineSpec, folder: str) -> dict[str, Any]:
    """Overrides that put what only one process may use below `folder`; none where that is empty."""
    return {
        f"tiers.{name}.path": f"{tier.options.path}/{folder}"
        for name, tier in spec.tiers.items()
        if folder and tier.cls.local and hasattr(tier.options, "path")
    }


def touch_ahead(pipeline: Pipeline) -> None:
    """Have its memory made ready before it is needed, unless the file says `budget.touch: false`:
    an engine lives so long that all of it will be used."""
    if pipeline.spec.budget.touch and not pipeline.off:
        pipeline.arena.touch_ahead()
