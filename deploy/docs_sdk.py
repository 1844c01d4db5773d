"""Writes docs/reference/sdk.md from the docstrings of `rewardsignal`: `make docs-reference`.

With `--check` it only says whether the page is up to date.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rewardsignal
from rewardsignal import data

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "sdk.md"
SOURCES = Path(rewardsignal.__file__).parent
HEAD = """# The SDK, call by call

Generated from the docstrings of `rewardsignal` by `make docs-reference`; edit those, not this page. The
awaitable twins of `SignalClient` and `SignalRun` have the same calls with the same arguments.
"""
# By what somebody looks for. The asynchronous classes are listed by what is different in them.
CLASSES = (
    "SignalClient",
    "SignalRun",
    "APIFuture",
    "FutureGroup",
    "Pipeline",
    "TrainingClient",
    "InferenceClient",
    "SampleStream",
    "StreamToken",
    "Tokenizer",
    "AsyncSignalClient",
    "AsyncSignalRun",
)
RESULTS = (
    "ForwardBackwardResult",
    "OptimStepResult",
    "ForwardResult",
    "ForwardRow",
    "SampleResult",
    "Sample",
    "SaveStateResult",
    "LoadStateResult",
    "Certificate",
    "Run",
    "Future",
    "Artifact",
    "RunMetrics",
    "MetricRow",
    "RunEvent",
    "Timings",
)
OPTIONS = ("RunOptions", "OptimStepOptions", "SampleOptions")
# Calls that read better on the twin than their signature's awaitable.
_SAME = frozenset(("AsyncSignalClient", "AsyncSignalRun"))
_MADE_BY_USERS = frozenset(("SignalClient", "AsyncSignalClient", "FutureGroup"))


def page() -> str:
    """The page's text."""
    lines = [HEAD]
    for name in CLASSES:
        lines += _class(name, getattr(rewardsignal, name))
    lines += ["\n## Functions\n"]
    lines += _functions(rewardsignal, ("wait_all", "as_completed"))
    lines += ["\n## Data: `rewardsignal.data`\n", f"{_words(data)}\n"]
    lines += _module(data)
    lines += ["\n## Options\n"]
    lines += [line for name in OPTIONS for line in _fields(name)]
    lines += ["\n## Results\n", "Frozen records that also index as dicts.\n"]
    lines += [line for name in RESULTS for line in _fields(name)]
    lines += ["\n## Errors\n", "```text", *_tree(rewardsignal.SignalAPIError), "```\n"]
    return "\n".join(lines).rstrip() + "\n"


def _class(name: str, found: type) -> Iterator[str]:
    yield f"\n## {name}\n"
    if name in _MADE_BY_USERS:
        yield f"`{name}{_signature(found.__init__)}`\n"
    yield f"{_words(found)}\n"
    for call, value in inspect.getmembers(found):
        if call.startswith("_") or not _is_ours(value):
            continue
        if name in _SAME and _is_twin(call):
            continue
        if isinstance(value, property):
            yield _item(call, _words(value))
        else:
            yield _item(call + _signature(value), _words(value))


def _is_twin(call: str) -> bool:
    both = (rewardsignal.SignalClient, rewardsignal.SignalRun)
    return any(hasattr(one, call) for one in both) and call not in ("submit", "pipeline", "close")


def _is_ours(value: Any) -> bool:
    function = value.fget if isinstance(value, property) else inspect.unwrap(value)
    return getattr(function, "__module__", "").startswith("rewardsignal") and callable(function)


def _functions(module: Any, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        function = getattr(module, name)
        yield _item(name + _signature(function), _words(function))


def _module(module: Any) -> Iterator[str]:
    members = {name: getattr(module, name) for name in module.__all__}
    # What stands below a class's heading would read as its own.
    for name, found in sorted(members.items(), key=lambda one: inspect.isclass(one[1])):
        if inspect.isclass(found):
            yield f"\n### {name}\n"
            yield f"`{name}{_signature(found.__init__)}`\n"
            yield f"{_words(found)}\n"
            for call, value in vars(found).items():
                if not call.startswith("_") and (callable(value) or isinstance(value, property)):
                    signature = "" if isinstance(value, property) else _signature(value)
                    yield _item(call + signature, _words(value))
        elif callable(found):
            yield _item(name + _signature(found), _words(found))


def _fields(name: str) -> Iterator[str]:
    """A record or the options of a call, with what stands below each field in the source."""
    tree = ast.parse((SOURCES / "_schemas.py").read_text(encoding="utf-8"))
    found = next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name)
    yield f"\n### {name}\n"
    yield f"{_one_line(ast.get_docstring(found) or '')}\n"
    yield "| field | type | |"
    yield "|---|---|---|"
    for index, node in enumerate(found.body):
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target).startswith("_"):
            continue
        after = found.body[index + 1] if index + 1 < len(found.body) else None
        told = _one_line(_text(after))
        kind = ast.unparse(node.annotation).replace("|", "\\|")
        yield f"| `{ast.unparse(node.target)}` | `{kind}` | {told} |"


def _text(node: ast.AST | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _tree(kind: type[Exception], before: str = "") -> Iterator[str]:
    yield f"{before}{kind.__name__}: {_one_line(inspect.getdoc(kind) or '')}"
    for below in sorted(kind.__subclasses__(), key=lambda one: one.__name__):
        if below.__bases__[0] is kind:
            yield from _tree(below, before + "    ")


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    given, starred = [], False
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not starred:
            given.append("*")
        starred |= one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        if one.name != "self":
            given.append(_parameter(one))
    returns = signature.return_annotation
    told = "" if returns in (signature.empty, "None") else f" -> {returns}"
    return f"({', '.join(given)}){told}"


def _parameter(one: inspect.Parameter) -> str:
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    kind = "" if one.annotation is one.empty else f": {one.annotation}"
    return f"{stars}{one.name}{kind}" + ("" if one.default is one.empty else f" = {one.default!r}")


def _words(found: Any) -> str:
    """The docstring; each paragraph in a line, examples as code."""
    doc = inspect.getdoc(found.fget if isinstance(found, property) else found) or ""
    parts: list[str] = []
    for part in doc.split("\n\n"):
        if part.startswith("    ") and parts and parts[-1].startswith("    "):
            parts[-1] += f"\n\n{part}"
        else:
            parts.append(part)
    return "\n\n".join(map(_paragraph, parts))


def _paragraph(text: str) -> str:
    if text.startswith("    "):
        return f"```text\n{inspect.cleandoc(text)}\n```"
    return _one_line(text).replace("\\|", "|")


def _item(call: str, words: str) -> str:
    return f"- **`{call}`** — " + words.replace("\n", "\n  ").replace("\n  \n", "\n\n")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` compares it."""
    if arguments == ["--check"]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
