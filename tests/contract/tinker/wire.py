"""The protocol without the SDK: what its client would not send, or not in this order."""

from __future__ import annotations

from typing import Any

import httpx2
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tests.contract.tinker.support import IDS, MODEL, key_of, plain
from tests.support.stack import RunningStack

PROTOBUF = "application/x-protobuf"
# Samples that are under way until they are cancelled, in some number of copies.
LONG = {"max_tokens": 2000, "stop": []}
STEP = {
    "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}  # fmt: skip


class Wire:
    """One user, with a session."""

    def __init__(self, stack: RunningStack, api_key: str | None = None) -> None:
        self.http = httpx2.Client(
            base_url=f"{stack.base_url}/api/v1",
            headers={"X-API-Key": key_of(api_key or stack.api_key)},
            timeout=45,
            trust_env=False,
        )
        self.session = self.ok("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        self.models = 0

    def post(self, path: str, /, **body: Any) -> httpx2.Response:
        """POST of a JSON object."""
        return self.http.post(f"/{path}", json=body)

    def ok(self, path: str, /, **body: Any) -> Any:
        """POST that must succeed."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def model(self, **changes: Any) -> str:
        """A new model's id."""
        self.models += 1
        fields = {"base_model": MODEL, "lora_config": {"rank": 4, "seed": 1}, **changes}
        return str(
            self.ok(
                "create_model",
                session_id=self.session,
                model_seq_id=self.models,
                optimizer_config={"type": "adamw"},
                **fields,
            )["model_id"]
        )

    def loss(self, model: str, seq: int, *data: Any, **changes: Any) -> httpx2.Response:
        """POST forward_backward."""
        body = message(model, seq, *data, **changes).SerializeToString()
        return self.raw(body)

    def raw(self, body: bytes, media_type: str = PROTOBUF) -> httpx2.Response:
        """POST forward_backward with these bytes."""
        headers = {"Content-Type": media_type}
        return self.http.post("/forward_backward", content=body, headers=headers)

    def step(self, model: str, seq: int, **changes: Any) -> httpx2.Response:
        """POST optim_step."""
        return self.post("optim_step", model_id=model, seq_id=seq, adam_params={**STEP, **changes})

    def sampler(self) -> str:
        """The session's first sampling session, on the bare base."""
        return str(
            self.ok(
                "create_sampling_session",
                session_id=self.session,
                sampling_session_seq_id=0,
                base_model=MODEL,
            )["sampling_session_id"]
        )

    def sample(self, sampler: str, seq: int, copies: int = 1, **params: Any) -> str:
        """The request id of samples of two tokens, unless `params` say otherwise."""
        return str(
            self.ok(
                "asample",
                sampling_session_id=sampler,
                seq_id=seq,
                prompt={"chunks": [{"type": "encoded_text", "tokens": IDS}]},
                sampling_params={"max_tokens": 2, **params},
                num_samples=copies,
            )["request_id"]
        )

    def result(self, answer: httpx2.Response | dict[str, Any]) -> httpx2.Response:
        """The end of a request that was accepted."""
        body = answer if isinstance(answer, dict) else answer.json()
        assert "request_id" in body, body
        while True:
            found = self.post("retrieve_future", request_id=body["request_id"])
            if found.status_code != 408:
                return found

    def failure(self, answer: httpx2.Response) -> Any:
        """How a request ended that was accepted and failed."""
        found = self.result(answer)
        assert found.status_code == 200, found.text
        return found.json()

    def number(self, answer: httpx2.Response) -> float:
        """The loss that a request came to."""
        found = self.result(answer)
        assert found.headers["Content-Type"] == PROTOBUF, found.text
        return dict(pb.ForwardBackwardOutput.FromString(found.content).metrics)["loss:sum"]

    def close(self) -> None:
        """Finish the session."""
        self.ok(f"sessions/{self.session}/finish", reason={"type": "success"})
        self.http.close()


def message(model: str, seq: int, *data: Any, loss_fn: str = "cross_entropy", **config: Any) -> Any:
    """A forward_backward as the SDK writes it."""
    given = list(data) or [plain(IDS)]
    inputs = ForwardBackwardInput(
        data=given, loss_fn="cross_entropy", loss_fn_config=config or None
    )
    request = ForwardBackwardRequest(model_id=model, seq_id=seq, forward_backward_input=inputs)
    found = forward_backward_request_to_proto(request)
    found.loss_fn = loss_fn
    return found
