"""`signal chat`: a conversation with a run."""

from __future__ import annotations

import sys
from typing import Any

import click

from rewardsignal._cli.options import client, json_option, run_argument
from rewardsignal._cli.output import emit_line, note
from rewardsignal._cli.sample import given, sampling_options
from rewardsignal._cli.sampling import sampled_run, say
from rewardsignal._run import SignalRun

PROMPT = "> "


@click.command()
@run_argument
@click.option("--system", metavar="TEXT", help="A system message at the beginning.")
@sampling_options
@json_option
def chat(
    run_id: str, system: str | None, weights: str | None, as_json: bool, **options: Any
) -> None:
    """Talk with a run. /reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Off a terminal each line of standard input is a turn, and --json prints an object per answer.
    """
    with client() as server, sampled_run(server, run_id, weights) as (run, chosen):
        wanted = {**given(options), "weights": chosen}
        _Conversation(run, system, wanted, as_json).hold()


class _Conversation:
    """The turns so far, and who speaks next."""

    def __init__(
        self, run: SignalRun, system: str | None, options: dict[str, Any], as_json: bool
    ) -> None:
        self._run, self._options, self._as_json = run, options, as_json
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)
        self._live = sys.stdin.isatty() and sys.stdout.isatty() and not as_json

    def hold(self) -> None:
        """Until somebody leaves."""
        if self._live:
            _edit_lines()
            note("/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer.")
        while (said := self._heard()) is not None and said != "/exit":
            if said == "/reset":
                self._messages = list(self._first)
            elif said:
                self._answer(said)

    def _heard(self) -> str | None:
        """The next turn of the user; None at the end."""
        try:
            line = input(PROMPT) if self._live else sys.stdin.readline()
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            if not self._live:
                raise
            # As shells do: what was typed is given up, and nothing else.
            click.echo()
            return ""
        return line.strip() if self._live or line else None

    def _answer(self, said: str) -> None:
        self._messages.append({"role": "user", "content": said})
        text, reason = self._streamed()
        self._messages.append({"role": "assistant", "content": text})
        if self._as_json:
            emit_line({"role": "assistant", "content": text, "finish_reason": reason})

    def _streamed(self) -> tuple[str, str]:
        """The answer and why it ended; one that is stopped stays as far as it came."""
        text = ""
        try:
            with self._run.stream_sample([self._messages], **self._options) as stream:
                for token in stream:
                    text = "" if token.restart else text + token.text
                    if self._live:
                        say("\n" if token.restart else token.text)
                found = stream.result().samples[0][0]
        except KeyboardInterrupt:
            if not self._live:
                raise
            click.echo()
            return text, "stopped"
        self._finish(text if self._live else "", found.text)
        return found.text, found.finish_reason

    def _finish(self, shown: str, text: str) -> None:
        if not self._as_json:
            say(text[len(shown) :] if text.startswith(shown) else f"\n{text}")
            click.echo()


def _edit_lines() -> None:
    """Arrow keys and a history, where Python has them."""
    try:
        import readline  # noqa: F401 - importing it is what does it
    except ImportError:
        return
