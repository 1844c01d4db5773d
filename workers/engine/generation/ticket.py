"""A request under way: its rows, where it stands, and how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cached_property

from schemas.errors import SignalError
from workers.engine.generation.request import PromptScores, Request, SampleOutput
from workers.engine.generation.streaming import TextStream
from workers.engine.parameters import Weights
from workers.engine.spans import Terms
from workers.engine.stopping import Continuation, Sample


class Ticket:
    """`position` is 0 while rows of it are sampled and once it has ended, else its place among those that
    wait, from 1 on. When it has ended, `output` or `error` says how.
    """

    def __init__(self, number: int, request: Request, context: int) -> None:
        """`number` is its arrival, `context` the model's."""
        self.number, self.request, self.position = number, request, 0
        self.output: SampleOutput | None = None
        self.error: SignalError | None = None
        self.scores: list[PromptScores] | None = None
        self.rows = [
            Row(self, index * request.n + copy, prompt, request.limit(prompt, context))
            for index, prompt in enumerate(request.prompts)
            for copy in range(request.n)
        ]
        self.waiting = deque(row for row in self.rows if row.limit > 0)

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.output is not None or self.error is not None

    @property
    def unscored(self) -> bool:
        """Whether its prompts are still to be scored."""
        return self.request.prompt_logprobs and self.scores is None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be computed."""
        return not self.unscored and all(row.finished for row in self.rows)

    def finish(self, *, cancelled: bool = False) -> None:
        """End with what there is."""
        n, samples = self.request.n, [row.sample for row in self.rows]
        grouped = [samples[at : at + n] for at in range(0, len(samples), n)]
        total = sum(len(sample.token_ids) for sample in samples)
        self.output = SampleOutput(grouped, total, cancelled, self.scores)
        self.waiting.clear()

    def fail(self, error: SignalError) -> None:
        """End with an error; the first one counts."""
        if not self.done:
            self.error = error
        self.waiting.clear()


class Row:
    """One continuation: `number` in its request, its `prompt`, the most tokens that it may get."""

    def __init__(self, ticket: Ticket, number: int, prompt: Sequence[int], limit: int) -> None:
        """A row that may get no token has ended."""
        request = ticket.request
        self.ticket, self.number, self.prompt, self.limit = ticket, number, prompt, limit
        # Random numbers of the tokens from this one on (`draws`).
        self.draws_from, self.draws = 0, list[float]()
        # By arrival.
        self.order = (ticket.number, number)
        self._continuation = Continuation(request.rule, request.tokenizer, limit)
        self._stream = None if request.on_token is None else TextStream(request)
        if limit <= 0:
            self.sample.finish_reason = "length"
        self.settings = (
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.top_logprobs,
        )

    @cached_property
    def weights(self) -> Weights | None:
        """What it is sampled with."""
        return self.ticket.request.weights

    @cached_property
    def terms(self) -> Terms:
        """What that adds to the layers of the base."""
        return None if self.weights is None else self.weights.terms

    @property
    def sample(self) -> Sample:
        """What it has got so far."""
        return self._continuation.sample

    @property
    def finished(self) -> bool:
        """Whether it has ended by itself."""
        return self._continuation.finished

    @property
    def alive(self) -> bool:
        """Whether it goes on."""
        return not self.finished and not self.ticket.done

    @property
    def tokens(self) -> list[int]:
        """Prompt and continuation."""
        return [*self.prompt, *self.sample.token_ids]

    @property
    def need(self) -> int:
        """Positions that it may come to hold."""
        return len(self.prompt) + self.limit

    def add(self, token: int, logprob: float, top: tuple[list[int], list[float]] | None) -> None:
        """Append a token, and tell who listens."""
        self._continuation.add(token, logprob)
        if top is not None:
            self.sample.top.append(top)
        on_token = self.ticket.request.on_token
        if on_token is not None and self._stream is not None:
            on_token(self.number, token, logprob, self._stream.delta(self.sample))
