"""How a run trains: the adapter, the numbers it is computed in, the optimizer and its schedule.

What depends on the model or on what is installed is checked where these are known; everything else here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, validate, validates, validates_schema

from schemas.fields import FiniteFloat, Input, StrictBoolean, StrictInteger

OPTIMIZERS = ("adamw", "adamw_8bit", "lion")
SCHEDULERS = ("constant", "linear", "cosine", "constant_with_warmup")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBEDDING = "lm_head"
TARGETS = ATTENTION + MLP
QUANTIZATIONS = ("nf4", "int8")
_ADAPTER_ALONE: Mapping[str, Any] = {
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "lora_rank_pattern": {},
    "lora_alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "train_attn": True,
    "train_mlp": True,
    "train_unembed": False,
    "quantization": None,
}
_PARTS = ("train_attn", "train_mlp", "train_unembed")
# The end of a module's path, as peft's patterns are mostly written; never a regular expression.
_KEY = validate.And(validate.Length(1, 200), validate.Regexp(r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z"))


class AdapterConfig(Input):
    """What of the model an adapter changes, and how."""

    lora_r = StrictInteger(
        load_default=32,
        validate=validate.Range(0, 512),
        metadata={
            "description": (
                "LoRA rank; 0 trains all parameters of the model instead of an adapter, and takes no other "
                "setting of one."
            )
        },
    )
    lora_alpha = FiniteFloat(
        load_default=32.0,
        validate=validate.Range(1, 1024),
        metadata={"description": "LoRA scale: the adapter's output is multiplied by alpha / rank."},
    )
    lora_dropout = FiniteFloat(
        load_default=0.0,
        validate=validate.Range(0, 0.5),
        metadata={
            "description": (
                "The part of an adapter's inputs that a forward_backward drops; which depends on the run's "
                "seed, the operation's seq, the example and the token alone."
            )
        },
    )
    lora_target_modules = fields.List(
        fields.String(validate=validate.OneOf((*TARGETS, UNEMBEDDING))),
        load_default=None,
        allow_none=True,
        validate=validate.Length(1, len(TARGETS) + 1),
        metadata={
            "description": "The linear layers that get an adapter; null means those of the parts that train."
        },
    )
    lora_rank_pattern = fields.Dict(
        keys=fields.String(validate=_KEY),
        values=StrictInteger(validate=validate.Range(1, 512)),
        load_default=dict,
        validate=validate.Length(0, 256),
        metadata={
            "description": (
                "Other ranks for the layers whose path ends in a key, such as `layers.0.mlp.up_proj`; "
                "the first key that fits counts."
            )
        },
    )
    lora_alpha_pattern = fields.Dict(
        keys=fields.String(validate=_KEY),
        values=FiniteFloat(validate=validate.Range(1, 1024)),
        load_default=dict,
        validate=validate.Length(0, 256),
        metadata={"description": "The same for alpha."},
    )
    use_rslora = StrictBoolean(
        load_default=False, metadata={"description": "Scale by alpha / sqrt(rank)."}
    )
    use_dora = StrictBoolean(
        load_default=False,
        metadata={"description": "Learn the lengths of the weights' rows as well (DoRA)."},
    )
    train_attn = StrictBoolean(load_default=True)
    train_mlp = StrictBoolean(load_default=True)
    train_unembed = StrictBoolean(
        load_default=False,
        metadata={"description": "The parts that get an adapter when no layers are named."},
    )

    @validates_schema
    def _one_choice_of_layers(self, data: dict[str, Any], **_: Any) -> None:
        if data["lora_target_modules"] is None:
            if not any(data[part] for part in _PARTS):
                raise ValidationError("Nothing is left to train.", "train_attn")
            return
        for part, default in zip(_PARTS, (True, True, False), strict=True):
            if data[part] is not default:
                raise ValidationError("Name the layers or the parts, not both.", part)

    @validates_schema
    def _nothing_of_an_adapter(self, data: dict[str, Any], **_: Any) -> None:
        if data["lora_r"]:
            return
        for name, default in _ADAPTER_ALONE.items():
            if data.get(name, default) != default:
                raise ValidationError("lora_r 0 trains all parameters: leave this out.", name)

    @validates_schema
    def _supported_together(self, data: dict[str, Any], **_: Any) -> None:
        if data["use_dora"] and data["lora_dropout"]:
            raise ValidationError("Dropout together with DoRA is not supported.", "lora_dropout")
        if UNEMBEDDING not in chosen_targets(data):
            return
        if data["lora_dropout"]:
            message = "Dropout before the unembedding is not supported."
            raise ValidationError(message, "lora_dropout")
        if data["use_dora"]:
            raise ValidationError("DoRA of the unembedding is not supported.", "use_dora")


class RunConfig(AdapterConfig):
    """How a run trains. A setting that this server cannot honour yet is refused by its name."""

    base_model = fields.String(
        required=True,
        validate=validate.Length(1, 200),
        metadata={"description": "A name of GET /models."},
    )
    optimizer = fields.String(
        load_default="adamw",
        validate=validate.OneOf(OPTIMIZERS),
        metadata={"description": "adamw_8bit keeps its moments in a byte each, by bitsandbytes."},
    )
    learning_rate = FiniteFloat(
        load_default=3e-4, validate=validate.Range(0, 1, min_inclusive=False)
    )
    weight_decay = FiniteFloat(load_default=0.01, validate=validate.Range(0, 1))
    lr_scheduler = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.OneOf(SCHEDULERS),
        metadata={
            "description": (
                "How the learning rate changes with the optimizer steps taken, as transformers' schedules of "
                "these names; null means constant. A learning_rate given with an optim_step holds for "
                "that step instead."
            )
        },
    )
    warmup_steps = StrictInteger(
        load_default=0,
        validate=validate.Range(0, 10**9),
        metadata={"description": "Steps in which the learning rate rises from 0."},
    )
    total_steps = StrictInteger(
        load_default=None,
        allow_none=True,
        validate=validate.Range(1, 10**9),
        metadata={
            "description": "Where linear and cosine end, at 0; they need it, no other takes it."
        },
    )
    max_seq_length = StrictInteger(
        load_default=None,
        allow_none=True,
        validate=validate.Range(1, 131_072),
        metadata={
            "description": (
                "Longest sequence in tokens; null means 2,048 or the model's context if that is less."
            )
        },
    )
    bf16 = StrictBoolean(
        load_default=None,
        allow_none=True,
        metadata={
            "description": (
                "Base weights in bfloat16 (true) or float32 (false); null means bfloat16 on a GPU, float32 "
                "on a CPU."
            )
        },
    )
    fp16 = StrictBoolean(
        load_default=False,
        metadata={"description": "Base weights in float16, for devices that have no bfloat16."},
    )
    quantization = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.OneOf(QUANTIZATIONS),
        metadata={
            "description": (
                "The base's linear layers in 4 bits (nf4, QLoRA) or 8 (int8), by bitsandbytes; null means as "
                "bf16 and fp16 say."
            )
        },
    )
    gradient_checkpointing = StrictBoolean(
        load_default=False,
        metadata={"description": "Compute each layer again in the backward pass, to save memory."},
    )
    gpu_config = fields.String(load_default=None, allow_none=True, validate=validate.Length(1, 64))
    dedicated = StrictBoolean(
        load_default=False,
        metadata={
            "description": (
                "A device of its own: the run joins no other's worker, and none joins its. Otherwise runs of "
                "the same base may share one when no device is free. With lora_r 0 it is so in any case."
            )
        },
    )
    seed = StrictInteger(
        load_default=0,
        validate=validate.Range(0, 2**63 - 1),
        metadata={
            "description": "Seeds the adapter's start and all sampling without a seed of its own."
        },
    )

    # A field of the contract whose part is still to come: refused, never ignored.
    @validates("gpu_config")
    def _no_gpu_config(self, value: str | None, data_key: str) -> None:
        if value is not None:
            raise ValidationError("Choosing a device is not supported yet: leave it out.")

    @validates_schema
    def _scheduled(self, data: dict[str, Any], **_: Any) -> None:
        check_schedule(data)

    @validates_schema
    def _one_format(self, data: dict[str, Any], **_: Any) -> None:
        if data["fp16"] and data["bf16"]:
            raise ValidationError("Base weights have one format: bf16 or fp16.", "fp16")


def chosen_targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The layers that a configuration gives an adapter, by the last part of their names; a model may lack
    some. Configurations of runs made by earlier versions lack the parts."""
    if config.get("lora_target_modules"):
        return tuple(config["lora_target_modules"])
    return (
        (ATTENTION if config.get("train_attn", True) else ())
        + (MLP if config.get("train_mlp", True) else ())
        + ((UNEMBEDDING,) if config.get("train_unembed", False) else ())
    )


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raises ValidationError with the field's name when scheduler, warm-up and end do not go together."""
    name, total = config["lr_scheduler"] or "constant", config.get("total_steps")
    if name in ("linear", "cosine"):
        if total is None:
            raise ValidationError(f"{name} needs to know where it ends.", "total_steps")
        if config["warmup_steps"] >= total:
            raise ValidationError("The warm-up must end before total_steps.", "warmup_steps")
    elif total is not None:
        raise ValidationError(f"{name} has no end: only linear and cosine take it.", "total_steps")
    if name == "constant" and config["warmup_steps"]:
        raise ValidationError("constant has none: use constant_with_warmup.", "warmup_steps")
