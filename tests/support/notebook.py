"""Executes a notebook's cells without Jupyter: `python -m tests.support.notebook FILE KERNEL`.

A cell tagged `restart` begins another kernel, which is another process that knows nothing of the last one.
Each process executes the cells of one kernel in one namespace and prints, as JSON, what every cell would
show: the text and the HTML of its last expression. Jupyter itself would bring thirty packages for this.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def kernels(path: Path) -> list[list[Cell]]:
    """The code cells, by the kernel that executes them."""
    found: list[list[Cell]] = [[]]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        if "restart" in cell["metadata"].get("tags", ()):
            found.append([])
        found[-1].append(cell)
    return found


def execute(cell: Cell, namespace: dict[str, Any]) -> Any:
    """What the cell's last statement is worth, if it is an expression."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell["id"], "exec"), namespace)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), cell["id"], "eval"), namespace)


def shown(value: Any) -> dict[str, str]:
    """As a notebook shows a value."""
    html = getattr(value, "_repr_html_", None)
    return {"text": repr(value), **({"html": html()} if html else {})}


def main(path: str, kernel: str) -> None:
    """Execute one kernel's cells."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = {}
    for cell in kernels(Path(path))[int(kernel)]:
        found[cell["id"]] = shown(execute(cell, namespace))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
