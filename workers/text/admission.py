"""Whether a batch is what its loss takes: form by form and field by field, before anything is tokenized.

Pure. Every wrong field is named, not the first alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from schemas.errors import Detail
from schemas.examples import FORMS, form_of
from schemas.losses import LossSpec, Options
from schemas.losses.spec import SEQUENCES
from workers.text.examples import ARRAYS

Example = Mapping[str, Any]
# Fields of an example that only some losses use.
_OF_LOSSES = (*ARRAYS, "margin", "ref_chosen_logps", "ref_rejected_logps", "reward", "label")
# What a response's advantages come from.
_REWARD = "reward"


def problems(
    examples: Sequence[Example], loss: LossSpec, max_group: int, param: str
) -> list[Detail]:
    """What is wrong with the examples for this loss, each field under `param`.INDEX."""
    found = [*_forms(examples, loss, param)]
    if not found:
        for index, example in enumerate(examples):
            found += _fields(example, loss, max_group, f"{param}.{index}")
        found += _shared(examples, loss, param)
    if loss.mismatched and len(examples) < 2:
        reason = (
            f"{loss.name} compares each prompt with another row's response: send 2 rows or more."
        )
        found.append(Detail(param, "validation_error", reason))
    return found


def idle_options(
    examples: Sequence[Example], loss: LossSpec, options: Options, param: str
) -> Iterator[Detail]:
    """Options that a request gives and that its rows leave without effect, each under `param`.NAME."""
    present = {form_of(example) for example in examples}
    present |= {name for example in examples for name in ARRAYS if name in example}
    for name, value in options.items():
        option = loss.option(name)
        if option is None or value == option.default or set(option.goes_with) <= present:
            continue
        reason = f"Does nothing without rows that have {' and '.join(option.goes_with)}."
        yield Detail(f"{param}.{name}", "validation_error", reason)


def _forms(examples: Sequence[Example], loss: LossSpec, param: str) -> Iterator[Detail]:
    taken_forms = (form_of(example) for example in examples)
    first = next((form for form in taken_forms if form in loss.forms), None)
    for index, example in enumerate(examples):
        form = form_of(example) or ""
        where = (
            f"{param}.{index}.{next((name for name in FORMS[form][0] if name != 'prompt'), form)}"
        )
        if form not in loss.forms:
            taken = ", ".join(" + ".join(FORMS[name][0]) for name in loss.forms)
            reason = f"{loss.name} does not take rows of this form; it takes {taken}."
            yield Detail(where, "validation_error", reason)
        elif form != first and not {form, first} <= set(SEQUENCES):
            reason = f"The rows before it are of the form {first}: a batch has one form."
            yield Detail(where, "validation_error", reason)


def _fields(example: Example, loss: LossSpec, max_group: int, where: str) -> Iterator[Detail]:
    form = form_of(example)
    if form == "group":
        yield from _group(example["responses"], loss, max_group, f"{where}.responses")
        return
    needed = _needed(loss, form)
    for name in needed:
        if name not in example:
            yield Detail(f"{where}.{name}", "validation_error", f"{loss.name} needs {name}.")
    for name in _OF_LOSSES:
        if name in example and name not in needed and name not in loss.takes:
            reason = f"{loss.name} does not use it: leave it out."
            yield Detail(f"{where}.{name}", "validation_error", reason)
    if form == "tokens":
        yield from _tokens(example, loss, where)
    yield from _together(example, loss, ("ref_chosen_logps", "ref_rejected_logps"), where)


def _needed(loss: LossSpec, form: str | None) -> tuple[str, ...]:
    if form == "tokens":
        return loss.needs
    return tuple(_REWARD if name == "advantages" else name for name in loss.needs)


def _tokens(example: Example, loss: LossSpec, where: str) -> Iterator[Detail]:
    if not loss.wide and isinstance(example.get("targets", [0])[0], list):
        reason = f"{loss.name} takes one target per position."
        yield Detail(f"{where}.targets", "validation_error", reason)
    weights = example.get("weights", (0,))
    if not loss.signed_weights and not isinstance(weights[0], list) and min(weights) < 0:
        index = next(index for index, weight in enumerate(weights) if weight < 0)
        reason = f"{loss.name} is a mean: its weights must be 0 or more."
        yield Detail(f"{where}.weights.{index}", "validation_error", reason)
    yield from _together(example, loss, ("values", "returns"), where)


def _together(
    example: Example, loss: LossSpec, names: tuple[str, str], where: str
) -> Iterator[Detail]:
    for name, other in (names, names[::-1]):
        if name in example and name in loss.takes and other not in example:
            yield Detail(f"{where}.{other}", "validation_error", f"Goes together with {name}.")


def _group(
    responses: Sequence[Example], loss: LossSpec, max_group: int, where: str
) -> Iterator[Detail]:
    reason = {
        0: "The group is empty: give 2 or more responses with their rewards.",
        1: "A group of one has nothing to be compared with: give 2 or more responses.",
    }.get(len(responses))
    if len(responses) > max_group:
        reason = f"The group has {len(responses)} responses; this server takes at most {max_group}."
    if reason is not None:
        yield Detail(where, "validation_error", reason)
    for place, response in enumerate(responses):
        for name in ("logprobs", "ref_logprobs"):
            if name in loss.needs and name not in response:
                reason = f"{loss.name} needs {name}, beside the tokens that were sampled."
                yield Detail(f"{where}.{place}.{name}", "validation_error", reason)
            if name in response and name not in (*loss.needs, *loss.takes):
                reason = f"{loss.name} does not use it: leave it out."
                yield Detail(f"{where}.{place}.{name}", "validation_error", reason)


def _shared(examples: Sequence[Example], loss: LossSpec, param: str) -> Iterator[Detail]:
    """What is given by some rows must be given by all: a loss of half a batch would be another loss."""
    rows = list(_rows(examples, param))
    for name in loss.takes:
        # The returns of a response follow from its values.
        given = [name in row for _, row in rows]
        if any(given) and not all(given):
            for (where, row), has in zip(rows, given, strict=True):
                if not has and not (name == "returns" and "response" in row):
                    reason = "Other rows of the batch give it: give it for all or for none."
                    yield Detail(f"{where}.{name}", "validation_error", reason)


def _rows(examples: Sequence[Example], param: str) -> Iterator[tuple[str, Example]]:
    for index, example in enumerate(examples):
        if form_of(example) == "group":
            for place, response in enumerate(example["responses"]):
                yield f"{param}.{index}.responses.{place}", response
        else:
            yield f"{param}.{index}", example
