"""The losses on preferences: pairs of a chosen and a rejected response, or single labelled responses."""

from __future__ import annotations

from schemas.losses.spec import LossSpec, Option

_PAIR_METRICS = {
    "rewards/chosen": "Mean implicit reward of the chosen responses.",
    "rewards/rejected": "Mean implicit reward of the rejected responses.",
    "rewards/margins": "Mean of the differences of the two.",
    "rewards/accuracies": "Share of pairs whose chosen response has the greater reward.",
    "logps/chosen": "Mean log-probability of a chosen response, summed over its tokens.",
    "logps/rejected": "Mean log-probability of a rejected response, summed over its tokens.",
}
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def _beta(meaning: str, origin: str = "TRL") -> Option:
    return Option("beta", 0.1, meaning, origin, above=0.0)


LOSSES = (
    LossSpec(
        name="dpo",
        summary="Direct preference optimization; the reference is the base with the adapter off.",
        formula="−(1−s)·log σ(βΔ) − s·log σ(−βΔ), Δ = (lp_c − ref_c) − (lp_r − ref_r), s label_smoothing",
        source="Rafailov et al. 2023 (2305.18290) eq. 7; Mitchell 2023 (cDPO) for the smoothing",
        divided_by="pairs",
        implementation="workers.engine.losses.dpo:LOSS",
        forms=("preference",),
        options=(
            _beta("How strongly to stay near the reference."),
            Option(
                "label_smoothing",
                0.0,
                "Probability that a label is flipped.",
                at_least=0.0,
                below=0.5,
            ),
        ),
        takes=_REFERENCE,
        metrics=_PAIR_METRICS,
    ),
    LossSpec(
        name="ipo",
        summary="Identity preference optimization, on log-ratios per token.",
        formula="(Δ − 1/(2β))², Δ = (lp_c − ref_c)/n_c − (lp_r − ref_r)/n_r, n tokens of the response",
        source="Azar et al. 2023 (2310.12036) eq. 17; per token as in TRL, which its authors confirmed",
        divided_by="pairs",
        implementation="workers.engine.losses.ipo:LOSS",
        forms=("preference",),
        options=(_beta("The paper's τ."),),
        takes=_REFERENCE,
        metrics=_PAIR_METRICS,
    ),
    LossSpec(
        name="simpo",
        summary="Simple preference optimization: mean log-probabilities and a margin, no reference.",
        formula="−log σ(β·(lp_c/n_c − lp_r/n_r) − γ), γ simpo_gamma",
        source="Meng et al. 2024 (2405.14734) eq. 6",
        divided_by="pairs",
        implementation="workers.engine.losses.simpo:LOSS",
        forms=("preference",),
        options=(
            _beta("Scale of the mean log-probabilities (the paper uses 2 to 2.5)."),
            Option("simpo_gamma", 0.5, "The margin γ that is aimed at."),
        ),
        metrics=_PAIR_METRICS,
    ),
    LossSpec(
        name="orpo",
        summary="Likelihood of the chosen response, and the odds ratio of the two.",
        formula=(
            "−m_c − β·log σ(log odds(m_c) − log odds(m_r)), m = lp/n, odds(m) = eᵐ/(1 − eᵐ); "
            "only the response is counted"
        ),
        source="Hong et al. 2024 (2403.07691) eq. 6 and 7",
        divided_by="pairs",
        implementation="workers.engine.losses.orpo:LOSS",
        forms=("preference",),
        options=(_beta("The paper's λ."),),
        metrics={
            **_PAIR_METRICS,
            "nll_loss": "Mean of −m_c.",
            "log_odds_ratio": "Mean of log σ of the log odds ratio.",
            "log_odds_chosen": "Mean log odds ratio.",
        },
    ),
    LossSpec(
        name="kto",
        summary="Kahneman–Tversky optimization of single responses with a label.",
        formula=(
            "λ·(1 − σ(±β·(lp − ref − z))), + and λ desirable_weight where label is true; z = max(0, mean of "
            "lp − ref of each prompt with the response of the row before it)"
        ),
        source="Ethayarajh et al. 2024 (2402.01306) eq. 7; z as in TRL, over the rows of one call",
        divided_by="rows",
        implementation="workers.engine.losses.kto:LOSS",
        forms=("response",),
        needs=("label",),
        options=(
            _beta("How strongly to stay near the reference."),
            Option("desirable_weight", 1.0, "λ of the desirable rows.", at_least=0.0),
            Option("undesirable_weight", 1.0, "λ of the undesirable rows.", at_least=0.0),
        ),
        metrics={
            "rewards/chosen": "Mean of β(lp − ref) over the desirable rows.",
            "rewards/rejected": "Mean of β(lp − ref) over the undesirable rows.",
            "logps/chosen": "Mean log-probability of a desirable response, summed over its tokens.",
            "logps/rejected": "Mean log-probability of an undesirable response, summed over its tokens.",
            "kl": "z.",
        },
        mismatched=True,
    ),
    LossSpec(
        name="reward_modeling",
        summary=(
            "Bradley–Terry on the implicit reward r = β·(lp − ref), summed over the response's tokens: the "
            "model itself is the reward model, without a head of its own."
        ),
        formula="−log σ(r_c − r_r − margin) + c·(r_c + r_r)², c center_rewards_coefficient",
        source="Bradley and Terry 1952; r by Rafailov et al. 2023 (2305.18290) eq. 5; c as in TRL",
        divided_by="pairs",
        implementation="workers.engine.losses.reward_modeling:LOSS",
        forms=("preference",),
        options=(
            _beta("Scale of the reward.", "Signal"),
            Option(
                "center_rewards_coefficient",
                0.0,
                "Weight of the term that keeps rewards near 0.",
                at_least=0.0,
            ),
        ),
        takes=(*_REFERENCE, "margin"),
        metrics={
            "accuracy": "Share of pairs whose chosen response has the greater reward.",
            "margin": "Mean of r_c − r_r.",
            "mean_reward": "Mean of r over both responses.",
        },
    ),
)
