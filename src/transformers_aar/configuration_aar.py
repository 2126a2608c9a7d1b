"""Configuration of AAR, the next-scale generator."""

from transformers import ClapConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_sat import SatConfig

CONDITIONINGS = ("clap", "label", "none")
ADAPTIVE_NORMS = ("per_block", "shared", "none")


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
            conditioner_config = ClapConfig(**conditioner_config)
        self.conditioner_config = conditioner_config
        self.conditioning = conditioning
        self.labels = labels
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
        for name in ("conditioning_dim", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if not self.mlp_ratio > 0:
            raise ValueError(f"`mlp_ratio` must be positive, got {self.mlp_ratio!r}.")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"`conditioning` must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}.")
        if self.adaln not in ADAPTIVE_NORMS:
            raise ValueError(f"`adaln` must be one of {', '.join(ADAPTIVE_NORMS)}, got {self.adaln!r}.")
        if self.drop_path_rate is not None and not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate!r}.")
        if not 0 <= self.conditioning_dropout < 1:
            raise ValueError(f"`conditioning_dropout` must lie in [0, 1), got {self.conditioning_dropout!r}.")
        self._validate_conditioning()

    def _validate_conditioning(self):
        if (self.conditioning == "label") != bool(self.labels):
            raise ValueError("`labels` must be a list of names with `conditioning='label'`, and None without.")
        names = {name.strip().lower() for name in self.labels or []}
        if "" in names or len(names) != len(self.labels or []) or any(";" in name for name in names):
            raise ValueError(
                "`labels` must be names that differ in more than upper and lower case, and hold no semicolon, which "
                "separates them."
            )
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


__all__ = ["AarConfig"]
