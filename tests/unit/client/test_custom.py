"""A loss of the client's own: what goes forth, what comes back, and shapes that do not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rewardsignal._custom import differentiated
from rewardsignal._schemas import ForwardRow
from tests.unit.client.wire import RUN, TIMINGS, Wire, reply


def row(logprobs: list[Any], targets: list[Any]) -> ForwardRow:
    return ForwardRow(
        example=0,
        token_ids=[1] * len(targets),
        target_ids=targets,
        logprobs=logprobs,
        top_token_ids=None,
        top_logprobs=None,
    )


def test_gradients_become_weights() -> None:
    rows = [row([None, -1.0], [5, 6]), row([[-1.0, None], [None, None]], [[7, 8], [9, 9]])]
    value, batch = differentiated(lambda given: (3, [[9.0, 2], [[0.5, 9], [9, 9]]]), rows)
    assert value == 3.0
    assert batch == [
        {"tokens": [1, 1], "targets": [5, 6], "weights": [0.0, 2.0]},
        {"tokens": [1, 1], "targets": [[7, 8], [9, 9]], "weights": [[0.5, 0.0], [0.0, 0.0]]},
    ]


@pytest.mark.parametrize("gradients", [[], [[1.0]], [[1.0, 2.0], [1.0]]])
def test_gradients_of_another_shape_are_refused(gradients: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="gradient"):
        differentiated(lambda rows: (0.0, gradients), [row([-1.0, -1.0], [5, 6])])


def test_two_passes_make_one_result() -> None:
    answer = {
        "seq": 1,
        "weights_step": 0,
        "rows": [row([None, -1.0], [5, 6]).to_dict()],
        "metrics": {},
        "timings": TIMINGS,
    }
    done = {"seq": 2, "step": 0, "loss": -1.0, "loss_sum": -2.0, "num_tokens": 1, "grad_norm": 0.5}
    wire = Wire(
        reply(RUN),
        reply(answer),
        reply({**done, "metrics": {"input_tokens": 2.0}, "timings": TIMINGS}),
    )
    run = wire.client().run(str(RUN["run_id"]))
    result = run.forward_backward_custom(
        [{"tokens": [1, 1], "targets": [5, 6]}], lambda rows: (7.5, [[0, 2]])
    )
    assert result.loss == 7.5
    assert result.metrics == {"input_tokens": 2.0, "surrogate_loss": -2.0}
    sent = [json.loads(request.content) for request in wire.requests[1:]]
    assert sent[1] == {
        "batch_data": [{"tokens": [1, 1], "targets": [5, 6], "weights": [0.0, 2.0]}],
        "loss_fn": "custom",
    }
