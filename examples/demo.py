"""The main job, end to end: start a stack, teach a real language model from a chat file, prove what came out.

`make demo` runs this. Everything goes over HTTP through the SDK, as it would from another machine:

1. start the embedded stack (`signal up`), 2. sample before, 3. train a LoRA adapter, and kill the worker that
holds it with SIGKILL half-way, 4. sample after, 5. save and download the adapter, 6. compare its
log-probabilities with plain peft in a fresh process, 7. have the whole run executed again from its journal,
with nobody killing anything, and compare every loss and the weights bit for bit, 8. stop the stack.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rewardsignal import SignalClient, SignalRun

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
ROLES = ("system", "user", "assistant", "tool")
QUESTIONS = [
    "What is the capital of France?",
    "How do I keep my plants alive?",
    "What is a volcano?",
]
console = Console(highlight=False)


def main() -> int:
    """Run the demo; 0 when every proof held."""
    args = parse_args()
    rows = read_chat(args.data)
    console.print(f"[bold]Data[/]   {args.data}: {len(rows)} conversations")
    with stack(args.model_folder) as info:
        console.print(f"[bold]Stack[/]  {info['base_url']}, Flower at {info['flower_url']}")
        with SignalClient(api_key=info["api_key"], base_url=info["base_url"]) as client:
            run = client.create_run(
                MODEL, name="demo", lora_r=16, lora_alpha=32, learning_rate=2e-3
            )
            console.print(f"[bold]Run[/]    {run.run_id} on {MODEL}, LoRA rank 16")
            return teach(run, rows, args)


def teach(run: SignalRun, rows: list[list[dict[str, str]]], args: argparse.Namespace) -> int:
    """Sample, train, sample, save, prove."""
    questions = (
        QUESTIONS if args.data == args.shipped else [first_question(row) for row in rows[:3]]
    )
    before = ask(run, questions)
    train(run, rows, args.steps, args.batch)
    show(questions, before, ask(run, questions))
    # Past the end of the answers (stop=[]), so that there are many tokens to compare.
    chats = [[{"role": "user", "content": question}] for question in questions]
    probe = run.sample(
        chats, max_tokens=32, temperature=1.0, top_p=1.0, stop=[], seed=7, logprobs=True
    )
    saved = run.save_state("pirate" if args.data == args.shipped else "adapter")
    folder = run.download(saved.name, args.out)
    console.print(
        f"\n[bold]Saved[/]  {saved.name}: {saved.size_bytes / 1e6:.1f} MB, downloaded to {folder}"
    )
    certificate = run.certificate()
    run.complete(save=False)
    failed = verify(args.model_folder, folder, probe)
    return failed or replay(run, certificate, args.steps)


def kill_worker(run: SignalRun) -> str:
    """SIGKILL to the process that holds the run; in words, how long until another one holds it."""
    worker = run.session_state().worker
    assert worker is not None
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    begun = time.monotonic()
    rebuilt = next(event for event in run.watch() if event.type == "rebuilt").data
    took, again = time.monotonic() - begun, rebuilt["replay_seconds"]
    return (
        f"back after {took:.1f} s, of which {again:.1f} s for executing {rebuilt['compared']} operations "
        "again"
    )


def replay(run: SignalRun, certificate: Any, steps: int) -> int:
    """Execute the run's journal again, undisturbed; 0 when losses and weights are the same bits."""
    # The server compares every answer with the recorded one and refuses to go on where a bit differs.
    again = run.replay().result(timeout=900)
    equal = again.sha256 == certificate.sha256
    words = "equal, bit for bit, to" if equal else "NOT equal to"
    console.print(
        f"[bold]Replay[/]  the {steps} losses and the weights of the run whose worker was killed are\n"
        f"        {words} those of its undisturbed execution: {again.sha256[:16]}…"
    )
    return 0 if equal else 1


def train(run: SignalRun, rows: list[list[dict[str, str]]], steps: int, size: int) -> None:
    """Pipelined: the next step is queued while this one runs."""
    started, tokens = time.monotonic(), 0
    columns = (
        TextColumn("[bold]Train[/] "),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("train", total=steps, facts="loading the model")
        pending: list[Any] = []
        for step, batch in enumerate(batches(rows, size, steps), 1):
            loss = run.forward_backward_async(batch)
            pending.append((loss, run.optim_step_async(grad_clip_norm=1.0)))
            if len(pending) < 2:
                continue
            tokens += finish(progress, bar, pending.pop(0), tokens, started)
            if step == max(2, steps // 2):
                progress.console.print(f"[bold]Killed[/] at step {step}: {kill_worker(run)}")
        while pending:
            tokens += finish(progress, bar, pending.pop(0), tokens, started)


def finish(progress: Progress, bar: Any, pair: tuple[Any, Any], tokens: int, started: float) -> int:
    """Wait for one step and show it; the number of its tokens."""
    result = pair[0].result(timeout=600)
    pair[1].result(timeout=600)
    speed = (tokens + tokens_of(result)) / (time.monotonic() - started)
    progress.update(bar, advance=1, facts=f"loss {result.loss:6.3f}  {speed:5.0f} tokens/s")
    return tokens_of(result)


def tokens_of(result: Any) -> int:
    """Tokens that the model read for a forward_backward."""
    return int(result.metrics["input_tokens"])


def batches(
    rows: list[list[dict[str, str]]], size: int, steps: int
) -> Iterator[list[dict[str, Any]]]:
    """`steps` batches, reshuffled with a fixed seed each time the data is used up."""
    shuffle, left = random.Random(0), []
    for _ in range(steps):
        while len(left) < size:
            left += shuffle.sample(rows, len(rows))
        batch, left = left[:size], left[size:]
        yield [{"messages": messages} for messages in batch]


def ask(run: SignalRun, questions: list[str]) -> list[str]:
    """One greedy answer per question."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return list(run.sample(prompts, max_tokens=40, temperature=0.0).outputs)


def show(questions: list[str], before: list[str], after: list[str]) -> None:
    """The answers side by side."""
    table = Table(title="What the model learnt (greedy answers)", show_lines=True)
    for heading in ("question", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in zip(questions, before, after, strict=True):
        table.add_row(*(text.strip() for text in row))
    console.print(table)


def verify(model: Path, adapter: Path, probe: Any) -> int:
    """Let a fresh process load the adapter with plain peft and score the same tokens."""
    facts = {
        "prompts": probe.prompt_token_ids,
        "tokens": probe.token_ids,
        "logprobs": probe.logprobs,
    }
    command = [
        sys.executable,
        "-P",
        str(ROOT / "examples" / "verify_adapter.py"),
        str(model),
        str(adapter),
    ]
    return subprocess.run(command, input=json.dumps(facts), text=True, check=False).returncode


@contextmanager
def stack(model_folder: Path) -> Iterator[dict[str, Any]]:
    """A stack of the demo's own, in a temporary data folder, on free ports."""
    command = Path(sys.executable).parent / "signal"
    with tempfile.TemporaryDirectory(prefix="signal-demo-") as data_dir:
        up = [command, "up", "--detach", "--json", "--port", "0", "--data-dir", data_dir]
        # It ends with the demo: no program should find it by a profile afterwards.
        up += ["--no-profile", "--devices", "cpu:1x2", "--model", f"{MODEL}={model_folder}"]
        started = subprocess.run(up, stdout=subprocess.PIPE, text=True, check=False)
        if started.returncode != 0:
            raise SystemExit("the stack did not start; see above")
        try:
            yield json.loads(started.stdout)
        finally:
            subprocess.run([command, "down", "--data-dir", data_dir], check=False)


def read_chat(path: Path) -> list[list[dict[str, str]]]:
    """The `messages` of every line; a bad line is named by its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(read_row(line))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number}: not a row like {{'messages': [...]}}: {error}"
            ) from None
    if not rows:
        raise SystemExit(f"{path} has no rows")
    return rows


def read_row(line: str) -> list[dict[str, str]]:
    """The messages of one line. Raises ValueError, KeyError or TypeError for what is none."""
    messages = [
        {"role": message["role"], "content": message["content"]}
        for message in json.loads(line)["messages"]
    ]
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"the role {message['role']!r} is none of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError("a content that is no text")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message with role assistant")
    return messages


def first_question(messages: list[dict[str, str]]) -> str:
    """What the user of a conversation asks first."""
    return next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])


def parse_args() -> argparse.Namespace:
    """The command line; `make demo DATA=… STEPS=…` passes its two."""
    shipped = ROOT / "examples" / "pirate.jsonl"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, default=shipped, help="JSONL, one {'messages': [...]} per line"
    )
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--batch", type=int, default=8, help="conversations per step")
    parser.add_argument("--out", type=Path, default=ROOT / ".signal" / "adapters")
    parser.add_argument("--model-folder", type=Path, default=ROOT / ".signal" / "models" / MODEL)
    args = parser.parse_args()
    args.shipped = shipped
    if args.steps < 1 or args.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
