"""`signal train`: sft, dpo and grpo from a file, to a saved adapter."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from rewardsignal._cli import rewards, training
from rewardsignal._cli.options import client, json_option, label_option, model_option, run_option
from rewardsignal._cli.output import emit_line, note
from rewardsignal._cli.progress import display
from rewardsignal._cli.training import Loop, Rows, Settings, as_they_are, sampled_groups
from rewardsignal._client import SignalClient
from rewardsignal._exceptions import SignalAPIError
from rewardsignal._run import SignalRun
from rewardsignal.data import DataError, Dataset, read_answers, read_chat, read_preferences

F = TypeVar("F", bound=Callable[..., Any])

# Options of the run itself, by the names that create_run knows.
_OF_THE_RUN = ("lora_r", "lora_alpha", "learning_rate", "lr_scheduler", "warmup_steps")
# Options of the training, which stay what they were when a run goes on.
_OF_THE_TRAINING = (
    "batch_size", "seed", "grad_clip_norm", "beta", "group_size", "max_tokens", "reward",
)  # fmt: skip


@click.group()
def train() -> None:
    """Train an adapter on a file, and save it.

    Ctrl-C pauses the run; --resume RUN goes on with the next batch, and the numbers are those of a
    training that was not interrupted.
    """


def _common(learning_rate: float) -> Callable[[F], F]:
    """The options that all three have."""
    options = (
        click.argument("data", type=click.Path(path_type=Path, exists=True, dir_okay=False)),
        model_option("The model to train, a name of `signal models`."),
        click.option("--steps", type=click.IntRange(1),
                     help="Optimizer steps.  [default: one pass over DATA]"),
        click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1, 128),
                     help="Rows per step."),
        click.option("--learning-rate", default=learning_rate, show_default=True, type=float),
        click.option("--lr-scheduler", help="Such as constant, linear or cosine."),
        click.option("--warmup-steps", type=click.IntRange(0),
                     help="Steps in which the learning rate rises from 0."),
        click.option("--lora-r", default=16, show_default=True, type=click.IntRange(0),
                     help="LoRA rank; 0 trains all parameters."),
        click.option("--lora-alpha", type=float, help="LoRA scale.  [default: the server's]"),
        click.option("--grad-clip-norm", default=1.0, show_default=True, type=click.FloatRange(0),
                     help="Clip the gradient's norm to this; 0: never."),
        click.option("--seed", default=0, show_default=True,
                     help="Of the order of the rows and of the adapter's start."),
        click.option("--name", help="The run's name."),
        label_option,
        click.option("--save", default="final", show_default=True, metavar="NAME",
                     help="Name of the checkpoint that is saved at the end."),
        click.option("--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                     help="Download it into this folder, too."),
        run_option("Go on with a training that was interrupted."),
        json_option,
    )  # fmt: skip

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@train.command()
@_common(learning_rate=2e-4)
@click.pass_context
def sft(context: click.Context, /, data: Path, **options: Any) -> None:
    """Supervised fine-tuning on conversations.

    Each line of DATA is {"messages": [{"role": …, "content": …}, …]}; what the assistant says is learnt.
    """
    _train(context, "causal_lm", data, read_chat(data, extra="drop"), options)


@train.command()
@_common(learning_rate=5e-5)
@click.option("--beta", default=0.1, show_default=True, type=click.FloatRange(0, min_open=True),
              help="How closely the reference is kept to.")  # fmt: skip
@click.pass_context
def dpo(context: click.Context, /, data: Path, **options: Any) -> None:
    """Direct preference optimization.

    Each line of DATA is {"prompt": …, "chosen": …, "rejected": …}: texts, or lists of messages.
    """
    _train(context, "dpo", data, read_preferences(data, extra="drop"), options)


@train.command()
@_common(learning_rate=5e-5)
@click.option("--group-size", default=8, show_default=True, type=click.IntRange(2, 64),
              help="Samples per prompt.")  # fmt: skip
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1),
              help="Tokens per sample.")  # fmt: skip
@click.option("--beta", default=0.0, show_default=True, type=click.FloatRange(0),
              help="Weight of the KL term.")  # fmt: skip
@click.option("--reward", default="number", show_default=True, metavar="REWARD",
              help="number: the last number is the answer's; exact: the text is the answer; or "
              "module:function, called with the text and the row.")  # fmt: skip
@click.pass_context
def grpo(context: click.Context, /, data: Path, **options: Any) -> None:
    """Reinforcement learning with a reward that can be checked (GRPO).

    Each line of DATA is {"prompt": …, "answer": …}; a prompt is a text or a list of messages. --batch-size
    counts prompts, each of which is sampled --group-size times.
    """
    _train(context, "grpo", data, read_answers(data), options)


def _train(
    context: click.Context, loss_fn: str, path: Path, data: Dataset[Any], options: dict[str, Any]
) -> None:
    try:
        data = data if data.random_access else data.in_memory()
        rows = len(data)
        reward = rewards.load(options["reward"]) if "reward" in options else None
    except DataError as error:
        raise click.ClickException(str(error)) from None
    except ValueError as error:
        raise click.UsageError(f"--reward: {error}") from None
    if not rows:
        raise click.ClickException(f"{path}: has no rows.")
    kind, digest = str(context.info_name), training.digest_of(path)
    with client() as server:
        if options["resume"]:
            run, settings, done = _resumed(context, server, kind, digest, options)
        else:
            run, settings, done = _begun(server, kind, digest, rows, options)
        groups = sampled_groups(run, reward, settings) if reward else as_they_are
        _run_to_its_end(run, loss_fn, groups, settings, data, done, options)


def _begun(
    server: SignalClient, kind: str, digest: str, rows: int, options: dict[str, Any]
) -> tuple[SignalRun, Settings, int]:
    if not options["model"]:
        names = ", ".join(model.name for model in server.models()) or "none"
        raise click.UsageError(f"--model is needed; this server has: {names}.")
    steps = options["steps"] or training.steps_of_one_pass(rows, options["batch_size"])
    own: dict[str, Any] = {name: options.get(name) for name in _OF_THE_TRAINING}
    settings = Settings(steps, **own)
    chosen = {name: options[name] for name in _OF_THE_RUN}
    if options["lr_scheduler"] in ("linear", "cosine"):
        chosen["total_steps"] = steps
    labels = {**(options["labels"] or {}), **settings.labels(kind, digest)}
    run = server.create_run(
        options["model"], name=options["name"], labels=labels, seed=settings.seed, **chosen
    )
    if not options["as_json"]:
        note(f"Run {run.run_id} on {options['model']}: {rows:,} rows, {steps:,} steps")
    return run, settings, 0


def _resumed(
    context: click.Context,
    server: SignalClient,
    kind: str,
    digest: str,
    options: dict[str, Any],
) -> tuple[SignalRun, Settings, int]:
    run = server.run(options["resume"])
    before = training.stored(run.info, kind, digest)
    _refuse_other_settings(context, run, before, options)
    settings = training.other_steps(before, options["steps"])
    done = training.settle(run)
    if not options["as_json"]:
        note(f"Run {run.run_id} goes on after step {done:,} of {settings.steps:,}")
    return run, settings, done


def _refuse_other_settings(
    context: click.Context, run: SignalRun, before: Settings, options: dict[str, Any]
) -> None:
    """What was said anew must be what it was."""
    was: Mapping[str, Any] = {**run.info.config, **dataclasses.asdict(before)}
    own = {"model": run.info.base_model, "name": run.info.name}
    for name in ("model", "name", *_OF_THE_RUN, *_OF_THE_TRAINING):
        said = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if said and options[name] != own.get(name, was.get(name)):
            option = name.replace("_", "-")
            raise click.UsageError(
                f"--{option}: {run.run_id} has {own.get(name, was.get(name))}, and goes on with that."
            )


def _run_to_its_end(
    run: SignalRun,
    loss_fn: str,
    rows: Rows,
    settings: Settings,
    data: Dataset[Any],
    done: int,
    options: dict[str, Any],
) -> None:
    shown = display(settings.steps, done, as_json=options["as_json"])
    try:
        with closing(shown):
            Loop(run, loss_fn, rows, settings).train(data, done, shown)
        closed = run.complete(name=options["save"])
    except BaseException as error:
        _pause(run, error)
        raise
    if options["output"]:
        run.download(options["save"], options["output"])
    if options["as_json"]:
        folder = str(options["output"]) if options["output"] else None
        return emit_line({**closed.to_dict(), "folder": folder})
    return _tell_the_end(run, options)


def _tell_the_end(run: SignalRun, options: dict[str, Any]) -> None:
    name, folder = options["save"], options["output"]
    where = f", downloaded to {folder}" if folder else ""
    click.echo(f"Saved {name} in {run.run_id}{where}.")
    if not folder:
        note(f"Download it: signal checkpoints download {run.run_id} {name} DIR")
    note(f"Try it:      signal chat {run.run_id}")


def _pause(run: SignalRun, error: BaseException) -> None:
    """Free the device, and say how to go on. A run that has done nothing is not kept."""
    what = "Interrupted" if isinstance(error, KeyboardInterrupt) else "Stopped by an error"
    try:
        if run.status().next_seq == 1:
            run.cancel()
            note(f"{what} before the first step; {run.run_id} was cancelled.")
            return
        info = run.pause()
    except SignalAPIError as refused:
        note(f"{run.run_id} was not paused: {refused}")
        return
    note(f"{what} at step {info.current_step:,}; {run.run_id} is paused. Go on with:")
    note(f"  {_command(run.run_id)}")


def _command(run_id: str) -> str:
    """This command once more, with --resume."""
    words, told = sys.argv[1:], []
    skip = False
    for word in words:
        if not skip and word != "--resume" and not word.startswith("--resume="):
            told.append(word)
        skip = word == "--resume"
    return " ".join(["signal", *map(shlex.quote, told), "--resume", run_id])
