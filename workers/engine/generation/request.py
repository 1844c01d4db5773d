"""What is asked of a generator and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.choose import Likeliest
from workers.engine.parameters import Weights
from workers.engine.random import SampleKey
from workers.engine.stopping import Sample, StopRule, TextDecoder

# (row, token id, log-probability, the text that the token adds for sure or None); row is prompt * n + copy.
OnToken = Callable[[int, int, float, str | None], None]


@dataclass(frozen=True, eq=False)
class Request:
    """`n` continuations of each of `prompts` (token ids).

    temperature 0 is greedy; top_k 0 or less, top_p 1 and min_p 0 drop nothing. For each sampled place the
    `top_logprobs` likeliest tokens are given. With `prompt_logprobs` the prompts are scored, with the
    `prompt_top_logprobs` likeliest tokens of each of their places; `max_tokens` 0 then samples nothing.
    `weights` None is the bare base; give `Parameters.frozen()` where training goes on meanwhile: what was
    computed for earlier tokens is kept, and may be shared with requests of the same weights.
    `first_row`: the number of the first row in the draws, of a part of a larger request.
    `deterministic`: bit for bit what the request gets alone. An error that `on_token` raises ends the
    request.
    """

    prompts: Sequence[Sequence[int]]
    tokenizer: TextDecoder
    key: SampleKey
    max_tokens: int
    n: int = 1
    first_row: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    weights: Weights | None = None
    deterministic: bool = False
    on_token: OnToken | None = None

    @property
    def rule(self) -> StopRule:
        """What ends a row early."""
        return StopRule(frozenset(self.stop_token_ids), self.stop_strings)

    def limit(self, prompt: Sequence[int], context: int) -> int:
        """The most tokens that a continuation of `prompt` may get."""
        return min(self.max_tokens, context - len(prompt))


@dataclass(frozen=True)
class PromptScores:
    """Per token of a prompt its log-probability in nats at temperature 1, None for the first; `top` the
    likeliest tokens of each place, where asked for."""

    logprobs: list[float | None]
    top: list[Likeliest | None] | None = None


@dataclass(frozen=True)
class SampleOutput:
    """`samples[prompt][copy]`; `cancelled`: it was ended early, with rows unfinished. `prompt_scores` by
    prompt, where asked for."""

    samples: list[list[Sample]]
    num_tokens: int
    cancelled: bool
    prompt_scores: list[PromptScores] | None = field(default=None)


def check(request: Request, base: Base) -> None:
    """Raises SignalError validation_error, sequence_too_long, token_out_of_range or not_supported, which
    names the field."""
    for field_name, fits, rule in _rules(request):
        if not fits:
            raise SignalError("validation_error", f"{field_name} {rule}.", param=field_name)
    if request.weights is None and not base.bare:
        message = "A run that trains all parameters keeps no bare base to sample from."
        raise SignalError("not_supported", message, param="weights")
    if not request.prompts:
        raise SignalError("validation_error", "There is no prompt.", param="prompts")
    for number, prompt in enumerate(request.prompts):
        _check_prompt(prompt, base, f"prompts.{number}", room=1 if request.max_tokens else 0)


def _rules(request: Request) -> list[tuple[str, bool, str]]:
    tops = (request.top_logprobs, request.prompt_top_logprobs)
    return [
        ("n", request.n >= 1, "is 1 or more"),
        ("temperature", 0 <= request.temperature < float("inf"), "is a number from 0 on"),
        ("top_p", 0 < request.top_p <= 1, "is above 0 and at most 1"),
        ("min_p", 0 <= request.min_p <= 1, "is 0 to 1"),
        ("top_logprobs", tops[0] >= 0, "is 0 or more"),
        ("prompt_top_logprobs", tops[1] >= 0, "is 0 or more"),
        (
            "prompt_top_logprobs",
            not tops[1] or request.prompt_logprobs,
            "needs prompt_logprobs",
        ),
        (
            "max_tokens",
            request.max_tokens > 0 or (request.max_tokens == 0 and request.prompt_logprobs),
            "is 1 or more, or 0 with prompt_logprobs",
        ),
    ]


def _check_prompt(prompt: Sequence[int], base: Base, param: str, room: int) -> None:
    if not prompt:
        raise SignalError("validation_error", "The prompt has no tokens.", param=param)
    if len(prompt) + room > base.context_length:
        raise SignalError(
            "sequence_too_long",
            f"The prompt has {len(prompt)} tokens; the model's context is {base.context_length}.",
            param=param,
        )
    if min(prompt) < 0 or max(prompt) >= base.vocab_size:
        raise SignalError(
            "token_out_of_range", f"Token ids are 0 to {base.vocab_size - 1}.", param=param
        )
