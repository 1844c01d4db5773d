"""What `signal up` was asked for, as it is handed to a detached supervisor. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_pool.devices import parse
from web.stack.errors import StackError


@dataclass(frozen=True)
class Options:
    """The options of `up`; `data_dir` is absolute, `models` holds (name, absolute path or hub id)."""

    data_dir: str
    host: str = "127.0.0.1"
    port: int = 8000
    devices: str | None = None
    models: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        """The reverse of `to_json`."""
        fields = json.loads(text)
        models = tuple((name, source) for name, source in fields.pop("models"))
        return cls(models=models, **fields)


def parse_model(text: str) -> tuple[str, str]:
    """`NAME=PATH`; a path that is there is made absolute, anything else is left as a hub id."""
    name, separator, source = text.partition("=")
    if not separator or not name or not source:
        raise StackError(f"--model takes NAME=PATH, not {text!r}")
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")):
        return name, str(path.resolve())
    return name, source


def check_devices(text: str) -> None:
    """Raises StackError where the pool could not read it."""
    try:
        parse(text)
    except ValueError as error:
        raise StackError(f"--devices: {error}") from None
