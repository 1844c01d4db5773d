"""The policy-gradient losses whose advantages are relative to a group of responses to one prompt."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.losses.policy import CLIP, EPSILON, EPSILON_HIGH, RATIO, REWARDS, SCALE_REWARDS
from schemas.losses.spec import LossSpec, Option, Options


def _grpo(options: Options) -> Iterator[tuple[str, str]]:
    length, kind = options["max_completion_length"], options["loss_type"]
    if (length is not None) != (kind == "dr_grpo"):
        word = "Is needed" if length is None else "Does nothing unless"
        yield "max_completion_length", f"{word} with loss_type dr_grpo, its divisor."
    if options["use_bias_correction_kl"] and not options["beta"]:
        yield "use_bias_correction_kl", "Does nothing while beta is 0."


LOSSES = (
    LossSpec(
        name="grpo",
        summary="Group-relative policy optimization and its variants.",
        formula=(
            "l = −min(r·A, clip(r, 1−ε, 1+ε_high)·A) + β·k3, k3 = e^(ref−lp) − (ref−lp) − 1; by loss_type: "
            "grpo mean over rows of the mean over tokens, dr_grpo Σ l / (rows · max_completion_length), dapo "
            "Σ l / tokens of the accumulation, bnpo Σ l / tokens of the call, mean over calls"
        ),
        source=(
            "Shao et al. 2024 (2402.03300), Liu et al. 2025 (2503.20783), Yu et al. 2025 (2503.14476); "
            "loss_type as in TRL"
        ),
        divided_by="by loss_type",
        implementation="workers.engine.losses.grpo:LOSS",
        forms=("tokens", "group"),
        needs=("advantages",),
        takes=("logprobs", "ref_logprobs"),
        options=(
            Option(
                "loss_type",
                "dapo",
                "What the sum over tokens is divided by.",
                kind=str,
                choices=("grpo", "dr_grpo", "dapo", "bnpo"),
            ),
            EPSILON,
            EPSILON_HIGH,
            Option(
                "delta",
                None,
                "Bound on the unclipped ratio (two-sided clipping); left out: none.",
                above=0.0,
            ),
            Option(
                "beta", 0.0, "Weight of the KL term; 0: no reference is computed.", at_least=0.0
            ),
            Option(
                "use_bias_correction_kl",
                False,
                "Multiply the KL term by the ratio (TRL's own default is true; the papers' form is false).",
                kind=bool,
            ),
            Option(
                "max_completion_length", None, "dr_grpo's divisor, in tokens.", kind=int, at_least=1
            ),
            SCALE_REWARDS,
        ),
        metrics={
            **RATIO,
            **CLIP,
            "kl": "Mean of k3, where beta is not 0.",
            **REWARDS,
        },
        check=_grpo,
    ),
    LossSpec(
        name="gspo",
        summary="Group sequence policy optimization: one ratio for a whole response.",
        formula=(
            "s = exp(mean of lp − logprobs over the response); gspo: mean over rows of the mean over tokens "
            "of −min(s·A, clip(s)·A); gspo_token: Σ w·−min(r·A, clip(r)·A), r = s in value, its gradient "
            "through each token's own lp"
        ),
        source=(
            "Zheng et al. 2025 (2507.18071) eq. 5 and 13; gspo_token, a sum over tokens, is Tinker's `gspo`"
        ),
        divided_by="rows; gspo_token: nothing",
        implementation="workers.engine.losses.gspo:LOSS",
        forms=("tokens", "group"),
        needs=("advantages",),
        takes=("logprobs", "sequence_ratio_mask"),
        options=(
            Option(
                "loss_type",
                "gspo",
                "The paper's form, or the one with a gradient per token.",
                "Signal",
                kind=str,
                choices=("gspo", "gspo_token"),
            ),
            Option("epsilon", 3e-4, EPSILON.meaning, at_least=0.0, at_most=1.0),
            Option("epsilon_high", 4e-4, EPSILON_HIGH.meaning.split(";")[0] + ".", at_least=0.0),
            SCALE_REWARDS,
        ),
        metrics={**RATIO, **CLIP, **REWARDS},
    ),
)
