"""The text of a row as it grows: what one more token adds for sure.

Held back is what later tokens may still change: an incomplete character, and whatever could be the beginning
of a stop text. All deltas of a row together are its text.
"""

from __future__ import annotations

from workers.engine.generation.request import Request
from workers.engine.stopping import Sample

_INCOMPLETE = "\ufffd"
# Tokens that are decoded again with each new one: between these numbers of them.
_LEAST, _MOST = 16, 64


class TextStream:
    """What has been told of one row's text."""

    def __init__(self, request: Request) -> None:
        """Nothing yet."""
        self._decoder, self._stops = request.tokenizer, request.stop_strings
        # The text of the tokens from `_begin` on is decoded; of it, `_told` characters were told, of all
        # of the text `_total`.
        self._begin = self._told = self._total = 0

    def delta(self, sample: Sample) -> str | None:
        """What the newest token of `sample` adds, None where that is nothing yet."""
        new = sample.text[self._total :] if sample.finish_reason else self._settled(sample)
        self._told += len(new)
        self._total += len(new)
        return new or None

    def _settled(self, sample: Sample) -> str:
        ids = sample.token_ids
        text = self._decoder.decode(ids[self._begin :])
        if len(ids) - self._begin > _MOST:
            text = self._shortened(text, ids)
        end = len(text)
        while end and text[end - 1] == _INCOMPLETE:
            end -= 1
        return text[self._told : end - self._held(text[:end])]

    def _shortened(self, text: str, ids: list[int]) -> str:
        """The text from a later token on, if decoding from there gives just the end of it."""
        begin = len(ids) - _LEAST
        later = self._decoder.decode(ids[begin:])
        cut = len(text) - len(later)
        if not text.endswith(later) or cut > self._told:
            return text
        self._begin, self._told = begin, self._told - cut
        return later

    def _held(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
