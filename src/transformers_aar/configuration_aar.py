"""Configuration of AAR, the next-scale generator."""

from transformers import ClapConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_sat import (
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    SHARE_BELOW_ONE,
    YES_OR_NO,
    SatConfig,
    check_fields,
    is_list,
    one_of,
)

# What the labels' tokenizer keeps for itself: between names, in place of a missing and of an unknown one.
RESERVED_IN_LABELS = (";", "[PAD]", "[UNK]")


def has_type(config, model_type: str) -> bool:
    """Whether it is a configuration of this kind; its class is another under remote code."""
    return getattr(config, "model_type", None) == model_type


def is_label(name) -> bool:
    if not isinstance(name, str) or name != name.strip():
        return False
    return name != "" and not any(text in name for text in RESERVED_IN_LABELS)


FIELD_RULES = {
    "codec_config": (lambda config: has_type(config, "sat"), "a SatConfig or a dictionary of its fields"),
    "conditioner_config": (
        lambda config: config is None or has_type(config, "clap"),
        "a ClapConfig, a dictionary of its fields, or None",
    ),
    **dict.fromkeys(("conditioning_dim", "hidden_size", "num_hidden_layers", "num_attention_heads"), POSITIVE_INTEGER),
    "mlp_ratio": POSITIVE_NUMBER,
    "conditioning": one_of("clap", "label", "none"),
    "adaln": one_of("per_block", "shared", "none"),
    "use_qk_norm": YES_OR_NO,
    "drop_path_rate": (lambda value: value is None or SHARE_BELOW_ONE[0](value), f"{SHARE_BELOW_ONE[1]}, or None"),
    "conditioning_dropout": SHARE_BELOW_ONE,
    "labels": (
        lambda labels: labels is None or is_list(labels, is_label),
        "a list of names without blanks around them and without a semicolon, [PAD] or [UNK] in them; or None",
    ),
}


def _clap_config(fields: dict) -> ClapConfig:
    try:
        return ClapConfig(**fields)
    # the library's checks of types raise an exception of their own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`conditioner_config` is no configuration of CLAP: {reason}") from error


class AarConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AarForConditionalGeneration`]: a transformer that predicts the codes of a [`SatModel`] scale
    by scale. The defaults are the published model of depth 16 of "Efficient Autoregressive Audio Modeling via
    Next-Scale Prediction" (arXiv 2408.09027).

    Args:
        codec_config (`SatConfig` or `dict`, *optional*):
            Configuration of the codec, whose codes are predicted. Defaults to the published one.
        conditioning (`str`, defaults to `"clap"`):
            What sounds are conditioned on: `"clap"` (a joint embedding of text and audio), `"label"` (names from a
            list) or `"none"`.
        conditioner_config (`ClapConfig` or `dict`, *optional*):
            Configuration of the CLAP model inside. Without it a `"clap"` model takes ready embeddings only.
        labels (`list[str]`, *optional*):
            Names of the labels, in the order of their ids; for `"label"` conditioning.
        conditioning_dim (`int`, defaults to 512):
            Width of the conditioning vector.
        hidden_size (`int`, defaults to 1024):
            Width of the transformer.
        num_hidden_layers (`int`, defaults to 16):
            Number of transformer blocks.
        num_attention_heads (`int`, defaults to 16):
            Number of attention heads.
        mlp_ratio (`float`, defaults to 4.0):
            Width of a block's MLP as a multiple of `hidden_size`.
        adaln (`str`, defaults to `"per_block"`):
            Where the modulation of the adaptive norms comes from: a linear layer `"per_block"`, one that all blocks
            have in common (`"shared"`, with a learned offset per block), or `"none"` for plain layer norms.
        use_qk_norm (`bool`, defaults to `True`):
            Whether queries and keys are L2-normalised per head, with a learned scale.
        drop_path_rate (`float`, *optional*):
            Stochastic depth of the last block, growing linearly from 0 at the first. Defaults to 0.1 · depth / 24.
        conditioning_dropout (`float`, defaults to 0.1):
            Share of training examples whose conditioning is dropped, for classifier-free guidance.

    Raises:
        ValueError: when the values don't fit each other; the message names the field.

    Example:

    ```python
    >>> from transformers_aar import AarConfig, AarForConditionalGeneration

    >>> config = AarConfig(conditioning="label", labels=["Dog", "Rain"], num_hidden_layers=2)
    >>> model = AarForConditionalGeneration(config)
    ```"""

    model_type = "aar"
    sub_configs = {"codec_config": SatConfig, "conditioner_config": ClapConfig}

    def __init__(
        self,
        codec_config=None,
        conditioning: str = "clap",
        conditioner_config=None,
        labels: list[str] | None = None,
        conditioning_dim: int = 512,
        hidden_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        adaln: str = "per_block",
        use_qk_norm: bool = True,
        drop_path_rate: float | None = None,
        conditioning_dropout: float = 0.1,
        **kwargs,
    ):
        # a dictionary comes from JSON; anything else is a configuration already (under remote code of another class)
        codec_config = {} if codec_config is None else codec_config
        if isinstance(codec_config, dict):
            # where the codec once was is of no use to those who get the generator
            codec_config = SatConfig(**{k: v for k, v in codec_config.items() if k != "_name_or_path"})
        self.codec_config = codec_config
        if isinstance(conditioner_config, dict):
            conditioner_config = _clap_config(conditioner_config)
        self.conditioner_config = conditioner_config
        self.conditioning = conditioning
        self.labels = list(labels) if isinstance(labels, tuple) else labels
        self.conditioning_dim = conditioning_dim
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.adaln = adaln
        self.use_qk_norm = use_qk_norm
        self.drop_path_rate = drop_path_rate
        self.conditioning_dropout = conditioning_dropout
        # before the library validates, which computes with these values
        self.validate_architecture()
        if drop_path_rate is None:
            self.drop_path_rate = 0.1 * num_hidden_layers / 24
        super().__init__(**kwargs)

    def validate_architecture(self):
        """Raises a `ValueError` that names the first field whose value is impossible."""
        check_fields(self, FIELD_RULES)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if (self.conditioning == "label") != bool(self.labels):
            raise ValueError("`labels` must be a list of names with `conditioning='label'`, and None without.")
        if self.labels and len({name.lower() for name in self.labels}) != len(self.labels):
            raise ValueError("`labels` must be names that differ in more than upper and lower case.")
        if self.conditioner_config is not None:
            if self.conditioning != "clap":
                raise ValueError("`conditioner_config` is for `conditioning='clap'` only.")
            if self.conditioner_config.projection_dim != self.conditioning_dim:
                raise ValueError(
                    f"`conditioner_config.projection_dim` ({self.conditioner_config.projection_dim}) must equal "
                    f"`conditioning_dim` ({self.conditioning_dim})."
                )

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the generated audio, in Hz."""
        return self.codec_config.sampling_rate

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_slots(self) -> int:
        """Tokens of one window (L), each of which has a position of its own."""
        return self.codec_config.tokens_per_window


AarConfig.register_for_auto_class()

__all__ = ["AarConfig"]
