"""Run the benchmarks and print one JSON object; progress goes to stderr."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from typing import Any

from tests.bench import sizes, smollm, tiny


def main() -> None:
    """`python -m tests.bench [--only tiny|smollm|sizes] [--bursts N]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("tiny", "smollm", "sizes"))
    parser.add_argument(
        "--bursts", type=int, default=8, help="bursts of 50 pipelined steps per variant"
    )
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    if args.only in (None, "tiny"):
        found["tiny"] = tiny.measure(args.bursts)
    if args.only in (None, "smollm"):
        found["smollm2_135m"] = smollm.measure()
    if args.only in (None, "sizes"):
        found["installed_mb"] = sizes.measure()
    json.dump(found, sys.stdout, indent=2)
    print()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os

    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
