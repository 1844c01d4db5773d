"""`signal models`."""

from __future__ import annotations

import click

from rewardsignal._cli.options import client, json_option
from rewardsignal._cli.output import emit, print_table


@click.command()
@json_option
def models(as_json: bool) -> None:
    """The models that runs can be made of."""
    with client() as server:
        found = server.models()
    if as_json:
        return emit([model.to_dict() for model in found])
    rows = (
        (m.name, m.architecture, f"{m.num_parameters:,}", f"{m.context_length:,}",
         "yes" if m.has_chat_template else "no")
        for m in found
    )  # fmt: skip
    return print_table(("MODEL", "ARCHITECTURE", "PARAMETERS", "CONTEXT", "CHAT"), rows)
