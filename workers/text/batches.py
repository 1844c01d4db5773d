"""A batch of examples as the rows that its loss is computed on: the one place where forms become rows.

Pure. Tokenizes, finds prompt boundaries, turns rewards into advantages, and makes the rows that a
statistic of the batch needs. Everything wrong with a batch is named in one error.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from schemas.errors import Detail, SignalError, raise_all
from schemas.examples import FORMS, form_of
from schemas.losses import BUILT_IN, LossSpec, Options
from workers.text import admission
from workers.text.examples import Model, sequence_row
from workers.text.responses import Answered, answered, answered_row, prompt_ids
from workers.text.rewards import discounted, generalized_advantages, group_advantages
from workers.text.rows import Row
from workers.text.tokenizer import Tokenizer

Example = Mapping[str, Any]
MAX_GROUP = 64
# Stands for no loss: every form is taken, and nothing need be counted.
_FORWARD = replace(BUILT_IN["custom"], name="forward", forms=tuple(FORMS))


@dataclass(frozen=True)
class _Batch:
    """What the makers of rows share: the model, the loss with its options, the advantages of groups by the
    example's number, and the responses made so far of examples with one."""

    model: Model
    loss: LossSpec
    options: Options
    advantages: Mapping[int, Sequence[float]]
    responses: list[Answered] = field(default_factory=list)


def compile_batch(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    vocab_size: int,
    loss: LossSpec = BUILT_IN["causal_lm"],
    options: Options | None = None,
    max_group: int = MAX_GROUP,
    param: str = "batch_data",
    options_param: str = "loss_kwargs",
) -> list[Row]:
    """The rows of examples that `schemas.examples.TrainingExample` has accepted, in their order.

    A preference gives two rows, the chosen one first; a group one per response; a response, where the
    loss asks for mismatched rows, a further one after all others that is not trained. Raises one
    SignalError that names every wrong field as `param`.INDEX.FIELD, and as `options_param`.NAME those of
    `options` (the ones that the request gives) that these rows leave without effect.
    """
    details = admission.problems(examples, loss, max_group, param)
    details += admission.idle_options(examples, loss, options or {}, options_param)
    raise_all(details)
    model = Model(tokenizer, max_length, vocab_size)
    resolved = loss.resolved(options or {})
    batch = _Batch(model, loss, resolved, _group_advantages(examples, resolved))
    rows = _made(batch, examples, param)
    if loss.mismatched:
        rows += _mismatched(batch)
    return rows


def compile_forward(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    vocab_size: int,
    prompt_logprobs: bool = False,
    param: str = "batch_data",
) -> list[Row]:
    """Rows of any form whose weights are 1 where a log-probability is wanted and 0 elsewhere.

    Wanted are the positions that a loss would count, or with `prompt_logprobs` every position that has a
    target. Raises as `compile_batch`.
    """
    batch = _Batch(
        Model(tokenizer, max_length, vocab_size), _FORWARD, {}, _group_advantages(examples, {})
    )
    wanted = []
    for row in _made(batch, examples, param):
        weights = array("f", [float(weight != 0) for weight in row.weights])
        if prompt_logprobs:
            weights = array("f", [1.0]) * len(weights)
            if "targets" not in examples[row.example] and "tokens" in examples[row.example]:
                # The place after the last token, which has no target.
                weights[-1] = 0.0
        wanted.append(Row(row.tokens, row.targets, weights, example=row.example))
    return wanted


def _made(batch: _Batch, examples: Sequence[Example], param: str) -> list[Row]:
    """The rows of all examples; what is wrong with any of them is raised together."""
    rows: list[Row] = []
    wrong: list[Detail] = []
    for index, example in enumerate(examples):
        try:
            rows += _MAKERS[form_of(example) or ""](batch, example, index, f"{param}.{index}")
        except SignalError as error:
            wrong += error.details or [Detail(error.param, error.code, error.message)]
    raise_all(wrong)
    return rows


def _group_advantages(examples: Sequence[Example], options: Options) -> dict[int, Sequence[float]]:
    groups = {i: one["responses"] for i, one in enumerate(examples) if "responses" in one}
    groups = {i: responses for i, responses in groups.items() if responses}
    rewards = [[one["reward"] for one in responses] for responses in groups.values()]
    found = group_advantages(rewards, options.get("scale_rewards", "group"))
    return dict(zip(groups, found, strict=True))


def _sequence(batch: _Batch, example: Example, index: int, param: str) -> Iterator[Row]:
    empty_rows = batch.loss.empty_rows
    yield sequence_row(example, batch.model, param, number=index, empty_rows=empty_rows)


def _preference(batch: _Batch, example: Example, index: int, param: str) -> Iterator[Row]:
    names = ("chosen", "rejected")
    answers = _answers(batch, example, {name: example[name] for name in names}, param)
    for name, found in zip(names, answers, strict=True):
        values = {"chosen": float(name == "chosen")}
        if "margin" in example:
            values["margin"] = example["margin"]
        if f"ref_{name}_logps" in example:
            values["ref_logps"] = example[f"ref_{name}_logps"]
        yield answered_row(found, {}, values, number=index)


def _group(batch: _Batch, example: Example, index: int, param: str) -> Iterator[Row]:
    responses = example["responses"]
    if not responses:
        raise SignalError("validation_error", "The group is empty.", param=f"{param}.responses")
    contents = {}
    for place, response in enumerate(responses):
        name = "text" if "text" in response else "tokens"
        contents[f"responses.{place}.{name}"] = response[name]
    answers = _answers(batch, example, contents, param)
    equal = float(len({response["reward"] for response in responses}) == 1)
    for response, found, advantage in zip(responses, answers, batch.advantages[index], strict=True):
        arrays = _given(response) | {"advantages": [advantage] * len(found.response)}
        values = {"reward": response["reward"], "zero_std": equal}
        yield answered_row(found, arrays, values, number=index)


def _response(batch: _Batch, example: Example, index: int, param: str) -> Iterator[Row]:
    (found,) = _answers(batch, example, {"response": example["response"]}, param)
    batch.responses.append(found)
    arrays, values = _given(example), {}
    if "label" in example:
        values["label"] = float(example["label"])
    if "reward" in example:
        values["reward"] = example["reward"]
        arrays |= _credited(batch.options, arrays, example["reward"], len(found.response))
    yield answered_row(found, arrays, values, number=index)


def _credited(
    options: Options, arrays: Mapping[str, Sequence[float]], reward: float, length: int
) -> dict[str, Sequence[float]]:
    """Advantages of a response's tokens, and the returns where it comes with a critic's values."""
    gamma, values = options.get("gamma", 1.0), arrays.get("values")
    if values is None:
        return {"advantages": discounted(reward, length, gamma)}
    advantages = generalized_advantages(reward, values, gamma, options.get("lam", 1.0))
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    return {"advantages": advantages, "returns": returns}


def _mismatched(batch: _Batch) -> Iterator[Row]:
    """Each prompt with the response of the example before it, as far as that fits."""
    for index, own in enumerate(batch.responses):
        other = batch.responses[index - 1]
        room = batch.model.max_length - len(own.prompt)
        mixed = Answered(own.prompt, other.response[:room], other.counted[:room])
        yield answered_row(mixed, {}, {}, number=index, trained=False)


def _answers(
    batch: _Batch, example: Example, contents: Mapping[str, Any], param: str
) -> list[Answered]:
    """The responses `contents`, by their fields, to an example's prompt; every wrong one is named."""
    prompt, model = example["prompt"], batch.model
    ids = prompt_ids(prompt, model, f"{param}.prompt")
    found, wrong = [], []
    for name, content in contents.items():
        try:
            found.append(answered(prompt, ids, content, model, f"{param}.{name}"))
        except SignalError as error:
            wrong.append(Detail(error.param, error.code, error.message))
    raise_all(wrong)
    return found


def _given(source: Example) -> dict[str, Sequence[float]]:
    names = ("logprobs", "ref_logprobs", "values")
    return {name: source[name] for name in names if name in source}


_MAKERS: dict[str, Callable[[_Batch, Example, int, str], Iterator[Row]]] = {
    "text": _sequence,
    "messages": _sequence,
    "tokens": _sequence,
    "preference": _preference,
    "group": _group,
    "response": _response,
}
