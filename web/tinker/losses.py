"""The SDK's losses as the engine's: names, options, and what a datum's inputs come to as a row. Pure.

A position whose advantage and log-probability are both 0 was given, not sampled: it is not counted. All
losses are sums.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from schemas.errors import Detail, SignalError, raise_all
from schemas.losses import find_loss
from web.tinker.datums import Datum, Tensor
from workers.text.rows import Row

TARGETS, WEIGHTS = "target_tokens", "weights"
_LOW, _HIGH = "clip_low_threshold", "clip_high_threshold"
_POLICY = ("logprobs", "advantages")


@dataclass(frozen=True)
class Rule:
    """A loss of the SDK: what a datum must give and may give, and which options it has."""

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = (WEIGHTS,)
    options: tuple[str, ...] = ()
    wide: bool = False


RULES: Mapping[str, Rule] = {
    "cross_entropy": Rule(wide=True),
    "importance_sampling": Rule(_POLICY),
    "ppo": Rule(_POLICY, options=(_LOW, _HIGH)),
    "cispo": Rule(_POLICY, options=(_LOW, _HIGH)),
    "dro": Rule(_POLICY, options=("beta",)),
    "gspo": Rule(_POLICY, (WEIGHTS, "sequence_ratio_mask"), (_LOW, _HIGH)),
}
_LATER = ("stable_reinforce", "custom")


@dataclass(frozen=True)
class Limits:
    """What a model takes."""

    vocab_size: int
    context_length: int


def rule_of(loss_fn: str) -> Rule:
    """Raises SignalError unknown_loss or not_supported."""
    if loss_fn in _LATER:
        text = f"The loss {loss_fn!r} is not supported by this server."
        raise SignalError("not_supported", text, param="loss_fn")
    if loss_fn not in RULES:
        text = f"There is no loss {loss_fn!r}; there are: {', '.join(RULES)}."
        raise SignalError("unknown_loss", text, param="loss_fn")
    return RULES[loss_fn]


def options_of(loss_fn: str, config: Mapping[str, float | str]) -> dict[str, Any]:
    """Every option of the engine's loss. Raises SignalError that names the entry of loss_fn_config."""
    rule, wrong = rule_of(loss_fn), []
    for name, value in config.items():
        where = f"loss_fn_config.{name}"
        if name not in rule.options:
            known = ", ".join(rule.options) or "none"
            text = f"{loss_fn} has no option {name!r}; it has {known}."
            wrong.append(Detail(where, "unknown_option", text))
        elif isinstance(value, str) or not isfinite(value):
            wrong.append(Detail(where, "validation_error", "A finite number is needed."))
    raise_all(wrong)
    numbers = {name: float(value) for name, value in config.items()}
    spec, own = find_loss(loss_fn), _own_options(loss_fn, numbers)
    raise_all(spec.problems(own, "loss_fn_config"))
    return spec.resolved(own)


def _own_options(loss_fn: str, config: Mapping[str, float]) -> dict[str, Any]:
    if loss_fn not in ("ppo", "gspo"):
        return dict(config)
    # The SDK bounds the ratio itself, the engine how far it is from 1.
    found: dict[str, Any] = {"loss_type": "gspo_token"} if loss_fn == "gspo" else {}
    low, high = config.get(_LOW), config.get(_HIGH)
    if low is not None and not 0 <= low <= 1:
        raise SignalError("validation_error", "0 to 1 is needed.", param=f"loss_fn_config.{_LOW}")
    if high is not None and high < 1:
        raise SignalError(
            "validation_error", "1 or more is needed.", param=f"loss_fn_config.{_HIGH}"
        )
    if low is not None:
        found["epsilon"] = 1 - low
    if high is not None:
        found["epsilon_high"] = high - 1
    elif loss_fn == "ppo":
        # Its own default, not the lower bound's distance.
        found["epsilon_high"] = 0.2
    return found


def rows_of(datums: Sequence[Datum], loss_fn: str, limits: Limits) -> list[Row]:
    """One row per datum. Raises one SignalError that names everything wrong."""
    rule = rule_of(loss_fn)
    if not datums:
        raise SignalError("validation_error", "The batch is empty.", param="data")
    rows, wrong = list[Row](), list[Detail]()
    for index, datum in enumerate(datums):
        try:
            rows.append(_row(datum, rule, loss_fn, limits, index))
        except SignalError as error:
            wrong += error.details or [Detail(error.param, error.code, error.message)]
    raise_all(wrong)
    return rows


def _row(datum: Datum, rule: Rule, loss_fn: str, limits: Limits, index: int) -> Row:
    where = f"data.{index}"
    _check_tokens(datum.tokens, limits, f"{where}.model_input")
    inputs = f"{where}.loss_fn_inputs"
    _check_names(datum, rule, loss_fn, inputs)
    count = len(datum.tokens)
    targets, width = _targets(datum.inputs[TARGETS], count, rule, limits, f"{inputs}.{TARGETS}")
    arrays = {
        name: _floats(datum.inputs[name], (count,), f"{inputs}.{name}")
        for name in (*rule.needs, *rule.takes)
        if name != WEIGHTS and name in datum.inputs
    }
    if WEIGHTS in datum.inputs:
        shape = datum.inputs[TARGETS].shape
        weights = _floats(datum.inputs[WEIGHTS], shape, f"{inputs}.{WEIGHTS}")
    else:
        weights = array("f", [1.0]) * (count * width)
    if rule.needs:
        weights = _sampled(weights, list(arrays.values()))
    return Row(datum.tokens, targets, weights, arrays, example=index)


def _check_names(datum: Datum, rule: Rule, loss_fn: str, where: str) -> None:
    wrong = [
        Detail(f"{where}.{name}", "validation_error", f"{loss_fn} needs {name}.")
        for name in (TARGETS, *rule.needs)
        if name not in datum.inputs
    ]
    for name in datum.inputs:
        if name not in (TARGETS, *rule.needs, *rule.takes):
            text = f"{loss_fn} does not take {name!r} here: leave it out."
            wrong.append(Detail(f"{where}.{name}", "not_supported", text))
    raise_all(wrong)


def _check_tokens(tokens: array[int], limits: Limits, where: str) -> None:
    if not tokens:
        raise SignalError("validation_error", "It has no token.", param=where)
    if len(tokens) > limits.context_length:
        raise SignalError(
            "sequence_too_long",
            f"It has {len(tokens):,} tokens; the model's context is {limits.context_length:,}.",
            param=where,
        )
    check_ids(tokens, limits.vocab_size, where)


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises SignalError token_out_of_range."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        value = next(one for one in ids if not 0 <= one < vocab_size)
        text = f"Token id {value} is outside the model's vocabulary (0 to {vocab_size - 1})."
        raise SignalError("token_out_of_range", text, param=where)


def _targets(
    tensor: Tensor, count: int, rule: Rule, limits: Limits, where: str
) -> tuple[array[int], int]:
    if not tensor.whole:
        raise SignalError("validation_error", "Its dtype must be int64.", param=where)
    width = tensor.shape[1] if len(tensor.shape) == 2 else 1
    if (
        tensor.shape[0] != count
        or not 1 <= width <= 128
        or (len(tensor.shape) > 1 and not rule.wide)
    ):
        shape = "[N] or [N, K], K at most 128" if rule.wide else "[N]"
        text = f"Its shape is {list(tensor.shape)}; {shape} is needed, N the {count} tokens."
        raise SignalError("validation_error", text, param=where)
    ids: Any = tensor.data
    check_ids(ids, limits.vocab_size, where)
    return array("i", ids), width


def _floats(tensor: Tensor, shape: tuple[int, ...], where: str) -> array[float]:
    if tensor.whole:
        raise SignalError("validation_error", "Its dtype must be float32.", param=where)
    if tensor.shape != shape:
        text = f"Its shape is {list(tensor.shape)}; {list(shape)} is needed."
        raise SignalError("validation_error", text, param=where)
    numbers: Any = tensor.data
    if not all(map(isfinite, numbers)):
        raise SignalError("validation_error", "A number is not finite.", param=where)
    return numbers  # type: ignore[no-any-return]


def _sampled(weights: array[float], arrays: Sequence[array[float]]) -> array[float]:
    """The weights, 0 where every one of the arrays is."""
    return array(
        "f",
        [
            weight if any(numbers) else 0.0
            for weight, *numbers in zip(weights, *arrays, strict=True)
        ],
    )
