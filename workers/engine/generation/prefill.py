"""New rows of a slab: every sequence is computed once, and a beginning that several share, once for all.

Sequences lie end to end without padding. What a row may begin with is taken from a row that is there already,
or from the first of the new ones that share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from workers.engine.generation.ticket import Row
from workers.engine.llama import Fresh, Llama
from workers.engine.slab import Slab

# Sharing less is not worth a pass of its own.
LEAST_SHARED = 32
# Tokens of one pass: more only take memory.
MOST_TOKENS = 4096


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows of one adapter side by side, in them the shorter ones first and equal sequences together."""
    numbers: dict[int, int] = {}
    for row in rows:
        numbers.setdefault(id(row.terms), len(numbers))
    return sorted(rows, key=lambda row: (numbers[id(row.terms)], len(row.tokens), row.tokens))


def prefill(decoder: Llama, slab: Slab, active: Sequence[Row], new: Sequence[Row]) -> Tensor:
    """Fill the slots behind those of `active` with `new` rows, in this order (of `ordered`); the hidden
    state of the last token of each [N, H]. The slab has room for them and does not count them yet."""
    sequences = _distinct(new, len(active))
    begins, rest = _shared(sequences, slab, active)
    for part in _passes([piece for one in begins for piece in _pieces(one)]):
        decoder.fill(part, slab)
    pieces = [_pieces(one) for one in rest]
    passes = _passes([piece for one in pieces for piece in one])
    hidden = torch.cat([decoder.fill(part, slab) for part in passes])
    ends = torch.tensor([len(one) for one in pieces], device=hidden.device).cumsum(0) - 1
    counts = torch.tensor([one.last - one.first for one in rest], device=hidden.device)
    return hidden[ends].repeat_interleave(counts, 0)


def _distinct(rows: Sequence[Row], slot: int) -> list[Fresh]:
    """Each sequence once, with the slots of all rows that have it, from `slot` on."""
    found = []
    for _, group in groupby(rows, lambda row: (id(row.terms), row.tokens)):
        same = list(group)
        found.append(Fresh(same[0].tokens, slot, slot + len(same), same[0].terms))
        slot += len(same)
    return found


def _shared(
    sequences: Sequence[Fresh], slab: Slab, active: Sequence[Row]
) -> tuple[list[Fresh], list[Fresh]]:
    """What must be computed first, and all sequences without what they find there then."""
    begins: list[Fresh] = []
    rest: list[Fresh] = []
    alike: dict[object, list[Fresh]] = {}
    for one in sequences:
        alike.setdefault(_begin(one.terms, one.tokens), []).append(one)
    donors = _donors(slab, active) if any(key is not None for key in alike) else {}
    found: dict[int, Fresh] = {}
    for key, group in alike.items():
        source = _longest(group, donors.get(key, [])) if key is not None else None
        if source is None and key is not None and len(group) > 1:
            source = group[0].first, _common([one.tokens for one in group])
            begins.append(
                group[0]._replace(tokens=group[0].tokens[: source[1]], last=group[0].first + 1)
            )
        for one in group:
            found[one.first] = one if source is None else _behind(one, *source)
    rest = [found[one.first] for one in sequences]
    return begins, rest


def _begin(terms: object, tokens: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    """What sequences that may share have in common; None for those that are too short."""
    if len(tokens) <= LEAST_SHARED:
        return None
    return id(terms), tuple(tokens[:LEAST_SHARED])


def _donors(slab: Slab, active: Sequence[Row]) -> dict[object, list[tuple[int, list[int]]]]:
    """The slots and tokens that are there already, by how they begin."""
    found: dict[object, list[tuple[int, list[int]]]] = {}
    for slot, row in enumerate(active):
        tokens = row.tokens[: slab.lengths[slot]]
        found.setdefault(_begin(row.terms, tokens), []).append((slot, tokens))
    return found


def _longest(
    group: Sequence[Fresh], donors: Sequence[tuple[int, list[int]]]
) -> tuple[int, int] | None:
    """The slot that has most of what all of the group begin with, and how much."""
    most = None
    for slot, tokens in donors:
        length = min(_common([one.tokens, [*tokens, -1]]) for one in group)
        if most is None or length > most[1]:
            most = slot, length
    return most


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, at most all but one of each: its last hidden state is wanted."""
    first = sequences[0]
    most = min(len(tokens) for tokens in sequences) - 1
    return next(
        (at for at in range(most) if any(tokens[at] != first[at] for tokens in sequences)), most
    )


def _behind(one: Fresh, source: int, shared: int) -> Fresh:
    return one._replace(tokens=one.tokens[shared:], source=source, shared=shared)


def _pieces(one: Fresh) -> list[Fresh]:
    """A sequence too long for one pass, piece behind piece; all but the last fill the first slot alone."""
    pieces = []
    while len(one.tokens) > MOST_TOKENS:
        pieces.append(one._replace(tokens=one.tokens[:MOST_TOKENS], last=one.first + 1))
        done = one.shared + MOST_TOKENS
        one = one._replace(tokens=one.tokens[MOST_TOKENS:], source=one.first, shared=done)
    return [*pieces, one]


def _passes(sequences: Sequence[Fresh]) -> Iterator[list[Fresh]]:
    part: list[Fresh] = []
    for one in sequences:
        if part and sum(len(other.tokens) for other in part) + len(one.tokens) > MOST_TOKENS:
            yield part
            part = []
        part.append(one)
    if part:
        yield part
