"""Rewards that can be checked, for `signal train grpo`. Pure but for loading one of the user's own.

A reward is a function of the sampled text and of its row, which has `prompt`, `answer` and whatever else
the file says; it returns a number.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Reward = Callable[[str, Mapping[str, Any]], float]

# A minus between two numbers is none of the second's.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def number(text: str, row: Mapping[str, Any]) -> float:
    """1 when the last number of the text is the last number of the answer, else 0."""
    said, wanted = last_number(text), last_number(str(row["answer"]))
    return float(said is not None and said == wanted)


def exact(text: str, row: Mapping[str, Any]) -> float:
    """1 when the text is the answer, but for spaces around it, else 0."""
    return float(text.strip() == str(row["answer"]).strip())


def last_number(text: str) -> float | None:
    """The last number in a text, whose thousands may be parted by commas; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


BUILT_IN: Mapping[str, Reward] = {"number": number, "exact": exact}


def load(name: str) -> Reward:
    """A built-in reward, or `module:function`, looked for in the working directory too.

    Raises ValueError that says what is wrong with the name.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, function = name.partition(":")
    if not separator or not module or not function:
        raise ValueError(f"{name!r} is neither {', '.join(BUILT_IN)} nor module:function.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported: {error}") from error
    except AttributeError:
        raise ValueError(f"{module} has no {function}.") from None
    if not callable(found):
        raise ValueError(f"{name} is no function.")
    return _checked(found, name)


def _checked(reward: Reward, name: str) -> Reward:
    def checked(text: str, row: Mapping[str, Any]) -> float:
        value = reward(text, row)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"The reward {name} gave {value!r}, which is no number.") from None

    return checked
