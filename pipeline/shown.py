"""What a notebook shows of a pipeline, and the trace of its requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tierloom.pipeline.config.spec import PipelineSpec

if TYPE_CHECKING:
    from tierloom.pipeline.run.graph_runner import GraphRunner
    from tierloom.pipeline.run.request_trace import Trace


class Shown:
    """`Pipeline`'s displays. None of them waits for anything."""

    spec: PipelineSpec
    _runners: Mapping[str, GraphRunner]
    _closed: bool
    off: str | None

    def stats(self) -> dict[str, Any]:
        raise NotImplementedError

    def trace(self) -> Trace:
        """The spans of all requests while it is entered: `with pipe.trace() as trace: ...`."""
        from tierloom.pipeline.run.request_trace import Trace

        return Trace({name: runner.meters for name, runner in self._runners.items()})

    def __repr__(self) -> str:
        state = " closed" if self._closed else f" off: {self.off}" if self.off else ""
        tiers = ", ".join(f"{t.name} ({t.use})" for t in self.spec.tiers.values()) or "none"
        return f"<Pipeline {self.spec.name}{state}, tiers: {tiers}>"

    def _repr_html_(self) -> str:
        """The graph with its figures of this moment; of a closed pipeline the graph alone."""
        from tierloom.pipeline.config.picture import pipeline_svg

        return pipeline_svg(self.spec, None if self._closed else self.stats())
