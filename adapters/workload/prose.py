"""Text of so many tokens, by the server's own count: no tokenizer is needed here."""

from __future__ import annotations

import random

from tierloom.adapters.workload.openai_stream import OpenAIStream, Sample
from tierloom.stages.errors import TierloomError

_WORDS = """
time people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home
water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea body information back parent face others level office door health
person art war history party result change morning reason
"""
WORDS = tuple(_WORDS.split())
_SHORT, _LONG = 120, 720
"""Words of the prompts by which a word's tokens are learnt."""


class Prose:
    """Random words; the same name gives the same text, in every run of one seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.per_word = 1.0
        """Tokens of a word, spaces included."""
        self.frames = {False: 0.0, True: 0.0}
        """Tokens of a chat besides its words: with a system message, and without, where many
        templates have one of their own."""

    def text(self, name: str, tokens: int) -> str:
        """About `tokens` tokens."""
        return self.words(name, max(1, round(tokens / self.per_word))) if tokens > 0 else ""

    def words(self, name: str, count: int) -> str:
        # seeding by a string is the same in every process, unlike hash()
        return " ".join(random.Random(f"{self._seed} {name}").choices(WORDS, k=count))

    async def learn(self, server: OpenAIStream) -> bool:
        """Ask the server how long three prompts are; False: it does not count, and a word is taken
        for a token. Raises TierloomError where it does not answer: nothing can be measured."""
        short, long = [await self._asked(server, count) for count in (_SHORT, _LONG)]
        led = await self._asked(server, _SHORT, system=_SHORT)
        counted = short.counted and long.counted and led.counted
        if not counted or long.prompt_tokens <= short.prompt_tokens:
            return False
        self.per_word = (long.prompt_tokens - short.prompt_tokens) / (_LONG - _SHORT)
        for system, sample, words in ((False, short, _SHORT), (True, led, 2 * _SHORT)):
            self.frames[system] = max(0.0, sample.prompt_tokens - words * self.per_word)
        return True

    async def _asked(self, server: OpenAIStream, count: int, system: int = 0) -> Sample:
        messages = [{"role": "user", "content": self.words(f"length {count}", count)}]
        if system:
            text = self.words(f"system of length {system}", system)
            messages.insert(0, {"role": "system", "content": text})
        sample = await server.ask(messages, 1)
        if sample.error:
            raise TierloomError(
                f"{server.root} fails at a first prompt of {count} words: {sample.error}: "
                f"{sample.detail or 'nothing more is known'}"
            )
        return sample
