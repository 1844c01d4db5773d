"""From logits to the next token: temperature, top_k, top_p, min_p, and one uniform number per row.

Pure functions; every setting is one number for all rows or one per row. Truncation is top_k first, then top_p
of what is left, then min_p, in the order of transformers' warpers; min_p compares with the likeliest token,
which neither of the others drops. R rows, V vocabulary; `weights` are probabilities times a constant of
their row, the likeliest token's being 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers: TypeAlias = NDArray[np.float64]
# The likeliest tokens of a row and their log-probabilities in nats, best first.
Likeliest: TypeAlias = "tuple[list[int], list[float]]"

# Nucleus sampling sorts this many of the likeliest tokens first, and more only where they do not suffice.
_FIRST_CANDIDATES = 256
# Weights are summed in runs of this many: a running sum is only made of the sums, and of one run.
_RUN = 128
# Logits of one chunk: 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24
# Below, everything but the likeliest token is impossible in any number format.
_LEAST_TEMPERATURE = 1e-30
_BELOW_ONE = 1 - 2.0**-52


# Compared by identity, so that what is made of settings can be kept with them.
@dataclass(frozen=True, eq=False)
class Settings:
    """Per row [R], on the host: temperature 0 is greedy; top_k 0 or less, top_p 1 and min_p 0 drop nothing;
    `top` is how many of the likeliest tokens are asked for."""

    temperature: Numbers
    top_k: Numbers
    top_p: Numbers
    min_p: Numbers
    top: Numbers

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Settings:
        """From (temperature, top_k, top_p, min_p, top) of each row."""
        return cls(*np.array(rows, np.float64).reshape(-1, 5).T)

    def part(self, chosen: slice | NDArray[np.int64]) -> Settings:
        """Those of some rows."""
        parts = (self.temperature, self.top_k, self.top_p, self.min_p, self.top)
        return Settings(*(part[chosen] for part in parts))

    @cached_property
    def asking(self) -> NDArray[np.int64]:
        """The numbers of the rows that ask for the likeliest tokens."""
        return np.flatnonzero(self.top)

    @cached_property
    def greedy(self) -> NDArray[np.bool_]:
        """The rows that take the likeliest token."""
        return np.equal(self.temperature, 0)

    @cached_property
    def divisors(self) -> Numbers | None:
        """What logits are divided by; None where that is 1 for all."""
        by = np.where(self.greedy, 1.0, np.maximum(self.temperature, _LEAST_TEMPERATURE))
        return by if (by != 1).any() else None

    @cached_property
    def ways(self) -> tuple[bool, bool]:
        """Whether all rows' likeliest tokens must be sorted, and whether no row is cut in any way."""
        return bool(self.sorts.all()), not (self.sorts.any() or (self.min_p > 0).any())

    @cached_property
    def greediness(self) -> tuple[bool, bool]:
        """Whether any row is greedy, and whether all are."""
        return bool(self.greedy.any()), bool(self.greedy.all())

    @cached_property
    def sorts(self) -> NDArray[np.bool_]:
        """The rows whose likeliest tokens must be sorted."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1))


@dataclass
class Choice:
    """`ids` [R] and their `logprobs` [R] in nats; `top` by the number of the rows that ask for it."""

    ids: Tensor
    logprobs: Tensor
    top: dict[int, Likeliest] = field(default_factory=dict)


def choose(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Token ids [R] and their log-probabilities [R] for `logits` [R, V] and `uniforms` [R] in (0, 1).

    The log-probabilities are those of softmax(logits / temperature) before truncation; at temperature 0
    the likeliest token is taken and the log-probabilities are those of softmax(logits).
    """
    settings = Settings.of([(temperature, top_k, top_p, min_p, 0)] * len(logits))
    found = choose_rows(logits.clone(), uniforms, settings)
    return found.ids, found.logprobs


def choose_rows(logits: Tensor, uniforms: Tensor, settings: Settings) -> Choice:
    """The same with settings of each row; `logits` [R, V] is overwritten."""
    step, found = max(1, _CHUNK_ELEMENTS // logits.shape[1]), []
    if len(logits) <= step:
        return _chunk(logits, uniforms, settings)
    for at in range(0, len(logits), step):
        rows = slice(at, at + step)
        made = _chunk(logits[rows], uniforms[rows], settings.part(rows))
        found.append(Choice(made.ids, made.logprobs, {at + n: top for n, top in made.top.items()}))
    tops = {number: top for part in found for number, top in part.top.items()}
    return Choice(
        torch.cat([part.ids for part in found]), torch.cat([part.logprobs for part in found]), tops
    )


def _chunk(logits: Tensor, uniforms: Tensor, settings: Settings) -> Choice:
    (any_greedy, all_greedy), best = settings.greediness, None
    # Relative to the maximum, so that a tiny temperature cannot overflow.
    if any_greedy:
        most, best = logits.max(-1)
        logits -= most.unsqueeze(1)
    else:
        logits -= logits.amax(-1, keepdim=True)
    if settings.divisors is not None:
        logits /= torch.from_numpy(settings.divisors).to(logits).unsqueeze(1)
    tops = _tops(logits, settings)
    weights = logits.exp_()
    runs = _runs(weights)
    log_total = runs.sum(-1).log()
    if best is None:
        ids = _draw(weights, runs, uniforms, settings)
    elif all_greedy:
        ids = best
    else:
        drawn = _draw(weights, runs, uniforms, settings)
        ids = torch.where(torch.from_numpy(settings.greedy).to(best.device), best, drawn)
    chosen = weights.gather(-1, ids.unsqueeze(-1)).squeeze(-1).double()
    return Choice(ids, (chosen.log() - log_total).to(weights.dtype), _listed(tops, log_total))


def _tops(logits: Tensor, settings: Settings) -> dict[int, tuple[Tensor, Tensor]]:
    """(tokens, logits) of the likeliest of each row that asks, all rows that do in one go."""
    asking, top = settings.asking, settings.top
    if not len(asking):
        return {}
    count = min(int(top.max()), logits.shape[1])
    values, ids = logits[torch.from_numpy(asking).to(logits.device)].topk(count)
    return {
        int(row): (ids[at, : int(top[row])], values[at, : int(top[row])])
        for at, row in enumerate(asking)
    }


def _listed(tops: dict[int, tuple[Tensor, Tensor]], log_total: Tensor) -> dict[int, Likeliest]:
    return {
        row: (ids.tolist(), (values.double() - log_total[row]).tolist())
        for row, (ids, values) in tops.items()
    }


def _draw(weights: Tensor, runs: Tensor, uniforms: Tensor, settings: Settings) -> Tensor:
    all_sorted, uncut = settings.ways
    if uncut:
        return _inverse_cdf(weights, runs, uniforms)
    if all_sorted:
        return _draw_sorted(weights, runs, uniforms, settings)
    sorts, few = settings.sorts, settings.min_p > 0
    ids = torch.empty(len(weights), dtype=torch.long, device=weights.device)
    for numbers, draw in (
        (np.flatnonzero(sorts), _draw_sorted),
        (np.flatnonzero(~sorts & few), _draw_above),
        (np.flatnonzero(~sorts & ~few), _draw_any),
    ):
        if len(numbers):
            rows = torch.from_numpy(numbers).to(weights.device)
            ids[rows] = draw(weights[rows], runs[rows], uniforms[rows], settings.part(numbers))
    return ids


def _draw_any(weights: Tensor, runs: Tensor, uniforms: Tensor, settings: Settings) -> Tensor:
    return _inverse_cdf(weights, runs, uniforms)


def _draw_above(weights: Tensor, runs: Tensor, uniforms: Tensor, settings: Settings) -> Tensor:
    """From the tokens that min_p leaves; nothing is sorted."""
    least = torch.from_numpy(settings.min_p).to(weights).unsqueeze(1)
    kept = torch.where(weights < least, 0.0, weights)
    return _inverse_cdf(kept, _runs(kept), uniforms)


def _draw_sorted(weights: Tensor, runs: Tensor, uniforms: Tensor, settings: Settings) -> Tensor:
    """From the likeliest tokens, as many as the settings leave."""
    cuts = _cuts(settings, weights.shape[1], weights.device)
    values, order, needed = _nucleus(weights, runs.sum(-1, keepdim=True), cuts)
    dropped = values.cumsum(-1) - values >= needed
    if cuts.least is not None:
        dropped |= values < cuts.least
    kept = values.masked_fill(dropped, 0.0)
    places = _place(kept.cumsum(-1), uniforms.unsqueeze(-1))
    return order.gather(-1, places).squeeze(-1)


@dataclass
class _Cuts:
    """What rows are cut to: [R, 1] in float64 the most tokens (`limit`), the `share` of the whole, and the
    `least` weight; None where that cuts no row. `counts` are the numbers of candidates to sort, one after
    the other until they suffice."""

    counts: list[int]
    limit: Tensor | None
    share: Tensor
    least: Tensor | None
    # The rows whose share is below 1; None where all are.
    shared: Tensor | None
    # Which of `counts` sufficed for the last token: most likely it does for the next.
    guess: int = 0

    def needed(self, values: Tensor, whole: Tensor) -> Tensor:
        """The sum [R, 1] that the likeliest of `values` must cover, of `whole` [R, 1]."""
        if self.limit is None:
            return self.share * whole
        # What a limit leaves is the whole: there is always enough of it.
        bounded = self.limit < self.counts[-1]
        return self.share * torch.where(bounded, values.sum(-1, keepdim=True), whole)

    def suffice(self, values: Tensor, whole: Tensor) -> bool:
        """Whether the likeliest tokens' `values` cover what is needed."""
        return bool((values.sum(-1, keepdim=True) >= self.needed(values, whole)).all())


@lru_cache(maxsize=64)
def _cuts(settings: Settings, vocabulary: int, device: torch.device) -> _Cuts:
    """Made once for the rows that go on together, token after token."""

    def column(numbers: NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).to(device).unsqueeze(1)

    limits = np.where(settings.top_k > 0, settings.top_k, np.inf).clip(max=vocabulary)
    bounded, shares = limits < vocabulary, settings.top_p.clip(max=1.0)
    counts = [int(max(limits[bounded], default=0))]
    if not bounded.all():
        counts[0] = max(counts[0], min(_FIRST_CANDIDATES, vocabulary))
    while counts[-1] < vocabulary:
        counts.append(min(8 * counts[-1], vocabulary))
    return _Cuts(
        counts,
        column(limits) if bounded.any() else None,
        column(shares),
        column(settings.min_p) if (settings.min_p > 0).any() else None,
        None if (shares < 1).all() else column(shares < 1),
    )


def _nucleus(weights: Tensor, whole: Tensor, cuts: _Cuts) -> tuple[Tensor, Tensor, Tensor]:
    """Descending weights in float64, 0 beyond each row's limit, their tokens, and the sum [R, 1] that must
    be covered, of `whole` [R, 1]: as few candidates as suffice, whatever was guessed, since among more of
    them equal weights may lie in another order."""
    counts, number = cuts.counts, cuts.guess
    values, order = _likeliest(weights, counts[number], cuts)
    for fewer in range(number):
        if cuts.suffice(values[:, : counts[fewer]].contiguous(), whole):
            number = fewer
            values, order = _likeliest(weights, counts[number], cuts)
            break
    while number + 1 < len(counts) and not cuts.suffice(values, whole):
        number += 1
        values, order = _likeliest(weights, counts[number], cuts)
    cuts.guess = number
    needed = cuts.needed(values, whole)
    # A share of 1 must keep what rounding would drop.
    return values, order, needed if cuts.shared is None else needed.where(cuts.shared, torch.inf)


def _likeliest(weights: Tensor, count: int, cuts: _Cuts) -> tuple[Tensor, Tensor]:
    """The greatest `count` weights of each row in float64, 0 beyond its limit, and their tokens."""
    values, order = weights.topk(count)
    if cuts.limit is None:
        return values.double(), order
    places = torch.arange(count, device=weights.device)
    return values.double().masked_fill(places >= cuts.limit, 0.0), order


def _runs(weights: Tensor) -> Tensor:
    """The sum of each run of `weights` [R, V] in float64 [R, runs]; the last run may be shorter."""
    whole = weights.shape[1] // _RUN * _RUN
    sums = weights[:, :whole].view(len(weights), -1, _RUN).sum(-1)
    if whole < weights.shape[1]:
        sums = torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), 1)
    return sums.double()


def _inverse_cdf(weights: Tensor, runs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token [R] where the running sum of `weights` [R, V] exceeds uniforms * total."""
    running = runs.cumsum(-1)
    shares, total = uniforms.unsqueeze(-1), running[:, -1:]
    run = _place(running, shares)
    mass = runs.gather(-1, run)
    within = (shares * total - (running.gather(-1, run) - mass)) / mass
    tokens = run * _RUN + torch.arange(_RUN, device=weights.device)
    last = weights.shape[1] - 1
    inner = weights.gather(-1, tokens.clamp(max=last)).double().masked_fill_(tokens > last, 0.0)
    # The bound is for logits that are no numbers, which a search cannot place.
    found = run * _RUN + _place(inner.cumsum(-1), within.clamp(min=0.0))
    return found.clamp_(max=last).squeeze(-1)


def _place(running: Tensor, shares: Tensor) -> Tensor:
    """The first place [R, 1] where `running` [R, K] exceeds its part `shares` [R, 1] of the total."""
    # Strictly below the total, so that a place of weight 0 is never found.
    wanted = shares.clamp(max=_BELOW_ONE) * running[:, -1:]
    return torch.searchsorted(running, wanted, right=True).clamp_(max=running.shape[1] - 1)
