"""Codecs tried on KV of one's own, without a pipeline.

from tierloom import codecs

codecs.measure(kv, ["int4", "cachegen:small"])    # bits, error, MB/s; .plot()
"""

from __future__ import annotations

from tierloom.pipeline.codec_chain import codecs as names
from tierloom.pipeline.codec_measures import (
    CodecFigures as CodecFigures,
    Measured as Measured,
    measure_codecs as measure,
)

__all__ = ["CodecFigures", "Measured", "measure", "names"]
