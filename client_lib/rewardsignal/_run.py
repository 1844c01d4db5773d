"""A run, as its owner drives it: the primitives, and what else can be asked of a run.

Each primitive has two forms. `run.optim_step()` waits for the result; `run.optim_step_async()` returns a
future as soon as the operation has its place in the queue, so a loop can submit the next one while the
worker computes. Operations of one run take effect in the order in which they were submitted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from rewardsignal import _operations as bodies
from rewardsignal._custom import CustomLoss, differentiated
from rewardsignal._exceptions import ConflictError, NotFoundError, SignalAPIError
from rewardsignal._files import download_artifact
from rewardsignal._futures import APIFuture
from rewardsignal._inference import InferenceClient, saved_at
from rewardsignal._operations import Batch, Prompts, given
from rewardsignal._pipeline import Pipeline
from rewardsignal._poller import Poller
from rewardsignal._records import Record
from rewardsignal._schemas import (
    Artifact,
    ArtifactList,
    Certificate,
    ChatTemplateResult,
    DetokenizeResult,
    ForwardBackwardResult,
    ForwardResult,
    LoadStateResult,
    MetricRow,
    ModelInfo,
    OperationList,
    OptimStepOptions,
    OptimStepResult,
    Run,
    RunClosed,
    RunEvent,
    RunEventList,
    RunMetrics,
    SampleOptions,
    SampleResult,
    SaveStateResult,
    SessionState,
    TokenizeResult,
    TokenizerFiles,
    TokenizerInfo,
)
from rewardsignal._split import parts_of
from rewardsignal._stream import SampleStream
from rewardsignal._submit import Submitter
from rewardsignal._tokenizer import Tokenizer
from rewardsignal._training import TrainingClient
from rewardsignal._transport import encode, segment

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
# In seconds: how long a request of `watch` is held, how long a pause after an exception is tried, and how
# much longer than another request a deletion may take.
WATCH_S = 20.0
PAUSE_S = 5.0
DELETE_S = 30.0


class SignalRun:
    """One training run. Made by `client.create_run()` and `client.run()`.

    As a context manager it completes the run when the block ends well; an exception pauses it with a
    snapshot and frees its device, so that `client.run(run_id).resume()` can go on with it.
    """

    def __init__(self, poller: Poller, info: Run) -> None:
        """`info` is the run as the server last showed it."""
        self.run_id = info.run_id
        self.info = info
        self._path = f"/runs/{segment(info.run_id)}"
        self._poller = poller
        self._transport = poller.transport
        self._submitter = Submitter(poller, info.run_id)
        self._tokenizer: Tokenizer | None = None

    # The primitives.

    def forward_backward(
        self,
        batch: Batch,
        loss_fn: str = "causal_lm",
        *,
        accumulate: bool = True,
        logprobs: bool = False,
        **loss_kwargs: Any,
    ) -> ForwardBackwardResult:
        """Compute a loss and add its gradient to the accumulation.

        `batch` holds examples: `{"text": …}`, `{"messages": […]}`, `{"tokens": […], …}`,
        `{"prompt": …, "chosen": …, "rejected": …}`, `{"prompt": …, "responses": […]}` or
        `{"prompt": …, "response": …, …}`. The server's docs/losses.md says what each loss takes. More than
        the server takes at once are sent in parts and answer as one (`grad_norm` is nan then if something
        was accumulated before). With `logprobs` the result's `rows` have the log-probability of every
        target, before the step.
        """
        body = bodies.forward_backward(batch, loss_fn, accumulate, loss_kwargs, logprobs)
        return self._call(ForwardBackwardResult, "forward_backward", body)

    def forward_backward_async(
        self,
        batch: Batch,
        loss_fn: str = "causal_lm",
        *,
        accumulate: bool = True,
        logprobs: bool = False,
        **loss_kwargs: Any,
    ) -> APIFuture[ForwardBackwardResult]:
        """Submit a `forward_backward`."""
        body = bodies.forward_backward(batch, loss_fn, accumulate, loss_kwargs, logprobs)
        return self._submitter.submit_one("forward_backward", body)

    def forward_backward_custom(
        self, batch: Batch, loss: CustomLoss, *, accumulate: bool = True
    ) -> ForwardBackwardResult:
        """Train on a loss of one's own, in two passes.

        `loss` gets the rows with their log-probabilities and returns its value, and for each row its
        gradient by them (anything where they are None). The result's `loss` is that value.
        """
        value, rows = differentiated(loss, self.forward(batch).rows)
        result = self.forward_backward(rows, "custom", accumulate=accumulate)
        metrics = {**result.metrics, "surrogate_loss": result.loss_sum}
        return dataclasses.replace(result, loss=value, metrics=metrics)

    def forward(
        self, batch: Batch, *, top_k: int = 0, prompt_logprobs: bool = False
    ) -> ForwardResult:
        """Log-probabilities of a batch under the weights as they are after everything submitted before."""
        body = bodies.forward(batch, top_k, prompt_logprobs)
        return self._call(ForwardResult, "forward", body)

    def forward_async(
        self, batch: Batch, *, top_k: int = 0, prompt_logprobs: bool = False
    ) -> APIFuture[ForwardResult]:
        """Submit a `forward`."""
        body = bodies.forward(batch, top_k, prompt_logprobs)
        return self._submitter.submit_one("forward", body)

    def optim_step(
        self, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> OptimStepResult:
        """Take an optimizer step. What is given holds for this step alone; the rest is the run's."""
        return self._call(OptimStepResult, "optim_step", bodies.optim_step(learning_rate, options))

    def optim_step_async(
        self, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> APIFuture[OptimStepResult]:
        """Submit an `optim_step`."""
        return self._submitter.submit_one("optim_step", bodies.optim_step(learning_rate, options))

    def sample(self, prompts: Prompts, **options: Unpack[SampleOptions]) -> SampleResult:
        """Sample from the weights as they are after everything submitted before."""
        return self._call(SampleResult, "sample", bodies.sample(prompts, options))

    def sample_async(
        self, prompts: Prompts, **options: Unpack[SampleOptions]
    ) -> APIFuture[SampleResult]:
        """Submit a `sample`."""
        return self._submitter.submit_one("sample", bodies.sample(prompts, options))

    def _submit_sample(
        self, prompts: Prompts, options: SampleOptions, first_row: int
    ) -> APIFuture[SampleResult]:
        """A part of a larger sample: `first_row` samples come before its own."""
        body = {**bodies.sample(prompts, options), "first_row": first_row}
        return self._submitter.submit_one("sample", body)

    def stream_sample(self, prompts: Prompts, **options: Unpack[SampleOptions]) -> SampleStream:
        """Sample, and get each token as it comes: `for token in run.stream_sample("Once"): …`."""
        body = encode(bodies.sample(prompts, options))
        return SampleStream(self._poller, self.run_id, f"{self._path}/sample/stream", body)

    def save_state(self, name: str | None = None, mode: str = "adapter") -> SaveStateResult:
        """Save the adapter as a plain PEFT folder; `download` fetches it.

        The mode "state" saves the optimizer with it, for `load_state`.
        """
        return self._call(SaveStateResult, "save_state", bodies.save_state(name, mode))

    def save_state_async(
        self, name: str | None = None, mode: str = "adapter"
    ) -> APIFuture[SaveStateResult]:
        """Submit a `save_state`."""
        return self._submitter.submit_one("save_state", bodies.save_state(name, mode))

    def load_state(
        self, artifact: str, *, run_id: str | None = None, optimizer: bool = True
    ) -> LoadStateResult:
        """Go on from a saved state: of this run, or of another of one's own (`run_id`).

        With `optimizer` the moments are loaded too, which the mode "state" of save_state keeps.
        """
        body = bodies.load_state(artifact, run_id, optimizer)
        return self._call(LoadStateResult, "load_state", body)

    def load_state_async(
        self, artifact: str, *, run_id: str | None = None, optimizer: bool = True
    ) -> APIFuture[LoadStateResult]:
        """Submit a `load_state`."""
        body = bodies.load_state(artifact, run_id, optimizer)
        return self._submitter.submit_one("load_state", body)

    def submit(self, operations: Iterable[Mapping[str, Any]]) -> list[APIFuture[Any]]:
        """Submit several operations by one request: objects of `kind` and the fields of that call."""
        return self._submitter.submit_many(operations)

    def pipeline(self, max_operations: int = 64) -> Pipeline:
        """Collects operations and submits them together: `with run.pipeline() as pipe: …`."""
        return Pipeline(self._submitter, max_operations)

    # Text and tokens: answered at once, never queued behind training.

    def tokenize(
        self, text: str | Sequence[str], add_special_tokens: bool = True
    ) -> TokenizeResult:
        """Ids and token strings of each text."""
        texts = text if isinstance(text, str) else list(text)
        body = {"text": texts, "add_special_tokens": add_special_tokens}
        return self._post(TokenizeResult, "tokenize", body)

    def detokenize(
        self, token_ids: Sequence[int] | Sequence[Sequence[int]], skip_special_tokens: bool = True
    ) -> DetokenizeResult:
        """The text of one list of ids, or the texts of several."""
        body = {"token_ids": list(token_ids), "skip_special_tokens": skip_special_tokens}
        return self._post(DetokenizeResult, "detokenize", body)

    def apply_chat_template(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> ChatTemplateResult:
        """A conversation as the model reads it, with its ids."""
        body = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return self._post(ChatTemplateResult, "apply_chat_template", body)

    def tokenizer_info(self) -> TokenizerInfo:
        """Vocabulary size, special tokens, chat template."""
        return self._get(TokenizerInfo, "tokenizer_info")

    def model_info(self) -> ModelInfo:
        """The base model's shape and the adapter's number of parameters."""
        return self._get(ModelInfo, "model_info")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer on this machine, from the files that the server serves; fetched once.

        Needs the extra `tokenizer`, and neither torch nor transformers.
        """
        if self._tokenizer is None:
            path = f"/models/{segment(self.info.base_model, safe='/')}/tokenizer"
            files = TokenizerFiles.from_dict(self._transport.get(path).body)
            self._tokenizer = Tokenizer(files)
        return self._tokenizer

    # The run itself.

    def status(self) -> Run:
        """The run as it is now; `info` keeps it."""
        self.info = self._get(Run, "status")
        return self.info

    def training(self, timeout: float | None = 3600.0) -> TrainingClient:
        """A training loop over this run: batches, epochs, checkpoints, a history."""
        return TrainingClient(self, timeout)

    def inference(
        self,
        weights: Any = "live",
        *,
        step: int | None = None,
        timeout: float | None = 300.0,
        batch_size: int = 32,
    ) -> InferenceClient:
        """Texts from this run: of `weights` as `sample` takes them, or of what was saved at `step`."""
        pinned = weights if step is None else saved_at(self, step)
        return InferenceClient(self, pinned, timeout, batch_size)

    def session_state(self) -> SessionState:
        """What the run's worker holds."""
        return self._get(SessionState, "session_state")

    def get_status(self) -> Run:
        """The same as `status`."""
        return self.status()

    def get_metrics(self) -> RunMetrics:
        """The same as `metrics`."""
        return self.metrics()

    def metrics(self) -> RunMetrics:
        """The whole series: the server's numbers and the user's own beside them."""
        page = self._get(RunMetrics, "metrics", {"limit": 10_000})
        rows = list(page.metrics)
        while page.has_more:
            query = {"limit": 10_000, "cursor": page.next_cursor}
            page = self._get(RunMetrics, "metrics", query)
            rows += page.metrics
        return dataclasses.replace(page, metrics=rows)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> MetricRow:
        """Record numbers of one's own, by default at the run's current step."""
        return self._post(MetricRow, "metrics", given({"metrics": dict(metrics), "step": step}))

    def operations(self, after_seq: int = 0, wait: float = 0.0, limit: int = 100) -> OperationList:
        """What has finished after a seq, in order; with `wait`, held until there is something."""
        query = {"after_seq": after_seq, "limit": limit, "wait": wait or None}
        return self._get(OperationList, "operations", query, held=wait)

    def artifacts(self) -> list[Artifact]:
        """What save_state and complete wrote, oldest first."""
        return self._get(ArtifactList, "artifacts").data

    def download(self, name: str, folder: str | Path) -> Path:
        """Download an artifact's files into `folder` and check them; returns the folder."""
        found = next((one for one in self.artifacts() if one.name == name), None)
        if found is None:
            raise NotFoundError(f"The run {self.run_id} has no artifact {name!r}.")
        return download_artifact(self._transport, found, Path(folder))

    def events(self, after: int = 0, wait: float = 0.0, limit: int = 100) -> RunEventList:
        """What happened to the run after an event; with `wait`, held until something does."""
        query = {"after": after, "limit": limit, "wait": wait or None}
        return self._get(RunEventList, "events", query, held=wait)

    def watch(self, after: int = 0) -> Iterator[RunEvent]:
        """The run's events as they happen, until it has ended."""
        while True:
            page = self.events(after, wait=WATCH_S)
            yield from page.data
            if page.ended:
                return
            after = page.next_after

    # Standing still, going back, going elsewhere.

    def pause(self) -> Run:
        """Write a snapshot and free the device; what is queued stays. New operations are refused."""
        return self._shown("pause", {})

    def resume(self, accept: str | None = None) -> Run:
        """Go on. `accept` takes note of what `info.hold` says: "rebuilt" or "rolled_back"."""
        return self._shown("resume", given({"accept": accept}))

    def branch(
        self,
        at_seq: int | None = None,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> SignalRun:
        """A new run that begins with this one's exact state after `at_seq`, by default its newest.

        `overrides` are `learning_rate`, `weight_decay`, `lr_scheduler`, `warmup_steps` and `total_steps`;
        all else stays as it is here.
        """
        own = {"at_seq": at_seq, "name": name, "labels": dict(labels) if labels else None}
        return SignalRun(self._poller, self._post(Run, "branch", given({**own, **overrides})))

    def certificate(self) -> Certificate:
        """The state after everything submitted before, in hashes: equal ones mean equal bits."""
        answer = self._transport.get(f"{self._path}/certificate")
        if answer.status != 202:
            return Certificate.from_dict(answer.body)
        found: Certificate = self._submitter.accepted("certificate", answer).result()
        return found

    def replay(self) -> APIFuture[Certificate]:
        """Have the run done again from its oldest kept state; the future is of that one's certificate."""
        answer = self._transport.post(f"{self._path}/replay", encode({}))
        future: APIFuture[Certificate] = APIFuture(
            self._poller, answer.body["run_id"], answer.body["kind"]
        )
        future.bind(answer.body, answer.request_id)
        return future

    def migrate(self) -> Run:
        """Move to another device. Raises ConflictError (no_other_device) when none is free."""
        return self._shown("migrate", {})

    def delete(self) -> None:
        """Erase the run and everything of it; an open one is cancelled first.

        That it is gone already is no error.
        """
        try:
            self._transport.delete(self._path, held=DELETE_S)
        except NotFoundError as gone:
            log.debug("%s was deleted before: %s", self.run_id, gone)

    def complete(self, save: bool = True, name: str | None = None) -> RunClosed:
        """End the run well, after everything submitted; a last adapter is saved unless told not to."""
        body = {"save": save, **given({"name": name})}
        answer = self._transport.post(f"{self._path}/complete", encode(body))
        if answer.status != 202:
            return RunClosed.from_dict(answer.body)
        done = self._submitter.accepted("complete", answer).result()
        return RunClosed(
            success=True,
            run_id=self.run_id,
            status="completed",
            current_step=done.step,
            artifact=done.artifact,
        )

    def cancel(self) -> RunClosed:
        """End the run now: what is queued is cancelled and nothing is saved."""
        return self._post(RunClosed, "cancel", {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._pause_quietly()
            return
        try:
            self.complete()
        except ConflictError as conflict:
            # The block may have cancelled the run itself; one that failed must not end quietly.
            if conflict.code != "run_closed" or self.status().status == "failed":
                raise

    def __repr__(self) -> str:
        return f"<SignalRun {self.run_id} {self.info.base_model} {self.info.status}>"

    def _pause_quietly(self) -> None:
        """The exception that ended the block is what its caller must see."""
        try:
            self._transport.post(f"{self._path}/pause", encode({}), patience=PAUSE_S)
        except SignalAPIError as error:
            log.warning("%s was not paused after an exception: %s", self.run_id, error)

    def _shown(self, path: str, body: Mapping[str, Any]) -> Run:
        self.info = self._post(Run, path, body)
        return self.info

    def _call(self, record: type[R], kind: str, body: Mapping[str, Any]) -> R:
        """The blocking form; past the server's bound it goes on as a future."""
        parts = parts_of(kind, body)
        if len(parts) > 1:
            whole: R = self._submitter.submit_one(kind, body).result()
            return whole
        answer = self._transport.post(f"{self._path}/{kind}", parts[0][1])
        if answer.status != 202:
            return record.from_dict(answer.body)
        result: R = self._submitter.accepted(kind, answer).result()
        return result

    def _get(
        self, record: type[R], path: str, query: Mapping[str, Any] | None = None, held: float = 0.0
    ) -> R:
        answer = self._transport.get(f"{self._path}/{path}", query, held=held)
        return record.from_dict(answer.body)

    def _post(self, record: type[R], path: str, body: Mapping[str, Any]) -> R:
        return record.from_dict(self._transport.post(f"{self._path}/{path}", encode(body)).body)
