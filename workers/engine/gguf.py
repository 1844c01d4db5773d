"""Convert one GGUF file into a safetensors folder that the model catalogue accepts.

`python -m workers.engine.gguf --gguf FILE --out DIR` reads FILE and writes DIR once: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and
conversion.json, which says what DIR was made from. It touches DIR and a `.partial` folder beside it, never
the network.

The weights are the GGUF's dequantised values, not the original checkpoint. They are stored as float32:
bfloat16 would move each by about 0.13 % (relative L2), and float32 is read by mmap without a conversion.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD = "conversion.json"
FORMAT = 1
# Keys that transformers adds about this machine, not about the tokenizer.
_MACHINE_KEYS = ("is_local", "local_files_only", "backend")
# The `tokenizer.ggml.pre` values whose original tokenizer splits every digit off before the byte-level
# step. transformers ignores the field; without it two spaces before a digit are encoded differently.
_DIGIT_SPLITTERS = frozenset({"smollm"})


def convert(gguf: Path, out: Path) -> bool:
    """Write `out` from `gguf`; False when `out` already holds this very conversion.

    Raises FileNotFoundError for a missing `gguf` and FileExistsError when `out` holds something else.
    """
    if not gguf.is_file():
        raise FileNotFoundError(f"no such GGUF file: {gguf}")
    record = {"format": FORMAT, "source": gguf.name, "sha256": _sha256(gguf), "dtype": "float32"}
    if out.exists():
        if _read_record(out) == record:
            return False
        raise FileExistsError(
            f"{out} exists and was not made from {gguf.name}: remove it or name another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _write_folder(gguf, staging)
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_folder(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    # A plain gguf_file= leaves a gguf quantization_config behind that save_pretrained cannot write.
    quantization = GgufConfig(dequantize=True)
    with _parsed_once() as reader:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, quantization_config=quantization, dtype=torch.float32, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        pre = reader(str(gguf)).get_field("tokenizer.ggml.pre")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    context = int(model.config.max_position_embeddings)
    _mend_tokenizer(folder, context, str(pre.contents()) if pre is not None else "")


@contextmanager
def _parsed_once() -> Iterator[Callable[[str], Any]]:
    """Let transformers share one parse of the file; it makes three, of 6 s each for 50,000 tokens."""
    import gguf as library

    plain = library.GGUFReader
    reader = functools.cache(plain)
    setattr(library, "GGUFReader", reader)  # noqa: B010
    try:
        yield reader
    finally:
        setattr(library, "GGUFReader", plain)  # noqa: B010


def _mend_tokenizer(folder: Path, context: int, pre: str) -> None:
    config = _load(folder / "tokenizer_config.json")
    for key in _MACHINE_KEYS:
        config.pop(key, None)
    # A class name that every transformers version knows, and the length that the model really has.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = context
    _dump(folder / "tokenizer_config.json", config)
    if pre in _DIGIT_SPLITTERS:
        tokenizer = _load(folder / "tokenizer.json")
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, tokenizer["pre_tokenizer"]],
        }
        _dump(folder / "tokenizer.json", tokenizer)


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the folder is there at the end."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.engine.gguf", description="GGUF to safetensors"
    )
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file to read")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write; left alone if it is there"
    )
    options = parser.parse_args(arguments)
    # Before transformers is imported: a conversion needs no hub and shows no bars.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    begun = time.monotonic()
    try:
        written = convert(options.gguf, options.out)
    except (FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if written:
        print(f"converted {options.gguf.name} to {options.out} in {time.monotonic() - begun:.0f} s")
    else:
        print(f"{options.out} is already converted")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
