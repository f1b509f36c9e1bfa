"""How `tierloom serve` writes its log: as text, or a JSON object a line."""

from __future__ import annotations

import json
import logging

from tierloom.stages.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


class JsonLines(logging.Formatter):
    """`time` in seconds since 1970, `level`, `logger`, `message`; `trace` of an error."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": round(record.created, 3), "level": record.levelname.lower(),
            "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return json.dumps(said)


def write_log(level: str, form: str) -> None:
    """From now on, to stderr. Raises ConfigError."""
    if level not in LEVELS:
        raise ConfigError(f"--log-level {level}: pass {', '.join(LEVELS)}")
    if form not in FORMATS:
        raise ConfigError(f"--log-format {form}: pass {' or '.join(FORMATS)}")
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
