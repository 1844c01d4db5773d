"""What a loss is to those who do not compute it: its name, its options, the rows that it takes.

Torch-free, so that the web tier refuses what a loss cannot take before anything is queued. The
computation is named by `implementation` and imported by the engine alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import Detail

Options = Mapping[str, Any]
SEQUENCES = ("text", "messages", "tokens")


@dataclass(frozen=True)
class Option:
    """One option of a loss; `default` None stands for what `meaning` says.

    `kind` is float, int, bool or str. `goes_with` names what the rows must have for the option to do
    anything: a form ("group") or an array ("values").
    """

    name: str
    default: float | int | bool | str | None
    meaning: str
    origin: str = "TRL"
    kind: type = float
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()
    goes_with: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None when nothing is."""
        if value is None and self.default is None:
            return None
        if self.kind is str:
            return None if value in self.choices else f"One of {', '.join(self.choices)} is needed."
        if self.kind is bool:
            return None if isinstance(value, bool) else "true or false is needed."
        if self.kind is int and type(value) is not int:
            return "An integer is needed."
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "A number is needed."
        return None if self._within(value) else f"A finite number {self.range} is needed."

    @property
    def range(self) -> str:
        """The bounds in words."""
        words = []
        if self.above > -math.inf:
            words.append(f"above {self.above:g}")
        if self.at_least > -math.inf:
            words.append(f"of at least {self.at_least:g}")
        if self.at_most < math.inf:
            words.append(f"at most {self.at_most:g}")
        if self.below < math.inf:
            words.append(f"below {self.below:g}")
        return " and ".join(words)

    def _within(self, value: float) -> bool:
        # float() of a long integer overflows; float32 is what the worker may compute in.
        if not -3.4e38 <= value <= 3.4e38:
            return False
        return self.at_least <= value <= self.at_most and self.above < value < self.below


@dataclass(frozen=True)
class LossSpec:
    """A loss by its data alone.

    `divided_by` says what the sum is divided by when a step is taken, in words. `implementation` is
    "module:NAME" of a `workers.engine.losses.Loss`. `forms` are those of `schemas.examples.FORMS`; `needs`
    are fields that every row must give (the advantages of a response come from its reward), `takes` fields
    that every row of a batch gives or none. `metrics` maps the names of a result's numbers to meanings.

    `signed_weights`: weights may be negative. `empty_rows`: a row in which nothing counts is no mistake.
    `wide`: K targets per position are allowed. `mismatched`: each row comes with a copy whose response is
    another row's, from which a statistic of the batch is computed. `check(options)` names options
    that contradict each other.
    """

    name: str
    summary: str
    formula: str
    source: str
    divided_by: str
    implementation: str
    forms: tuple[str, ...]
    options: tuple[Option, ...] = ()
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    signed_weights: bool = False
    empty_rows: bool = False
    wide: bool = False
    mismatched: bool = False
    check: Callable[[Options], Iterator[tuple[str, str]]] | None = None

    def option(self, name: str) -> Option | None:
        """The option of that name."""
        return next((option for option in self.options if option.name == name), None)

    def resolved(self, options: Options) -> dict[str, Any]:
        """Every option, the defaults filled in: numbers as floats, so that 1 and 1.0 are one request."""
        return {
            option.name: _value(option, options.get(option.name, option.default))
            for option in self.options
        }

    def problems(self, options: Options, param: str = "loss_kwargs") -> list[Detail]:
        """What is wrong with the options that a request gives, each under `param`.NAME."""
        found = []
        for name, value in options.items():
            option = self.option(name)
            if option is None:
                found.append(Detail(f"{param}.{name}", "unknown_option", self._unknown(name)))
            elif (problem := option.problem(value)) is not None:
                found.append(Detail(f"{param}.{name}", "validation_error", problem))
        if not found and self.check is not None:
            found = [
                Detail(f"{param}.{name}", "validation_error", problem)
                for name, problem in self.check(self.resolved(options))
            ]
        return found

    def _unknown(self, name: str) -> str:
        own = ", ".join(option.name for option in self.options)
        return f"{self.name} has no option {name!r}; it has {own or 'none'}."


def _value(option: Option, value: Any) -> Any:
    return float(value) if option.kind is float and value is not None else value
