"""The policy-gradient losses on tokens, with advantages given or made from rewards."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.losses.spec import LossSpec, Option, Options

_ANY = ("tokens", "group", "response")
SCALE_REWARDS = Option(
    "scale_rewards",
    "group",
    "What a group's rewards, less their mean, are divided by: the group's standard deviation, the whole "
    "call's (batch), or nothing (none).",
    kind=str,
    choices=("group", "batch", "none"),
    goes_with=("group",),
)
EPSILON = Option(
    "epsilon",
    0.2,
    "The ratio is clipped below at 1 − epsilon (Tinker's clip_low_threshold).",
    at_least=0.0,
    at_most=1.0,
)
EPSILON_HIGH = Option(
    "epsilon_high",
    None,
    "The ratio is clipped above at 1 + epsilon_high (Tinker's clip_high_threshold); left out: epsilon.",
    at_least=0.0,
)
REWARDS = {
    "reward": "Mean reward of the rows.",
    "frac_reward_zero_std": "Share of rows whose group's rewards are all equal: they have no gradient.",
}
RATIO = {
    "ratio": "Mean of r over the tokens.",
    "approx_kl": "Mean of r − 1 − log r: how far the policy is from the sampler.",
    "logprob_gap": "Mean of |lp − logprobs|; for samples of the very weights, the gap of their arithmetic.",
}
CLIP = {
    "clip_ratio/low_mean": "Share of tokens clipped below.",
    "clip_ratio/high_mean": "Share of tokens clipped above.",
    "clip_ratio/region_mean": "Share of tokens clipped.",
}
_SUM = "nothing"
_R = "r = exp(lp − logprobs)"


def _ordered(options: Options) -> Iterator[tuple[str, str]]:
    if options["clip_low_threshold"] > options["clip_high_threshold"]:
        yield "clip_low_threshold", "Must not be above clip_high_threshold."


LOSSES = (
    LossSpec(
        name="importance_sampling",
        summary="Policy gradient, corrected for the sampler's distribution.",
        formula=f"−Σ w·r·A, {_R}",
        source="Tinker, `importance_sampling`",
        divided_by=_SUM,
        implementation="workers.engine.losses.importance_sampling:LOSS",
        forms=_ANY,
        needs=("logprobs", "advantages"),
        options=(SCALE_REWARDS,),
        metrics={**RATIO, **REWARDS},
        signed_weights=True,
    ),
    LossSpec(
        name="ppo",
        summary="The clipped surrogate, with entropy and value terms where asked for.",
        formula=(
            "Σ w·(−min(r·A, clip(r, 1−ε, 1+ε_high)·A) − entropy_coef·H + vf_coef·½(values − returns)²), "
            + _R
        ),
        source="Schulman et al. 2017 (1707.06347) eq. 7 and 9; a sum as Tinker's `ppo`",
        divided_by=_SUM,
        implementation="workers.engine.losses.ppo:LOSS",
        forms=_ANY,
        needs=("logprobs", "advantages"),
        takes=("values", "returns"),
        options=(
            EPSILON,
            EPSILON_HIGH,
            Option(
                "entropy_coef",
                0.0,
                "Weight of the entropy H of each counted position, in nats.",
                at_least=0.0,
            ),
            Option(
                "vf_coef",
                0.0,
                "Weight of the value term in the reported loss. The values are the client's, so it has no "
                "gradient here.",
                at_least=0.0,
                goes_with=("values",),
            ),
            Option(
                "gamma",
                1.0,
                "Discount of a response's reward.",
                at_least=0.0,
                at_most=1.0,
                goes_with=("response",),
            ),
            Option(
                "lam",
                0.95,
                "λ of generalized advantage estimation over a response's values.",
                at_least=0.0,
                at_most=1.0,
                goes_with=("response", "values"),
            ),
            SCALE_REWARDS,
        ),
        metrics={
            **RATIO,
            **CLIP,
            "entropy": "Mean of H, where entropy_coef is not 0.",
            "value_loss": "Mean of ½(values − returns)², where rows give them.",
            **REWARDS,
        },
        signed_weights=True,
    ),
    LossSpec(
        name="cispo",
        summary="Policy gradient whose ratio is clipped and held constant.",
        formula=f"−Σ w·sg(clip(r, low, high))·A·lp, {_R}, sg: no gradient",
        source="MiniMax 2025 (2506.13585); a sum as Tinker's `cispo`",
        divided_by=_SUM,
        implementation="workers.engine.losses.cispo:LOSS",
        forms=_ANY,
        needs=("logprobs", "advantages"),
        options=(
            Option("clip_low_threshold", 0.0, "Lower bound of the ratio.", "Tinker", at_least=0.0),
            Option("clip_high_threshold", 4.0, "Upper bound of the ratio.", "Tinker", at_least=0.0),
            SCALE_REWARDS,
        ),
        metrics={**RATIO, **CLIP, **REWARDS},
        signed_weights=True,
        check=_ordered,
    ),
    LossSpec(
        name="dro",
        summary="Direct reward optimization: off-policy, with a quadratic bound on the log-ratio.",
        formula="−Σ w·(A·lp − ½β(lp − logprobs)²)",
        source="Richemond et al. 2024 (2405.19107); as Tinker's `dro`",
        divided_by=_SUM,
        implementation="workers.engine.losses.dro:LOSS",
        forms=_ANY,
        needs=("logprobs", "advantages"),
        options=(
            Option("beta", 0.05, "Weight of the quadratic term.", "Tinker", at_least=0.0),
            SCALE_REWARDS,
        ),
        metrics={**RATIO, **REWARDS},
        signed_weights=True,
    ),
    LossSpec(
        name="conservative_ppo",
        summary="Policy gradient held near the sampler by a KL penalty in place of a clip.",
        formula=f"Σ w·(−r·A + β·(r − 1 − log r)), {_R}",
        source="Schulman et al. 2017 (1707.06347) eq. 8, the KL estimated at the sampled tokens (k3)",
        divided_by=_SUM,
        implementation="workers.engine.losses.conservative_ppo:LOSS",
        forms=_ANY,
        needs=("logprobs", "advantages"),
        options=(
            Option("beta", 0.1, "Weight of KL(sampler ‖ policy).", "Signal", at_least=0.0),
            SCALE_REWARDS,
        ),
        metrics={**RATIO, **REWARDS},
        signed_weights=True,
    ),
)
