"""The SDK's losses as rows and options of the engine's."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from schemas.errors import SignalError
from web.tinker.datums import Datum, Tensor
from web.tinker.losses import RULES, Limits, options_of, rows_of
from workers.text.rows import Row

LIMITS = Limits(vocab_size=100, context_length=8)


def ints(*values: int, shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(array("q", values), shape or (len(values),))


def floats(*values: float, shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(array("f", values), shape or (len(values),))


def datum(*tokens: int, **inputs: Tensor) -> Datum:
    return Datum(array("i", tokens), inputs)


def row(loss_fn: str, one: Datum) -> Row:
    (found,) = rows_of([one], loss_fn, LIMITS)
    return found


def refused(loss_fn: str, *data: Datum) -> SignalError:
    with pytest.raises(SignalError) as caught:
        rows_of(data, loss_fn, LIMITS)
    return caught.value


POLICY: dict[str, Tensor] = {
    "target_tokens": ints(0, 0, 7, 8),
    "logprobs": floats(0, 0, -1, -2),
    "advantages": floats(0, 0, 0.5, 0),
}


def test_cross_entropy_takes_weights_of_any_sign_and_none_as_ones() -> None:
    found = row("cross_entropy", datum(1, 2, target_tokens=ints(2, 3), weights=floats(-0.5, 0.0)))
    assert (list(found.tokens), list(found.targets)) == ([1, 2], [2, 3])
    assert list(found.weights) == [-0.5, 0.0] and not found.arrays
    assert list(row("cross_entropy", datum(1, 2, target_tokens=ints(2, 3))).weights) == [1, 1]


def test_several_targets_per_position() -> None:
    wide = datum(
        1, 2,
        target_tokens=ints(1, 2, 3, 4, 5, 6, shape=(2, 3)),
        weights=floats(0.1, 0.2, 0.7, 0, 0, 1, shape=(2, 3)),
    )  # fmt: skip
    found = row("cross_entropy", wide)
    assert (found.width, len(found.weights)) == (3, 6)
    assert refused("ppo", datum(1, 2, **{**wide.inputs, **_policy(2)})).param == (
        "data.0.loss_fn_inputs.target_tokens"
    )


def _policy(count: int) -> dict[str, Tensor]:
    return {name: floats(*[0.1] * count) for name in ("logprobs", "advantages")}


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_what_was_given_is_not_counted(loss_fn: str) -> None:
    found = row(loss_fn, datum(1, 2, 3, 4, **POLICY))
    assert list(found.weights) == [0, 0, 1, 1]
    assert list(found.arrays["logprobs"]) == [0, 0, -1, -2]
    halved = datum(1, 2, 3, 4, **POLICY, weights=floats(1, 1, 0.5, 1))
    assert list(row(loss_fn, halved).weights) == [0, 0, 0.5, 1]


def test_the_mask_of_gspo_counts_what_it_names() -> None:
    masked = datum(1, 2, 3, 4, **POLICY, sequence_ratio_mask=floats(0, 1, 1, 0))
    assert list(row("gspo", masked).weights) == [0, 1, 1, 1]
    assert refused("ppo", masked).code == "not_supported"


BAD: list[tuple[str, Datum, str, str]] = [
    ("cross_entropy", datum(target_tokens=ints()), "validation_error", "data.0.model_input"),
    ("cross_entropy", datum(1, 2), "validation_error", "data.0.loss_fn_inputs.target_tokens"),
    (
        "cross_entropy", datum(1, 2, target_tokens=ints(1)),
        "validation_error", "data.0.loss_fn_inputs.target_tokens",
    ),
    (
        "cross_entropy", datum(1, 2, target_tokens=ints(1, 100)),
        "token_out_of_range", "data.0.loss_fn_inputs.target_tokens",
    ),
    ("cross_entropy", datum(1, 100, target_tokens=ints(1, 1)), "token_out_of_range", "data.0.model_input"),
    ("cross_entropy", datum(-1, target_tokens=ints(1)), "token_out_of_range", "data.0.model_input"),
    (
        "cross_entropy", datum(1, target_tokens=ints(2**40)),
        "token_out_of_range", "data.0.loss_fn_inputs.target_tokens",
    ),
    (
        "cross_entropy", datum(*range(9), target_tokens=ints(*range(9))),
        "sequence_too_long", "data.0.model_input",
    ),
    (
        "cross_entropy", datum(1, target_tokens=ints(1), weights=floats(float("nan"))),
        "validation_error", "data.0.loss_fn_inputs.weights",
    ),
    (
        "cross_entropy", datum(1, target_tokens=ints(1), weights=ints(1)),
        "validation_error", "data.0.loss_fn_inputs.weights",
    ),
    (
        "cross_entropy", datum(1, target_tokens=floats(1.0)),
        "validation_error", "data.0.loss_fn_inputs.target_tokens",
    ),
    (
        "cross_entropy", datum(1, target_tokens=ints(1), mask=floats(1)),
        "not_supported", "data.0.loss_fn_inputs.mask",
    ),
    (
        "ppo", datum(1, target_tokens=ints(1), logprobs=floats(-1)),
        "validation_error", "data.0.loss_fn_inputs.advantages",
    ),
    (
        "ppo", datum(1, target_tokens=ints(1), logprobs=floats(-1, 2), advantages=floats(1)),
        "validation_error", "data.0.loss_fn_inputs.logprobs",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("loss_fn", "one", "code", "param"), BAD)
def test_what_is_wrong_is_named(loss_fn: str, one: Datum, code: str, param: str) -> None:
    error = refused(loss_fn, one)
    assert (error.code, error.param) == (code, param)


def test_everything_wrong_is_named_at_once_and_an_empty_batch_too() -> None:
    error = refused("cross_entropy", datum(1), datum(1, target_tokens=ints(1)), datum(1, 2))
    assert [one.param for one in error.details] == [
        "data.0.loss_fn_inputs.target_tokens",
        "data.2.loss_fn_inputs.target_tokens",
    ]
    assert refused("cross_entropy").param == "data"


def test_every_loss_has_its_options_resolved() -> None:
    for name in RULES:
        assert isinstance(options_of(name, {}), dict)
    assert options_of("ppo", {})["epsilon_high"] == pytest.approx(0.2)
    ppo = options_of("ppo", {"clip_low_threshold": 0.75, "clip_high_threshold": 1.5})
    assert (ppo["epsilon"], ppo["epsilon_high"]) == (0.25, 0.5)
    assert options_of("gspo", {})["loss_type"] == "gspo_token"
    assert options_of("cispo", {"clip_high_threshold": 3.0})["clip_high_threshold"] == 3.0
    assert options_of("dro", {"beta": 0.5}) == {"beta": 0.5, "scale_rewards": "group"}


@pytest.mark.parametrize(
    ("loss_fn", "config", "code", "param"),
    [
        ("magic", {}, "unknown_loss", "loss_fn"),
        ("stable_reinforce", {}, "not_supported", "loss_fn"),
        ("custom", {}, "not_supported", "loss_fn"),
        ("cross_entropy", {"beta": 1.0}, "unknown_option", "loss_fn_config.beta"),
        ("dro", {"beta": "1"}, "validation_error", "loss_fn_config.beta"),
        ("dro", {"beta": float("inf")}, "validation_error", "loss_fn_config.beta"),
        ("dro", {"beta": -1.0}, "validation_error", "loss_fn_config.beta"),
        ("ppo", {"clip_low_threshold": 1.5}, "validation_error", "loss_fn_config.clip_low_threshold"),
        ("ppo", {"clip_high_threshold": 0.5}, "validation_error", "loss_fn_config.clip_high_threshold"),
        (
            "cispo", {"clip_low_threshold": 5.0},
            "validation_error", "loss_fn_config.clip_low_threshold",
        ),
    ],
)  # fmt: skip
def test_options_that_are_wrong_are_named(
    loss_fn: str, config: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(SignalError) as caught:
        options_of(loss_fn, config)
    assert (caught.value.code, caught.value.param) == (code, param)
