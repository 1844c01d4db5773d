"""The environment `.cookbook` with tinker-cookbook, which needs other versions of libraries than the server.

The client needs torch too, which is linked from this environment instead of being downloaded again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cookbook"
PYTHON = PLACE / "bin" / "python"
COOKBOOK, SDK = "tinker-cookbook[math-rl]==0.5.8", f"tinker=={version('tinker')}"
# How the names of torch's own packages begin, and of those that carry CUDA for it.
LINKED = ("torch", "functorch", "nvidia", "cuda", "triton")


def main() -> int:
    """Make it unless it is there; 0 when it is there at the end."""
    torch = version("torch")
    wanted = "\n".join((COOKBOOK, SDK, f"torch=={torch}", sys.version, ""))
    made = PLACE / "made"
    if made.is_file() and made.read_text() == wanted:
        return 0
    print(f"Installing {COOKBOOK} into {PLACE.name}, about 250 MB.", file=sys.stderr, flush=True)
    shutil.rmtree(PLACE, ignore_errors=True)
    venv.create(PLACE, with_pip=True)
    link_torch()
    command = [str(PYTHON), "-m", "pip", "install", "-q", "--no-compile"]
    done = subprocess.run([*command, f"torch=={torch.split('+')[0]}", COOKBOOK, SDK])
    if done.returncode:
        print(f"{COOKBOOK} cannot be installed.", file=sys.stderr)
        return 1
    made.write_text(wanted)
    return 0


def link_torch() -> None:
    """A folder with torch's packages alone, which the new environment sees as its own."""
    ours = Path(sysconfig.get_path("purelib"))
    linked = PLACE / "linked"
    linked.mkdir()
    for path in ours.iterdir():
        if path.name.startswith(LINKED):
            (linked / path.name).symlink_to(path)
    theirs = next((PLACE / "lib").glob("python3*")) / "site-packages"
    (theirs / "linked.pth").write_text(f"{linked}\n")


if __name__ == "__main__":
    sys.exit(main())
