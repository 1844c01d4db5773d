"""From a run's configuration to its trainer. Configurations of earlier versions lack the newer settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.engine.base import Base
from workers.engine.lora import LoraSpec
from workers.engine.optimizer import AdamWSettings, default_settings
from workers.engine.schedule import Schedule
from workers.engine.trainer import Trainer
from workers.footprint import precision


def make_trainer(base: Base, config: Mapping[str, Any]) -> Trainer:
    """Raises SignalError with the setting's name for what the base or its device cannot do."""
    optimizer = config.get("optimizer", "adamw")
    return Trainer(
        base,
        lora_spec(config),
        settings_of(config, optimizer),
        gradient_checkpointing=config["gradient_checkpointing"],
        optimizer=optimizer,
        schedule=Schedule(
            config.get("lr_scheduler") or "constant",
            config.get("warmup_steps", 0),
            config.get("total_steps"),
        ),
    )


def lora_spec(config: Mapping[str, Any]) -> LoraSpec:
    """What the configuration says of the adapter."""
    return LoraSpec(
        r=config["lora_r"],
        alpha=config["lora_alpha"],
        target_modules=tuple(config["lora_target_modules"] or ()) or None,
        seed=config["seed"],
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=dict(config.get("lora_rank_pattern") or {}),
        alpha_pattern=dict(config.get("lora_alpha_pattern") or {}),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        train_attn=config.get("train_attn", True),
        train_mlp=config.get("train_mlp", True),
        train_unembed=config.get("train_unembed", False),
    )


def settings_of(config: Mapping[str, Any], optimizer: str) -> AdamWSettings:
    """What a step is taken with where the request says nothing."""
    chosen = {name: config[name] for name in ("learning_rate", "weight_decay")}
    return default_settings(optimizer).overridden(chosen)


def base_options(config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Which base a run computes with: options of `load_base`."""
    dtype = precision(config, device)
    # All parameters are trained by transformers' own forward pass.
    own = bool(config["lora_r"])
    quantization = config.get("quantization")
    return {"dtype": dtype, "quantization": quantization, "device": device, "own": own}
