"""Writes docs/losses.md from the one table of losses, `schemas.losses`.

`make docs-losses` runs it; with `--check` it only says whether the page is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from schemas.examples import FORMS
from schemas.losses import BUILT_IN, LossSpec, Option

PAGE = Path(__file__).resolve().parent.parent / "docs" / "losses.md"
HEAD = """# Losses

Generated from `schemas/losses/` by `make docs-losses`; edit that, not this page.

```python
from rewardsignal import SignalClient

run = SignalClient().create_run("smollm2", lora_r=8)
batch = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}]
print(run.forward_backward(batch, "dpo", beta=0.1).metrics)
run.complete(save=False)
```

`loss_fn` names a loss, `loss_kwargs` holds its options; an option that a loss does not have is refused by
name, and so is a row that it does not take. Every loss is a sum in nats of log-probabilities `lp` at the
counted positions; `w` are a row's weights, `q` its `logprobs` (the sampler's), `ref` the reference's, `A`
its advantages, `n` the number of tokens of a response; `c` and `r` stand for the chosen and the rejected
one.

Gradients add up over calls until `optim_step`, which divides the sum by what the table says, counted over
all of those calls. So splitting a batch over calls changes nothing but rounding, and losses with different
divisors cannot share an accumulation (`mixed_reductions`). Two things are of one call by their definition:
`kto`'s z, and what `loss_type` `bnpo` and `scale_rewards` `batch` divide by.

The reference is the base model with the adapter off, unless the rows give its log-probabilities.

"""
ROWS = """## Rows

A batch has rows of one form; texts, messages and tokens may be mixed.

| form | fields | what is counted |
|---|---|---|
"""
COUNTED = {
    "text": "every token after the first",
    "messages": "the assistant's turns, with the token that ends a turn",
    "tokens": (
        "`targets` (left out: the next token), by `weights`. Left out, those are 1, but 0 where `logprobs` "
        "and `advantages` are both 0"
    ),
    "preference": "both responses, never the prompt: two rows, which are a unit",
    "group": (
        "the responses, never the prompt. Each is an object of `text` or `tokens`, `reward`, and with tokens "
        "`logprobs`, `ref_logprobs`; the advantages are the rewards relative to the group's. 2 to 64 "
        "responses (`SIGNAL_MAX_GROUP`)"
    ),
    "response": (
        "the response, never the prompt. The advantage of each token is `reward`, discounted by `gamma`; "
        "with `values`, generalized advantage estimation"
    ),
}
TEXTS = """
`prompt`, `chosen`, `rejected` and `response` are each a text, a list of messages or a list of token ids. A
prompt has the ids that `sample` gives it, so the boundary is exact. A text that answers messages is the
assistant's next turn; a text that answers a text ends with the end-of-text token, unless it has it; token
ids are taken as they are. What a response's tokens come with (`logprobs`, `values`, …) goes with token ids
only.
"""


def page() -> str:
    """The page's text."""
    forms = "".join(_form(name) for name in FORMS)
    losses = "\n".join("\n".join(_section(spec)) for spec in BUILT_IN.values())
    return f"{HEAD}{_overview()}\n{ROWS}{forms}{TEXTS}\n{losses}\n"


def _overview() -> str:
    lines = ["| loss | rows | sum divided by | options |", "|---|---|---|---|"]
    for spec in BUILT_IN.values():
        options = ", ".join(f"`{option.name}`" for option in spec.options) or "none"
        link = f"[`{spec.name}`](#{spec.name})"
        lines.append(f"| {link} | {', '.join(spec.forms)} | {spec.divided_by} | {options} |")
    return "\n".join(lines) + "\n"


def _form(name: str) -> str:
    needed, allowed = FORMS[name]
    fields = " + ".join(f"`{field}`" for field in needed)
    if allowed:
        fields += "; " + ", ".join(f"`{field}`" for field in allowed)
    return f"| {name} | {fields} | {COUNTED[name]} |\n"


def _section(spec: LossSpec) -> Iterator[str]:
    yield f"## {spec.name}"
    yield ""
    yield spec.summary
    yield ""
    yield f"- Formula: {spec.formula}"
    yield f"- The sum is divided by: {spec.divided_by}"
    yield f"- Source: {spec.source}"
    yield f"- Rows: {', '.join(spec.forms)}{_fields(spec)}"
    yield ""
    if spec.options:
        yield "| option | default | allowed | name from | meaning |"
        yield "|---|---|---|---|---|"
        yield from (_option(option) for option in spec.options)
        yield ""
    if spec.metrics:
        yield "| metric | meaning |"
        yield "|---|---|"
        yield from (f"| `{name}` | {meaning} |" for name, meaning in spec.metrics.items())
        yield ""


def _fields(spec: LossSpec) -> str:
    parts = []
    if spec.needs:
        parts.append("every row needs " + ", ".join(f"`{name}`" for name in spec.needs))
    if spec.takes:
        parts.append("all rows or none give " + ", ".join(f"`{name}`" for name in spec.takes))
    if spec.wide:
        parts.append("K targets per position are allowed")
    return "".join(f"; {part}" for part in parts)


def _option(option: Option) -> str:
    default = "left out" if option.default is None else f"`{option.default}`".lower()
    allowed = ", ".join(f"`{choice}`" for choice in option.choices) or option.range or "any number"
    if option.kind is bool:
        allowed = "`true`, `false`"
    return f"| `{option.name}` | {default} | {allowed} | {option.origin} | {option.meaning} |"


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` compares it."""
    if arguments == ["--check"]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
