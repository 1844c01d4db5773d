"""When one sampled row ends, and what its text is.

Stop texts are looked for in the decoded tail of the row after each token: a stop text can begin and end
inside a token and span several, so token ids alone cannot show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Tokens before the shortest tail that could hold a stop text: decoding a tail may lose its first character.
_MARGIN = 8
# One character is at most four bytes, so at most four byte-level tokens.
_TOKENS_PER_CHARACTER = 4


class TextDecoder(Protocol):
    """What sampling asks of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        ...


@dataclass(frozen=True)
class StopRule:
    """What ends a row: one of `tokens`, one of `texts`, or `max_tokens`."""

    tokens: frozenset[int]
    texts: tuple[str, ...]

    @property
    def tail(self) -> int:
        """Tokens that surely hold the longest stop text."""
        return _TOKENS_PER_CHARACTER * max((len(text) for text in self.texts), default=0) + _MARGIN


@dataclass
class Sample:
    """One continuation; `token_ids` holds the stop token or the stop text's tokens, `text` does not."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    # Where asked for, per token, the ids and log-probabilities of the likeliest tokens at its place.
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)


class Continuation:
    """One row that is being sampled."""

    def __init__(self, rule: StopRule, decoder: TextDecoder, limit: int) -> None:
        """`limit` is the most tokens the row may get."""
        self.rule, self.decoder, self.limit = rule, decoder, limit
        self.sample = Sample()

    @property
    def finished(self) -> bool:
        """Whether the row has ended."""
        return bool(self.sample.finish_reason)

    def add(self, token: int, logprob: float) -> None:
        """Append a token and look whether it ends the row."""
        sample, rule = self.sample, self.rule
        sample.token_ids.append(token)
        sample.logprobs.append(logprob)
        if token in rule.tokens:
            self._finish("stop", self.decoder.decode(sample.token_ids[:-1]))
        elif rule.texts and (text := self._text_before_stop()) is not None:
            self._finish("stop", text)
        elif len(sample.token_ids) >= self.limit:
            self._finish("length", self.decoder.decode(sample.token_ids))

    def _finish(self, reason: str, text: str) -> None:
        self.sample.finish_reason, self.sample.text = reason, text

    def _text_before_stop(self) -> str | None:
        """The row's text up to the first stop text, or None where there is none."""
        ids = self.sample.token_ids
        tail = self.decoder.decode(ids[-self.rule.tail :], skip_special_tokens=False)
        if not any(text in tail for text in self.rule.texts):
            return None
        clean = self.decoder.decode(ids)
        begin = _first(clean, self.rule.texts)
        if begin is not None:
            return clean[:begin]
        # The stop text is, or lies across, a special token, which `clean` leaves out.
        begin = _first(self.decoder.decode(ids, skip_special_tokens=False), self.rule.texts)
        return None if begin is None else self._decode_up_to(begin)

    def _decode_up_to(self, begin: int) -> str:
        ids = self.sample.token_ids
        count = len(ids) - 1
        while count and len(self.decoder.decode(ids[:count], skip_special_tokens=False)) > begin:
            count -= 1
        return self.decoder.decode(ids[:count])


def _first(text: str, wanted: Sequence[str]) -> int | None:
    found = [place for place in (text.find(one) for one in wanted) if place >= 0]
    return min(found, default=None)
