"""Every public method of the SDK's clients, by its name: one that is new in a later SDK fails here first."""

from __future__ import annotations

import inspect
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.contract.tinker.support import (
    IDS,
    MODEL,
    PROMPT,
    STEP,
    key_of,
    params,
    plain,
    policy,
    rest_of,
    service_of,
    wait,
)
from tests.support.stack import RunningStack


@dataclass
class Here:
    """What a method is tried on."""

    stack: RunningStack
    service: Any
    model: Any
    sampler: Any
    rest: Any
    state: str
    weights: str
    external: str
    count: int = 0

    def name(self) -> str:
        """A name that was not used."""
        self.count += 1
        return f"name-{self.count}"

    def throwaway(self) -> Any:
        """A session that a method may finish."""
        return service_of(self.stack)


@pytest.fixture(scope="module")
def here(stack: RunningStack, service: Any, model: Any, tiny_model: Path) -> Iterator[Here]:
    """Things to try the methods on; in a folder in which the tokenizer is found by the model's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_model.parent)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TINKER_BASE_URL", stack.base_url)
        patch.setenv("TINKER_API_KEY", key_of(stack.api_key))
        patch.setenv("TINKER_TELEMETRY", "0")
        state = model.save_state("state", ttl_seconds=3600, user_metadata={"step": "1"}).result()
        weights = model.save_weights_for_sampler("weights").result()
        external = model.save_weights_external("external").result()
        sampler = service.create_sampling_client(model_path=weights.path).result()
        rest = rest_of(stack)
        yield Here(stack, service, model, sampler, rest, state.path, weights.path, external.path)


def finite(output: Any) -> None:
    assert output.metrics["loss:sum"] == pytest.approx(output.metrics["loss:sum"])
    assert [len(one["logprobs"].data) for one in output.loss_fn_outputs] == [len(IDS) - 1]


def custom(data: Any, logprobs: Any) -> Any:
    loss = sum(-one.sum() for one in logprobs)
    return loss, {"custom/nll": float(loss.detach())}


def traced(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss}


def is_client(client: Any) -> None:
    """A client that answers."""
    if hasattr(client, "sample"):
        assert len(client.sample(PROMPT, 1, params()).result().sequences[0].tokens) == 4
    else:
        finite(client.forward([plain()], "cross_entropy").result())


def urls(found: Any) -> None:
    assert set(found.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    with urllib.request.urlopen(found.urls["adapter_config.json"]) as answer:
        assert b'"r": 8' in answer.read()


def saved(path: str, kind: str) -> None:
    assert f"/{kind}/" in path


def listed(here: Here, found: Any) -> None:
    assert {here.state, here.weights} <= {one.tinker_path for one in found.checkpoints}


def loaded(here: Here, method: str) -> None:
    fresh = here.service.create_lora_training_client(base_model=MODEL, rank=8).result()
    answer = getattr(fresh, method)(here.state)
    assert (wait(answer) if method.endswith("_async") else answer).result().model_id
    is_client(fresh)


def new_checkpoint(here: Here) -> str:
    path: str = here.model.save_weights_for_sampler(here.name()).result().path
    return path


def parted(path: str) -> tuple[str, str]:
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    return parsed.training_run_id, parsed.checkpoint_id


def search(here: Here) -> None:
    wanted = {"purpose": "contract"}
    request = types.SessionSearchRequest(user_metadata=wanted, limit=1)
    (one,) = here.rest.search_sessions(request).result().sessions
    assert one.status.type == "active" and one.checkpoints_count >= 3


def refuses_trace(work: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="exports no traces"):
        work()


def is_whoami_refused(work: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="JWT"):
        work()


SINCE, UNTIL = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)

SERVICE: dict[str, Callable[[Here], object]] = {
    "get_console_url": lambda h: h.service.get_console_url(),
    "get_server_capabilities": lambda h: _has_model(h.service.get_server_capabilities()),
    "get_server_capabilities_async": lambda h: _has_model(
        wait(h.service.get_server_capabilities_async())
    ),
    "create_lora_training_client": lambda h: is_client(
        h.service.create_lora_training_client(base_model=MODEL, rank=4).result()
    ),
    "create_lora_training_client_async": lambda h: is_client(
        wait(h.service.create_lora_training_client_async(base_model=MODEL, rank=4))
    ),
    "copy_weights": lambda h: is_client(
        h.service.create_sampling_client(
            model_path=service_of(h.stack, project_id="p").copy_weights(h.weights).result()
        ).result()
    ),
    "create_training_client_from_state": lambda h: is_client(
        h.service.create_training_client_from_state(h.state).result()
    ),
    "create_training_client_from_state_async": lambda h: is_client(
        wait(h.service.create_training_client_from_state_async(h.state))
    ),
    "create_training_client_from_state_with_optimizer": lambda h: is_client(
        h.service.create_training_client_from_state_with_optimizer(h.state).result()
    ),
    "create_training_client_from_state_with_optimizer_async": lambda h: is_client(
        wait(h.service.create_training_client_from_state_with_optimizer_async(h.state))
    ),
    "create_sampling_client": lambda h: is_client(
        h.service.create_sampling_client(base_model=MODEL).result()
    ),
    "create_sampling_client_async": lambda h: is_client(
        wait(h.service.create_sampling_client_async(model_path=h.weights))
    ),
    "create_custom_loss": lambda h: _custom_loss(h),
    "create_rest_client": lambda h: _has_model(
        h.service.create_rest_client().get_server_capabilities().result()
    ),
    "close": lambda h: _closed(h.throwaway()),
    "get_telemetry": lambda h: h.service.get_telemetry(),
}

TRAINING: dict[str, Callable[[Here], object]] = {
    "get_console_url": lambda h: h.model.get_console_url(),
    "forward": lambda h: finite(h.model.forward([plain()], "cross_entropy").result()),
    "forward_async": lambda h: finite(
        wait(h.model.forward_async([plain()], "cross_entropy")).result()
    ),
    "forward_backward": lambda h: finite(h.model.forward_backward([policy()], "ppo").result()),
    "forward_backward_async": lambda h: finite(
        wait(h.model.forward_backward_async([policy()], "dro", {"beta": 0.1})).result()
    ),
    "forward_backward_custom": lambda h: finite(
        h.model.forward_backward_custom([plain()], custom).result()
    ),
    "forward_backward_custom_async": lambda h: finite(
        wait(h.model.forward_backward_custom_async([plain()], custom)).result()
    ),
    "optim_step": lambda h: _stepped(h, h.model.optim_step(STEP).result()),
    "optim_step_async": lambda h: _stepped_async(h),
    "save_state": lambda h: saved(h.model.save_state(h.name()).result().path, "weights"),
    "save_state_async": lambda h: saved(
        wait(h.model.save_state_async(h.name())).result().path, "weights"
    ),
    "load_state": lambda h: loaded(h, "load_state"),
    "load_state_async": lambda h: loaded(h, "load_state_async"),
    "load_state_with_optimizer": lambda h: loaded(h, "load_state_with_optimizer"),
    "load_state_with_optimizer_async": lambda h: loaded(h, "load_state_with_optimizer_async"),
    "save_weights_for_sampler": lambda h: saved(new_checkpoint(h), "sampler_weights"),
    "save_weights_for_sampler_async": lambda h: saved(
        wait(h.model.save_weights_for_sampler_async(h.name())).result().path, "sampler_weights"
    ),
    "save_weights_external": lambda h: saved(
        h.model.save_weights_external(h.name()).result().path, "external_weights"
    ),
    "save_weights_external_async": lambda h: saved(
        wait(h.model.save_weights_external_async(h.name())).result().path, "external_weights"
    ),
    "get_info": lambda h: _info(h.model.get_info()),
    "get_info_async": lambda h: _info(wait(h.model.get_info_async())),
    "get_tokenizer": lambda h: _tokenizes(h.model.get_tokenizer()),
    "create_sampling_client": lambda h: is_client(
        h.model.create_sampling_client(h.weights).result()
    ),
    "create_sampling_client_async": lambda h: is_client(
        wait(h.model.create_sampling_client_async(h.weights))
    ),
    "save_weights_and_get_sampling_client": lambda h: [
        is_client(h.model.save_weights_and_get_sampling_client(kind=kind).result())
        for kind in ("snapshot", "inflight")
    ],
    "save_weights_and_get_sampling_client_async": lambda h: is_client(
        wait(h.model.save_weights_and_get_sampling_client_async())
    ),
    "get_telemetry": lambda h: h.model.get_telemetry(),
}

SAMPLING: dict[str, Callable[[Here], object]] = {
    "create": lambda h: wait(
        tinker.SamplingClient.create(h.service.holder, sampling_session_id=_handle_id(h))
    ),
    "sample": lambda h: is_client(h.sampler),
    "sample_async": lambda h: wait(h.sampler.sample_async(PROMPT, 2, params())),
    "compute_logprobs": lambda h: _scored(h.sampler.compute_logprobs(PROMPT).result()),
    "compute_logprobs_async": lambda h: _scored(wait(h.sampler.compute_logprobs_async(PROMPT))),
    "get_tokenizer": lambda h: _tokenizes(h.sampler.get_tokenizer()),
    "get_base_model": lambda h: _is_tiny(h.sampler.get_base_model()),
    "get_base_model_async": lambda h: _is_tiny(wait(h.sampler.get_base_model_async())),
    "get_sampler_handle": lambda h: h.sampler.get_sampler_handle(),
    "from_sampler_handle": lambda h: is_client(
        tinker.SamplingClient.from_sampler_handle(
            h.sampler.get_sampler_handle(), api_key=key_of(h.stack.api_key)
        )
    ),
    "on_queue_state_change": lambda h: None,
    "get_telemetry": lambda h: h.sampler.get_telemetry(),
}

REST: dict[str, Callable[[Here], object]] = {
    "get_telemetry": lambda h: h.rest.get_telemetry(),
    "get_server_capabilities": lambda h: _has_model(h.rest.get_server_capabilities().result()),
    "get_training_run": lambda h: _is_run(h, h.rest.get_training_run(h.model.model_id).result()),
    "get_training_run_async": lambda h: _is_run(
        h, wait(h.rest.get_training_run_async(h.model.model_id))
    ),
    "get_training_run_by_tinker_path": lambda h: _is_run(
        h, h.rest.get_training_run_by_tinker_path(h.state).result()
    ),
    "get_training_run_by_tinker_path_async": lambda h: _is_run(
        h, wait(h.rest.get_training_run_by_tinker_path_async(h.state))
    ),
    "get_weights_info_by_tinker_path": lambda h: _weights_info(h),
    "list_training_runs": lambda h: _has_run(h, h.rest.list_training_runs(limit=100).result()),
    "list_training_runs_async": lambda h: _has_run(
        h, wait(h.rest.list_training_runs_async(limit=100))
    ),
    "list_checkpoints": lambda h: listed(h, h.rest.list_checkpoints(h.model.model_id).result()),
    "list_checkpoints_async": lambda h: listed(
        h, wait(h.rest.list_checkpoints_async(h.model.model_id))
    ),
    "get_external_weights_urls": lambda h: urls(
        h.rest.get_external_weights_urls(h.external).result()
    ),
    "get_external_weights_urls_async": lambda h: urls(
        wait(h.rest.get_external_weights_urls_async(h.external))
    ),
    "delete_checkpoint": lambda h: _deleted(
        h, lambda path: h.rest.delete_checkpoint(*parted(path)).result()
    ),
    "delete_checkpoint_async": lambda h: _deleted(
        h, lambda path: wait(h.rest.delete_checkpoint_async(*parted(path)))
    ),
    "delete_checkpoint_from_tinker_path": lambda h: _deleted(
        h, lambda path: h.rest.delete_checkpoint_from_tinker_path(path).result()
    ),
    "delete_checkpoint_from_tinker_path_async": lambda h: _deleted(
        h, lambda path: wait(h.rest.delete_checkpoint_from_tinker_path_async(path))
    ),
    "get_audit_log": lambda h: h.rest.get_audit_log().result(),
    "get_audit_log_async": lambda h: wait(h.rest.get_audit_log_async()),
    "copy_weights": lambda h: saved(h.rest.copy_weights(h.state, "p").result(), "weights"),
    "copy_weights_async": lambda h: saved(wait(h.rest.copy_weights_async(h.state, "p")), "weights"),
    "publish_checkpoint_from_tinker_path": lambda h: _published(h, "publish_{}", "unpublish_{}"),
    "publish_checkpoint_from_tinker_path_async": lambda h: _published(
        h, "publish_{}_async", "unpublish_{}_async"
    ),
    "unpublish_checkpoint_from_tinker_path": lambda h: _published(h, "publish_{}", "unpublish_{}"),
    "unpublish_checkpoint_from_tinker_path_async": lambda h: _published(
        h, "publish_{}_async", "unpublish_{}_async"
    ),
    "set_checkpoint_ttl_from_tinker_path": lambda h: _lives_for(
        h, h.rest.set_checkpoint_ttl_from_tinker_path(h.weights, 7200).result()
    ),
    "set_checkpoint_ttl_from_tinker_path_async": lambda h: _lives_for(
        h, wait(h.rest.set_checkpoint_ttl_from_tinker_path_async(h.weights, 7200))
    ),
    "list_user_checkpoints": lambda h: listed(h, h.rest.list_user_checkpoints(limit=100).result()),
    "list_user_checkpoints_async": lambda h: listed(
        h, wait(h.rest.list_user_checkpoints_async(limit=100))
    ),
    "get_session": lambda h: _is_session(h, h.rest.get_session(_session(h)).result()),
    "get_session_async": lambda h: _is_session(h, wait(h.rest.get_session_async(_session(h)))),
    "list_sessions": lambda h: _has_session(h, h.rest.list_sessions(limit=100).result()),
    "list_sessions_async": lambda h: _has_session(h, wait(h.rest.list_sessions_async(limit=100))),
    "assign_session_project": lambda h: h.rest.assign_session_project(_session(h), "p").result(),
    "assign_session_project_async": lambda h: wait(
        h.rest.assign_session_project_async(_session(h), "p")
    ),
    "export_session_trace": lambda h: refuses_trace(
        lambda: h.rest.export_session_trace(_session(h)).result()
    ),
    "export_session_trace_async": lambda h: refuses_trace(
        lambda: wait(h.rest.export_session_trace_async(_session(h)))
    ),
    "whoami": lambda h: is_whoami_refused(lambda: h.rest.whoami().result()),
    "get_sampler": lambda h: _is_tiny(h.rest.get_sampler(_handle_id(h)).result().base_model),
    "get_sampler_async": lambda h: _is_tiny(
        wait(h.rest.get_sampler_async(_handle_id(h))).base_model
    ),
    "get_billing_usage": lambda h: h.rest.get_billing_usage(SINCE, UNTIL).result(),
    "get_billing_usage_async": lambda h: wait(h.rest.get_billing_usage_async(SINCE, UNTIL)),
    "get_current_checkpoint_storage_usage": lambda h: (
        h.rest.get_current_checkpoint_storage_usage().result()
    ),
    "get_current_checkpoint_storage_usage_async": lambda h: wait(
        h.rest.get_current_checkpoint_storage_usage_async()
    ),
    "search_sessions": search,
}


def _session(here: Here) -> str:
    found: str = here.model.model_id.split(":")[0]
    return found


def _handle_id(here: Here) -> str:
    found: str = here.sampler._pickle_state().sampling_session_id
    return found


def _has_model(found: Any) -> None:
    assert MODEL in [one.model_name for one in found.supported_models]


def _is_tiny(name: str) -> None:
    assert name == MODEL


def _closed(service: Any) -> None:
    service.get_server_capabilities()
    service.create_lora_training_client(base_model=MODEL, rank=2).result()
    service.close("interrupted", detail="enough").result()


def _custom_loss(here: Here) -> None:
    loss = here.service.create_custom_loss(traced, {"logprobs": 1, "weights": 1}).result()
    finite(here.model.forward_backward_custom([plain()], loss).result())


def _stepped(here: Here, answer: Any) -> None:
    assert set(answer.metrics) >= {"grad_norm", "learning_rate"}


def _stepped_async(here: Here) -> None:
    here.model.forward_backward([plain()], "cross_entropy").result()
    _stepped(here, wait(here.model.optim_step_async(STEP)).result())


def _info(found: Any) -> None:
    assert (found.model_data.model_name, found.lora_rank, found.is_lora) == (MODEL, 8, True)


def _tokenizes(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"


def _scored(found: Any) -> None:
    assert found[0] is None and all(value < 0 for value in found[1:]) and len(found) == len(IDS)


def _is_run(here: Here, found: Any) -> None:
    assert (found.training_run_id, found.base_model) == (here.model.model_id, MODEL)
    assert (found.lora_rank, found.user_metadata) == (8, {"renderer_name": "role_colon"})
    assert found.last_checkpoint is not None and found.last_sampler_checkpoint is not None


def _has_run(here: Here, found: Any) -> None:
    assert here.model.model_id in [one.training_run_id for one in found.training_runs]
    assert found.cursor.total_count >= 1


def _weights_info(here: Here) -> None:
    found = here.rest.get_weights_info_by_tinker_path(here.state).result()
    assert (found.base_model, found.lora_rank, found.train_unembed) == (MODEL, 8, True)


def _paths(here: Here) -> list[str]:
    found = here.rest.list_checkpoints(here.model.model_id).result().checkpoints
    return [one.tinker_path for one in found]


def _deleted(here: Here, delete: Callable[[str], object]) -> None:
    path = new_checkpoint(here)
    assert path in _paths(here)
    delete(path)
    assert path not in _paths(here)


def _published(here: Here, publish: str, unpublish: str) -> None:
    path, what = new_checkpoint(here), "checkpoint_from_tinker_path"
    other = service_of(here.stack, here.stack.new_user("reader"))
    for name, allowed in ((publish, True), (unpublish, False)):
        answer = getattr(here.rest, name.format(what))(path)
        wait(answer) if name.endswith("_async") else answer.result()
        if allowed:
            is_client(other.create_sampling_client(model_path=path).result())
        else:
            with pytest.raises(tinker.NotFoundError):
                other.create_sampling_client(model_path=path).result()
    other.close("success").result()


def _lives_for(here: Here, answer: object) -> None:
    found = here.rest.list_checkpoints(here.model.model_id).result().checkpoints
    (expires,) = [one.expires_at for one in found if one.tinker_path == here.weights]
    assert 7000 < (expires - datetime.now(UTC)).total_seconds() <= 7200


def _is_session(here: Here, found: Any) -> None:
    assert here.model.model_id in found.training_run_ids
    assert found.user_metadata == {"purpose": "contract"} and found.sampler_ids


def _has_session(here: Here, found: Any) -> None:
    assert _session(here) in found.sessions


TABLES = (
    (tinker.ServiceClient, SERVICE),
    (tinker.TrainingClient, TRAINING),
    (tinker.SamplingClient, SAMPLING),
    (tinker.RestClient, REST),
)


def methods(client: type) -> list[str]:
    """The public ones."""
    return [
        name
        for name, value in inspect.getmembers(client)
        if not name.startswith("_") and callable(value)
    ]


@pytest.mark.parametrize("client", [client for client, _ in TABLES], ids=lambda it: it.__name__)
def test_every_public_method_is_in_the_table(client: type) -> None:
    (table,) = [table for one, table in TABLES if one is client]
    assert sorted(table) == sorted(methods(client))


@pytest.mark.parametrize(
    ("client", "method"),
    [(client.__name__, name) for client, table in TABLES for name in table],
)
def test_a_method_does_what_it_says(here: Here, client: str, method: str) -> None:
    (table,) = [table for one, table in TABLES if one.__name__ == client]
    table[method](here)
