"""Readers of the JSONL files that people have, as datasets of the rows that the server takes."""

from __future__ import annotations

from rewardsignal.data._dataset import Dataset
from rewardsignal.data._lines import JsonLines, Source
from rewardsignal.data._rows import (
    Extra,
    Row,
    answer_row,
    chat_row,
    check_extra,
    object_row,
    preference_row,
)


def read_chat(source: Source, *, extra: Extra = "refuse") -> Dataset[Row]:
    """Conversations: each line `{"messages": [{"role": …, "content": …}, …]}` or that list alone.

    `source` is a path (plain or gzip) or an open file, which can be read once. Lines are read as the
    dataset is iterated; blank ones are passed over. Rows are `{"messages": …}`, ready for
    `forward_backward`. `extra` says what becomes of further fields of a row or a message: "refuse" (they
    may have been meant to matter), "drop", or "keep". Iterating raises DataError with file, line and
    field at a line that is no conversation, or that has no turn of the assistant.
    """
    check_extra(extra)
    return Dataset(JsonLines(source, lambda value: chat_row(value, extra)))


def read_preferences(source: Source, *, extra: Extra = "refuse") -> Dataset[Row]:
    """Preferences: each line `{"prompt": …, "chosen": …, "rejected": …}`, ready for the loss `dpo`.

    Each of the three is a text, a list of messages or a list of token ids. `prompt` may be left out when
    the other two are whole conversations: what they begin with in common becomes the prompt. `margin`,
    `ref_chosen_logps` and `ref_rejected_logps` (nats) are kept. All else is as in `read_chat`.
    """
    check_extra(extra)
    return Dataset(JsonLines(source, lambda value: preference_row(value, extra)))


def read_answers(source: Source, *, extra: Extra = "keep") -> Dataset[Row]:
    """Questions with known answers: each line `{"prompt": …, "answer": …}`, for rewards that can be checked.

    `prompt` is what `sample` takes (a text, messages or token ids), `answer` a text or a number. These rows
    are for the reward function, so further fields are kept unless told otherwise. All else is as in
    `read_chat`.
    """
    check_extra(extra)
    return Dataset(JsonLines(source, lambda value: answer_row(value, extra)))


def read_jsonl(source: Source) -> Dataset[Row]:
    """Any JSON objects, one a line; what is in them is not checked. All else is as in `read_chat`."""
    return Dataset(JsonLines(source, object_row))
