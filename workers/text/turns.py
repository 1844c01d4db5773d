"""Where the assistant's turns are in a rendered conversation, to the character.

A turn begins where the conversation before it, rendered with the generation prompt, ends: that is the
text a sampler continues. Pure: renders and compares strings.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from schemas.errors import SignalError
from workers.text.chat import Message
from workers.text.tokenizer import Tokenizer

Span = tuple[int, int]


def assistant_spans(
    messages: Sequence[Message], tokenizer: Tokenizer, *, param: str
) -> tuple[str, list[Span]]:
    """The whole conversation as text, and [start, end) of each assistant turn in it.

    A turn holds the assistant's words and the token that ends the turn, not the template's white space
    after that token. Raises SignalError("chat_template_not_prefix_stable") when the template renders
    what goes before a turn differently once the turn, or a later one, is there.
    """
    full = tokenizer.apply_chat_template(messages, False, param=param)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render_before(messages, index, tokenizer, param)
        if index + 1 == len(messages):
            through = full
        else:
            through = tokenizer.apply_chat_template(messages[: index + 1], False, param=param)
        if not through.startswith(before):
            raise _unstable(index, param)
        if not full.startswith(through):
            raise _rewritten(index, param)
        spans.append((len(before), _end_of_turn(through, len(before), tokenizer.end_marks)))
    return full, spans


def span_weights(offsets: Sequence[Span], spans: Iterable[Span]) -> array[float]:
    """1 for each token that holds a character of a span, by the tokens' `offsets`, else 0.

    A token that also holds characters of the template before the span counts: the words cannot be
    learnt without it.
    """
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    weights = array("f", bytes(4 * len(offsets)))
    for start, end in spans:
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        weights[first:stop] = array("f", [1.0]) * (stop - first)
    return weights


def _render_before(
    messages: Sequence[Message], index: int, tokenizer: Tokenizer, param: str
) -> str:
    try:
        return tokenizer.apply_chat_template(messages[:index], True, param=param)
    except SignalError:
        # Most templates look at the first message and fail on an empty conversation.
        if index == 0:
            raise _unstable(index, param) from None
        raise


def _end_of_turn(through: str, start: int, end_marks: tuple[str, ...]) -> int:
    """End of the turn's last token that counts.

    Without a token that ends the turn, the white space after the words is the only end there is, and
    the model must learn it.
    """
    turn = through[start:].rstrip()
    return start + len(turn) if turn.endswith(end_marks) else len(through)


def _unstable(index: int, param: str) -> SignalError:
    if index == 0:
        reason = (
            "The model's chat template cannot place an assistant turn at the start of a conversation: "
            "put a system or user message before it."
        )
    else:
        reason = (
            f"The model's chat template does not continue its own generation prompt at messages.{index}, so "
            "the assistant's tokens cannot be told apart exactly. Send the row as tokens with weights: "
            "apply_chat_template gives the ids."
        )
    return SignalError("chat_template_not_prefix_stable", reason, param=f"{param}.{index}")


def _rewritten(index: int, param: str) -> SignalError:
    return SignalError(
        "chat_template_not_prefix_stable",
        f"The model's chat template renders the turns up to messages.{index} differently when more turns "
        "follow, as templates of reasoning models do, so the assistant's tokens cannot be told apart "
        "exactly. Send rows that end with their only assistant turn, or tokens with weights: "
        "apply_chat_template gives the ids.",
        param=f"{param}.{index}",
    )
