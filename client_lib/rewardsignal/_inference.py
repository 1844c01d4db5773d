"""Text from one run: prompts in, texts out, with a cache for what cannot come out differently."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack, cast

from rewardsignal._exceptions import NotFoundError
from rewardsignal._futures import APIFuture
from rewardsignal._group import wait_all
from rewardsignal._operations import Prompts
from rewardsignal._schemas import SampleOptions, SampleResult

if TYPE_CHECKING:
    from rewardsignal._run import SignalRun

MAX_CACHED = 10_000


class InferenceClient:
    """Samples of one run; made by `run.inference()` or `client.inference(run_id)`.

    `weights` as of `run.sample`, by default the live ones. The cache, when it is on, keeps the texts of
    requests that are the same every time: of pinned weights (a saved state or "base"), and greedy or with
    a seed.
    """

    def __init__(
        self,
        run: SignalRun,
        weights: Any = "live",
        timeout: float | None = 300.0,
        batch_size: int = 32,
    ) -> None:
        """Sends nothing. `batch_size` prompts go into one request of `batch_sample`."""
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, not {batch_size}.")
        self.run, self.weights, self.timeout, self.batch_size = run, weights, timeout, batch_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, str] | None = None
        self._hits = self._misses = 0

    def sample(self, prompts: Prompts, **options: Unpack[SampleOptions]) -> list[str]:
        """A text for each prompt (with `n`, n for each, one prompt after the other)."""
        return self._texts(prompts, options, None)

    def batch_sample(
        self, prompts: Prompts, batch_size: int | None = None, **options: Unpack[SampleOptions]
    ) -> list[str]:
        """As `sample`, in requests of `batch_size` prompts (by default the client's), all at once.

        With a seed the texts are those of one request.
        """
        return self._texts(prompts, options, batch_size or self.batch_size)

    def _texts(self, prompts: Prompts, options: SampleOptions, batch_size: int | None) -> list[str]:
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        given = self._with_weights(options)
        copies = given.get("n") or 1
        found = self._cached(listed, given) if copies == 1 else {}
        missing = [index for index in range(len(listed)) if index not in found]
        texts = self._sampled(listed, missing, given, batch_size)
        for index, new in texts.items():
            self._keep(listed[index], given, index, new)
        whole = {**{index: [text] for index, text in found.items()}, **texts}
        return [text for index in range(len(listed)) for text in whole[index]]

    def stream_sample(self, prompt: Any, **options: Unpack[SampleOptions]) -> Iterator[str]:
        """The text of one sample, piece by piece. Leaving it before its end cancels the sample.

        After the loss of a worker the text begins again; `run.stream_sample` says so, this does not repeat
        what it has given.
        """
        given, said, text = self._with_weights(options), 0, ""
        with self.run.stream_sample([prompt], **given) as stream:
            for token in stream:
                text = "" if token.restart else text + token.text
                if len(text) > said:
                    yield text[said:]
                    said = len(text)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.run.tokenize(text).token_ids[0]

    def detokenize(self, token_ids: Iterable[int]) -> str:
        """The text of ids."""
        return cast(str, self.run.detokenize(list(token_ids)).text)

    def apply_chat_template(self, messages: Iterable[Mapping[str, Any]]) -> str:
        """A conversation as the model reads it, ready for the assistant's turn."""
        return self.run.apply_chat_template(messages, add_generation_prompt=True).text

    def enable_cache(self) -> None:
        """Keep texts from now on."""
        with self._lock:
            self._cache = self._cache or OrderedDict()

    def disable_cache(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._cache = None

    def clear_cache(self) -> None:
        """Forget what is kept."""
        with self._lock:
            if self._cache is not None:
                self._cache.clear()
            self._hits = self._misses = 0

    def get_cache_stats(self) -> dict[str, Any]:
        """Whether the cache is on, its size, hits and misses."""
        with self._lock:
            size = 0 if self._cache is None else len(self._cache)
            return {
                "enabled": self._cache is not None,
                "size": size,
                "hits": self._hits,
                "misses": self._misses,
            }

    def __repr__(self) -> str:
        return f"<InferenceClient of {self.run!r}>"

    def _with_weights(self, options: SampleOptions) -> SampleOptions:
        return cast(SampleOptions, {"weights": self.weights, **options})

    def _sampled(
        self, prompts: list[Any], indices: list[int], options: SampleOptions, size: int | None
    ) -> dict[int, list[str]]:
        """Texts by index; prompts that follow each other in `prompts` share requests."""
        copies = options.get("n") or 1
        pieces = list(_runs(indices, size or max(1, len(indices))))
        futures: list[APIFuture[SampleResult]] = [
            self.run._submit_sample([prompts[i] for i in piece], options, piece[0] * copies)
            for piece in pieces
        ]
        results = wait_all(futures, self.timeout)
        return {
            index: [sample.text for sample in samples]
            for piece, result in zip(pieces, results, strict=True)
            for index, samples in zip(piece, result.samples, strict=True)
        }

    def _cached(self, prompts: list[Any], options: SampleOptions) -> dict[int, str]:
        if self._cache is None or not _is_repeatable(options):
            return {}
        with self._lock:
            kept: Mapping[str, str] = self._cache or {}
            keys = [_key(prompt, options, index) for index, prompt in enumerate(prompts)]
            found = {index: kept[key] for index, key in enumerate(keys) if key in kept}
            self._hits += len(found)
            self._misses += len(prompts) - len(found)
            return found

    def _keep(self, prompt: Any, options: SampleOptions, index: int, texts: list[str]) -> None:
        if len(texts) != 1 or not _is_repeatable(options):
            return
        with self._lock:
            if self._cache is not None:
                self._cache[_key(prompt, options, index)] = texts[0]
                while len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)


def saved_at(run: SignalRun, step: int) -> dict[str, str]:
    """The weights that were saved after `step` optimizer steps. Raises NotFoundError."""
    for artifact in reversed(run.artifacts()):
        if artifact.step == step:
            return {"artifact": artifact.name}
    raise NotFoundError(f"The run {run.run_id} has nothing saved at step {step}.")


def _is_repeatable(options: SampleOptions) -> bool:
    pinned = options.get("weights") not in ("live", "current", None)
    return pinned and (options.get("temperature") == 0 or options.get("seed") is not None)


def _key(prompt: Any, options: SampleOptions, index: int) -> str:
    # With a seed the draws depend on the place in the list too.
    place = 0 if options.get("temperature") == 0 else index
    return json.dumps([prompt, dict(options), place], sort_keys=True, default=list)


def _runs(indices: list[int], size: int) -> Iterator[list[int]]:
    """Pieces of at most `size` indices that follow each other without a gap."""
    piece: list[int] = []
    for index in indices:
        if piece and (len(piece) == size or index != piece[-1] + 1):
            yield piece
            piece = []
        piece.append(index)
    if piece:
        yield piece
