"""What the losses on preference pairs share: the two responses of each pair, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.engine.losses.form import LossInput, Mean, Metrics, mean


@dataclass(frozen=True)
class Side:
    """One response of each of P pairs: sums of log-probabilities and tokens counted, all [P].

    `ref_logps` are the reference's sums, where there is one.
    """

    logps: Tensor
    tokens: Tensor
    ref_logps: Tensor | None

    @property
    def log_ratios(self) -> Tensor:
        """log p(response) - log p_ref(response), in nats."""
        assert self.ref_logps is not None, "the loss must ask for the reference"
        return self.logps - self.ref_logps

    @property
    def mean_logps(self) -> Tensor:
        """Log-probability per token, in nats."""
        return self.logps / self.tokens


def sides(data: LossInput) -> tuple[Side, Side]:
    """The chosen and the rejected responses: rows of a pair are neighbours, the chosen one first."""
    logps, tokens = data.row_sums(data.logprobs * data.weights), data.row_weights()
    reference = reference_sums(data)
    chosen, rejected = (
        Side(logps[at::2], tokens[at::2], None if reference is None else reference[at::2])
        for at in (0, 1)
    )
    return chosen, rejected


def reference_sums(data: LossInput) -> Tensor | None:
    """The reference's log-probability of each row's response [R]: given as one number, or per token."""
    if "ref_logps" in data.row_values:
        return data.row_values["ref_logps"]
    if "ref_logprobs" in data.arrays:
        return data.row_sums(data.arrays["ref_logprobs"] * data.weights)
    return None


def pair_metrics(chosen: Side, rejected: Side, better: Tensor, worse: Tensor) -> Metrics:
    """TRL's metrics, for the rewards [P] of the chosen (`better`) and rejected (`worse`) responses."""
    better, worse = better.detach(), worse.detach()
    return {
        "rewards/chosen": mean(better),
        "rewards/rejected": mean(worse),
        "rewards/margins": mean(better - worse),
        "rewards/accuracies": share(better > worse),
        "logps/chosen": mean(chosen.logps),
        "logps/rejected": mean(rejected.logps),
    }


def share(flags: Tensor) -> Mean:
    """The share of True in `flags`, as a metric."""
    return mean(flags.double())
