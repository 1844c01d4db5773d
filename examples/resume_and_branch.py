"""Stop, go on, and go elsewhere: `python examples/resume_and_branch.py`.

A run lives on the server, so a loop may end anywhere and go on from another process with the run's id and the
state of its batches. A branch begins with the exact state after any kept operation: trained on the same data
it ends in the same bits, which certificates prove; with another learning rate it ends elsewhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rewardsignal import SignalClient, SignalRun
from rewardsignal.data import Batches, Dataset, read_chat


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train in two sittings and on two branches; the losses, and the certificates' hashes."""
    args = parse(argv)
    chats = read_chat(args.data)
    with TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"  # all that the first sitting leaves to the second
        first = first_sitting(args, chats, notes)
        run_id, at_seq = json.loads(notes.read_text())["run_id"], 2 * len(first)
        second = second_sitting(args, chats, notes)
        with SignalClient() as client:
            run = client.run(run_id)
            state = json.loads(notes.read_text())["batches"]
            found = {"run": run.certificate().sha256}
            for name, changes in (("same", {}), ("other rate", {"learning_rate": args.lr / 10})):
                branch = run.branch(at_seq=at_seq, name=name, **changes)
                train(branch, Batches(chats, **settings(args), state=state), args.steps)
                found[name] = branch.certificate().sha256
                branch.complete(save=False)
            run.complete()
    for name, sha256 in found.items():
        print(f"{name:10}  {sha256[:16]}  {'equal' if sha256 == found['run'] else 'different'}")
    return {"run_id": run_id, "losses": first + second, "certificates": found}


def first_sitting(args: argparse.Namespace, chats: Dataset[Any], notes: Path) -> list[float]:
    """Half of the steps; then an error, or the end of the process."""
    batches = Batches(chats, **settings(args))
    with SignalClient() as client:
        run = client.create_run(args.model, name="resume", lora_r=16, learning_rate=args.lr, seed=1)
        losses = train(run, batches, args.steps)
        notes.write_text(json.dumps({"run_id": run.run_id, "batches": batches.state()}))
        paused = (
            run.pause()
        )  # a snapshot, and the device is free; as an exception in `with run:` does
        print(f"{run.run_id} is {paused.status} after step {paused.current_step}")
    return losses


def second_sitting(args: argparse.Namespace, chats: Dataset[Any], notes: Path) -> list[float]:
    """The other half, as another process would do it."""
    noted = json.loads(notes.read_text())
    with SignalClient() as client:
        run = client.run(noted["run_id"])
        run.resume()
        print(f"{run.run_id} goes on at seq {run.info.next_seq}")
        return train(run, Batches(chats, **settings(args), state=noted["batches"]), args.steps)


def train(run: SignalRun, batches: Batches[Any], steps: int) -> list[float]:
    """`steps` steps, pipelined; their losses."""
    losses = []
    for batch in islice(batches, steps):
        losses.append(run.forward_backward_async(batch))
        run.optim_step_async(grad_clip_norm=1.0)
    found = [loss.result().loss for loss in losses]
    print(f"{run.run_id}  losses {' '.join(f'{loss:.3f}' for loss in found)}")
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What batches are made by; a state goes with the same ones only."""
    return {"batch_size": args.batch_size, "shuffle": True, "seed": 7, "epochs": None}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("pirate.jsonl"))
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per sitting")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


if __name__ == "__main__":
    main()
