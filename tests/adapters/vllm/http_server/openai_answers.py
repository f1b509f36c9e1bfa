"""What the `openai` package makes of a server's answers: python openai_answers.py URL (JSON out).

Runs in vLLM's environment, which has that package.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from openai import APIStatusError, OpenAI

LENGTHS = (1, 2, 31, 32, 33, 64, 500, 513, 1024, 2000, 3000)
OWN = {"id", "created", "system_fingerprint"}


def said(answer: Any) -> Any:
    """Without what is an answer's own."""
    return {k: v for k, v in answer.model_dump().items() if k not in OWN}


def joined(stream: Any) -> Any:
    """A stream's text, how it ended and what was used: how many tokens a busy vLLM puts into a
    piece is chance."""
    text, ends, usage = "", [], None
    for piece in map(said, stream):
        usage = piece["usage"] or usage
        for choice in piece["choices"]:
            text += choice["delta"]["content"] or "" if "delta" in choice else choice["text"]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return [text, ends, usage]


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100)
    found: list[Any] = [[m.id for m in client.models.list()]]
    how: dict[str, Any] = {"model": "tiny", "temperature": 0, "seed": 1}
    for length in LENGTHS:
        words = random.Random(length)
        text = " ".join(f"w{words.randrange(3, 512)}" for _ in range(length))
        messages = [{"role": "user", "content": text}]
        found.append(said(client.completions.create(prompt=text, max_tokens=8, **how)))
        found.append(said(client.chat.completions.create(messages=messages, max_tokens=1, **how)))
        for create, prompt in (
            (client.completions.create, {"prompt": text}),
            (client.chat.completions.create, {"messages": messages}),
        ):
            options = {"stream_options": {"include_usage": True}, "max_tokens": 12}
            found.append(joined(create(stream=True, **prompt, **options, **how)))
    asked = {"prompt": "w5 " * 900, "max_tokens": 2, **how}
    wrong: list[dict[str, Any]] = [{"model": "none"}, {"max_tokens": -1}, {"prompt": "w5 " * 5000}]
    found += [refused(client, asked | each) for each in wrong]
    print(json.dumps(found))


def refused(client: OpenAI, asked: dict[str, Any]) -> Any:
    try:
        return said(client.completions.create(**asked))
    except APIStatusError as error:
        return [error.status_code, error.body]


if __name__ == "__main__":
    main(sys.argv[1])
