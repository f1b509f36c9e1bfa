"""The rANS streams: what is in them, how long they can be, and which lane codes what.

Symbols are bytes, ``u8 [planes, tokens, channels]``. Each is coded by one of K static frequency
tables over NS symbols (`rans_tables`), chosen per plane and channel by ``tabid u8 [planes,
channels]``. A plane's channels are cut into `groups` of ``lanes * rounds`` consecutive ones (the
last may be shorter), and each (plane, group) is one *stream*, numbered ``plane * groups + group``.
Lane j of a stream codes, token by token, its group's channels ``round * lanes + j`` for round
0, 1, ...; all lanes do so in lock step, so a stream has ``tokens * rounds`` steps.

A lane is a rANS coder (Duda 2013, "Asymmetric numeral systems", arXiv:1311.2540) with a state x
of 32 bits that stays in [2^16, 2^32), renormalised by words of 16 bits, at most one a symbol.
With n = 2^bits, bits 10, 11 or 12, a symbol of frequency f (of n) and cumulated frequency c:

    encode    if x >= f * 2^(32 - bits): emit x mod 2^16; x = x div 2^16
              x = (x div f) * n + x mod f + c
    decode    c <= x mod n < c + f names the symbol; x = f * (x div n) + x mod n - c
              if x < 2^16: x = x * 2^16 + next word

The encoder goes through the steps backwards and starts with x = 2^16 in every lane, so the decoder
goes forwards and must end there: a check of 32 bits a lane that costs nothing. The words of one
step stand in the order of their lanes (Giesen 2014, "Interleaved entropy coders",
arXiv:1402.3392; on GPUs: DietGPU), so a stream is one run of words without padding or lengths per
lane. What is kept of ``streams = planes * groups`` streams:

    words     u16 [any]                the streams' words, one stream after the other
    counts    u32 [planes, groups]     words of each stream; where one begins is their sum so far
    states    u32 [planes, groups, lanes]    where the encoder ended and the decoder begins;
                                             2^16 in a lane that codes no channel

The three backends (`rans`, `rans_cpu`, `rans_reference`) write the same streams, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

INITIAL_STATE = 1 << 16
"""Of every lane before its first symbol is encoded, and after its last is decoded."""
DONE, BAD = 1, 2
"""States of a stream after a call: whole and verified, or not to be used."""

_PER_LANE = 1024
"""Symbols that are worth a lane's 4 bytes of state: 1/32 bit each."""
_LANES = (32, 16, 8)
"""A warp of lanes; fewer where a plane is too small to feed them, down to a vector of a CPU."""


@dataclass(frozen=True, slots=True)
class StreamGrid:
    """How symbols of one shape are cut into streams; `of` gives what the format prescribes."""

    planes: int
    tokens: int
    channels: int
    lanes: int
    rounds: int
    """Channels that a lane codes of each token, in its group."""

    @classmethod
    def of(cls, planes: int, tokens: int, channels: int) -> StreamGrid:
        """The format's rule: each lane codes 1024 symbols or more, where there are that many.

        First the rounds that this needs: r = ceil(1024 / tokens). Then the most lanes, 32, 16 or
        8, that the channels fill for r rounds (else 8). Then as many groups as they fill (else
        one), and in the end as few rounds as cover all channels. With 256 tokens, `states` and
        `counts` cost 0.016 to 0.033 bit per symbol from 64 channels on.
        """
        cls(planes, tokens, channels, 1, 1)  # refuses what cannot be divided by
        wanted = -(-_PER_LANE // tokens)
        lanes = next((n for n in _LANES if n * wanted <= channels), _LANES[-1])
        groups = max(1, channels // (lanes * wanted))
        return cls(planes, tokens, channels, lanes, -(-channels // (lanes * groups)))

    def __post_init__(self) -> None:
        """Raises ValueError for a shape without symbols, or too large for a GPU's integers."""
        if min(self.planes, self.tokens, self.channels, self.lanes, self.rounds) < 1:
            raise ValueError(f"no streams of nothing: {self}")
        if self.tokens * (self.channels + self.lanes * self.rounds) >= 1 << 31:
            raise ValueError(f"a plane may have 2^31 symbols at most: {self}")

    @property
    def groups(self) -> int:
        return -(-self.channels // (self.lanes * self.rounds))

    @property
    def streams(self) -> int:
        return self.planes * self.groups

    def most_words(self, bits: int) -> int:
        """The most words that all streams can have together; symbols of frequency 1 need them.

        A lane that codes n symbols emits ``bits * n // 16`` words at most. For let h be
        floor(log2 x): a symbol of frequency 1 raises h by `bits`; one of frequency f > 1 by
        less, since x div f is at most half of x; a word lowers it by 16. It starts at 16 and
        ends at 16 or more, so the words have lowered it by no more than it was raised.
        """
        size = self.lanes * self.rounds
        whole, rest = divmod(self.channels, size)
        return self.planes * (whole * self._group_words(size, bits) + self._group_words(rest, bits))

    def stream_words(self, bits: int) -> int:
        """The most words that any one stream can have: see `most_words`."""
        return self._group_words(min(self.channels, self.lanes * self.rounds), bits)

    def _group_words(self, channels: int, bits: int) -> int:
        rounds, more = divmod(channels, self.lanes)
        words = self.lanes * (bits * self.tokens * rounds // 16)
        return words + more * (
            bits * self.tokens * (rounds + 1) // 16 - bits * self.tokens * rounds // 16
        )

    def require(self, **shapes: tuple[int, ...]) -> None:
        """Raises ValueError unless the named arrays have the shapes that this grid gives them."""
        lanes = (self.planes, self.groups, self.lanes)
        wanted = {
            "symbols": (self.planes, self.tokens, self.channels),
            "tabid": (self.planes, self.channels),
            "counts": lanes[:2],
            "states": lanes,
            "status": lanes[:2],
        }
        for name, shape in shapes.items():
            if tuple(shape) != wanted[name]:
                raise ValueError(f"{name} is {list(shape)}, but must be {list(wanted[name])}")
