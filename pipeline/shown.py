"""What a notebook shows of a pipeline, and the trace of its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from tierloom.pipeline.run.followed import FollowedCall
    from tierloom.pipeline.run.graph_runner import GraphRunner
    from tierloom.pipeline.run.request_trace import Trace


class Shown:
    """`Pipeline`'s displays, and who follows its requests. None of them waits for anything."""

    spec: PipelineSpec
    _runners: Mapping[str, GraphRunner]
    tiers: Mapping[str, CircuitBreaker]
    _closed: bool
    off: str | None

    def stats(self) -> dict[str, Any]:
        raise NotImplementedError

    def trace(self) -> Trace:
        """The spans of all requests while it is entered: `with pipe.trace() as trace: ...`."""
        from tierloom.pipeline.run.request_trace import Trace

        return Trace({name: runner.meters for name, runner in self._runners.items()})

    def follow(self, tell: Callable[[FollowedCall], None]) -> None:
        """From now on, until it is closed, `tell` is called with each call of a stage and the end
        of each request; on the pipeline's loop, so it must return at once."""
        from tierloom.pipeline.run.followed import follow_requests

        follow_requests(self._runners, self.tiers, tell)

    def __repr__(self) -> str:
        state = " closed" if self._closed else f" off: {self.off}" if self.off else ""
        tiers = ", ".join(f"{t.name} ({t.use})" for t in self.spec.tiers.values()) or "none"
        return f"<Pipeline {self.spec.name}{state}, tiers: {tiers}>"

    def _repr_html_(self) -> str:
        """The graph with its figures of this moment; of a closed pipeline the graph alone."""
        from tierloom.pipeline.config.picture import pipeline_svg

        return pipeline_svg(self.spec, None if self._closed else self.stats())
