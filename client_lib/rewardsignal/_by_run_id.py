"""The calls of a run by its id, on the client: for programs that keep ids and no run objects."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from rewardsignal._inference import InferenceClient
from rewardsignal._operations import Batch, Prompts
from rewardsignal._schemas import (
    ChatTemplateResult,
    DetokenizeResult,
    ForwardBackwardResult,
    ModelInfo,
    OptimStepOptions,
    OptimStepResult,
    Run,
    RunMetrics,
    SampleOptions,
    SaveStateResult,
    TokenizeResult,
    TokenizerInfo,
)
from rewardsignal._training import TrainingClient

if TYPE_CHECKING:
    from rewardsignal._run import SignalRun


class ByRunId(ABC):
    """Each call is that of `client.run(run_id)`, which is found once per id."""

    def __init__(self) -> None:
        """Knows no run."""
        self._runs: dict[str, SignalRun] = {}
        self._runs_lock = threading.Lock()

    @abstractmethod
    def run(self, run_id: str) -> SignalRun:
        """An existing run, to go on with."""

    def forward_backward(
        self,
        run_id: str,
        batch: Batch,
        accumulate: bool = True,
        loss_fn: str = "causal_lm",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> ForwardBackwardResult:
        """Compute a loss and add its gradient to the accumulation."""
        run = self._known(run_id)
        return run.forward_backward(batch, loss_fn, accumulate=accumulate, **(loss_kwargs or {}))

    def optim_step(
        self, run_id: str, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> OptimStepResult:
        """Take an optimizer step."""
        return self._known(run_id).optim_step(learning_rate, **options)

    def sample(self, run_id: str, prompts: Prompts, **options: Unpack[SampleOptions]) -> list[str]:
        """The texts of samples; `client.run(run_id).sample` gives all that is known of them."""
        return self.inference(run_id).sample(prompts, **options)

    def save_state(
        self, run_id: str, mode: str = "adapter", name: str | None = None
    ) -> SaveStateResult:
        """Save the adapter; the mode "state" keeps the optimizer with it."""
        return self._known(run_id).save_state(name, mode)

    def get_run_status(self, run_id: str) -> Run:
        """The run as it is now."""
        return self._known(run_id).status()

    def get_run_metrics(self, run_id: str) -> RunMetrics:
        """The run's whole series."""
        return self._known(run_id).metrics()

    def tokenize(
        self, run_id: str, text: str | Sequence[str], add_special_tokens: bool = True
    ) -> TokenizeResult:
        """Ids and token strings of each text."""
        return self._known(run_id).tokenize(text, add_special_tokens)

    def detokenize(
        self, run_id: str, token_ids: Sequence[int] | Sequence[Sequence[int]]
    ) -> DetokenizeResult:
        """The text of one list of ids, or the texts of several."""
        return self._known(run_id).detokenize(token_ids)

    def get_tokenizer_info(self, run_id: str) -> TokenizerInfo:
        """Vocabulary size, special tokens, chat template."""
        return self._known(run_id).tokenizer_info()

    def get_model_info(self, run_id: str) -> ModelInfo:
        """The base model's shape and the adapter's number of parameters."""
        return self._known(run_id).model_info()

    def apply_chat_template(
        self,
        run_id: str,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
    ) -> ChatTemplateResult:
        """A conversation as the model reads it, with its ids."""
        return self._known(run_id).apply_chat_template(messages, add_generation_prompt)

    def training(
        self, run_id: str, timeout: float | None = 3600.0, max_retries: int | None = None
    ) -> TrainingClient:
        """A training loop over a run.

        `max_retries` is of the first Signal's SDK and has no effect, which a DeprecationWarning says: a
        call is repeated under its idempotency key for as long as the client's `retry_for` allows.
        """
        if max_retries is not None:
            message = "max_retries has no effect: retry_for of the client bounds repeats."
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self._known(run_id).training(timeout)

    def inference(
        self,
        run_id: str,
        step: int | None = None,
        timeout: float | None = 300.0,
        batch_size: int = 32,
    ) -> InferenceClient:
        """Texts from a run: of its live weights, or of what was saved at `step`."""
        return self._known(run_id).inference(step=step, timeout=timeout, batch_size=batch_size)

    def _known(self, run_id: str) -> SignalRun:
        with self._runs_lock:
            found = self._runs.get(run_id)
        if found is None:
            found = self.run(run_id)
            with self._runs_lock:
                found = self._runs.setdefault(run_id, found)
        return found
