"""The client: one user's view of one server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import httpx2

from rewardsignal import _config
from rewardsignal._by_run_id import ByRunId
from rewardsignal._files import write_tokenizer
from rewardsignal._futures import APIFuture
from rewardsignal._operations import given
from rewardsignal._pages import PagedList
from rewardsignal._poller import Poller
from rewardsignal._run import SignalRun
from rewardsignal._schemas import (
    Account,
    Model,
    ModelList,
    Run,
    RunList,
    RunOptions,
    TokenizerFiles,
)
from rewardsignal._transport import Transport, encode, segment


class SignalClient(ByRunId):
    """Connects to a Signal server; safe to share between threads.

    `api_key` and `base_url` default to SIGNAL_API_KEY and SIGNAL_BASE_URL, then to the profile that
    `signal login` or `signal up` stored; a stored key is used for its own server alone. `timeout` bounds
    one exchange with the server and `retry_for` the repeats of one call when the server cannot be
    reached or is busy, both in seconds. `transport` replaces the network: any httpx2 transport, such as
    one for a WSGI application.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = 60.0,
        transport: httpx2.BaseTransport | None = None,
        *,
        retry_for: float = 60.0,
    ) -> None:
        """Opens no connection. Raises AuthenticationError when there is no key."""
        found = _config.resolve(api_key, base_url)
        self._transport = Transport(
            found.base_url,
            found.api_key,
            timeout=timeout,
            retry_for=retry_for,
            transport=transport,
        )
        self._poller = Poller(self._transport)
        super().__init__()

    @property
    def base_url(self) -> str:
        """The server's address."""
        return self._transport.base_url

    def me(self) -> Account:
        """Whose key this client uses."""
        return Account.from_dict(self._transport.get("/me").body)

    def models(self) -> list[Model]:
        """The models that runs can be made of."""
        return ModelList.from_dict(self._transport.get("/models").body).data

    def list_models(self) -> list[str]:
        """The names of the models."""
        return [model.name for model in self.models()]

    def tokenizer_files(self, model: str) -> TokenizerFiles:
        """The files of a model's tokenizer, with their text."""
        answer = self._transport.get(f"/models/{segment(model, safe='/')}/tokenizer")
        return TokenizerFiles.from_dict(answer.body)

    def download_tokenizer(self, model: str, folder: str | Path) -> Path:
        """Write a model's tokenizer into `folder` for local use; returns the folder."""
        return write_tokenizer(self.tokenizer_files(model), Path(folder))

    def create_run(
        self,
        base_model: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        init_from: Mapping[str, Any] | None = None,
        **options: Unpack[RunOptions],
    ) -> SignalRun:
        """Create a run: LoRA on `base_model`, a name of `models()`.

        Operations may be submitted at once; they wait until a worker has loaded the model. `init_from`
        begins from a saved state of one's own: `{"run_id": …, "artifact": …, "optimizer": True}`.
        """
        own = {
            "name": name,
            "labels": dict(labels) if labels else None,
            "init_from": dict(init_from) if init_from else None,
        }
        body = encode({"base_model": base_model, **given({**own, **options})})
        return SignalRun(self._poller, Run.from_dict(self._transport.post("/runs", body).body))

    def run(self, run_id: str) -> SignalRun:
        """An existing run, to go on with."""
        answer = self._transport.get(f"/runs/{segment(run_id)}")
        return SignalRun(self._poller, Run.from_dict(answer.body))

    def list_runs(
        self, *, status: str | None = None, label: str | None = None, page_size: int = 50
    ) -> PagedList[Run]:
        """The user's runs, newest first; pages are fetched as they are needed.

        `label` is a label's name, or `name=value`.
        """
        query: dict[str, Any] = {"status": status, "label": label, "limit": page_size}

        def fetch(cursor: str | None) -> tuple[list[Run], str | None]:
            page = RunList.from_dict(self._transport.get("/runs", query | {"cursor": cursor}).body)
            return page.data, page.next_cursor if page.has_more else None

        return PagedList(fetch)

    def future(self, future_id: str) -> APIFuture[Any]:
        """A future of an earlier process, found again by its id."""
        answer = self._transport.get(f"/futures/{segment(future_id)}")
        future: APIFuture[Any] = APIFuture(self._poller, answer.body["run_id"], answer.body["kind"])
        future.bind(answer.body, answer.request_id)
        return future

    def close(self) -> None:
        """Close the connections; runs on the server go on."""
        self._poller.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SignalClient {self.base_url}>"
