"""Configuration of SAT, the scale-level audio tokenizer."""

import math
from collections.abc import Callable, Mapping

from transformers.configuration_utils import PreTrainedConfig

# What a field may be: a test, and what passes it in words.
Rule = tuple[Callable[..., bool], str]


def is_positive_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_list(value, is_possible: Callable[..., bool]) -> bool:
    """Whether it is a list (or tuple) of possible values."""
    return isinstance(value, (list, tuple)) and all(map(is_possible, value))


def number_between(low: float, high: float) -> Rule:
    return lambda value: is_number(value) and low <= value <= high, f"a number between {low} and {high}"


def one_of(*choices: str) -> Rule:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def check_fields(config: PreTrainedConfig, rules: Mapping[str, Rule]) -> None:
    """Raises a `ValueError` that names the first field whose value doesn't pass the test of its rule."""
    for name, (is_possible, expected) in rules.items():
        value = getattr(config, name)
        if not is_possible(value):
            raise ValueError(f"`{name}` must be {expected}, got {' '.join(repr(value).split())}.")


POSITIVE_INTEGER: Rule = (is_positive_integer, "a positive whole number")
POSITIVE_INTEGERS: Rule = (
    lambda values: is_list(values, is_positive_integer) and len(values) > 0,
    "a list of positive whole numbers",
)
ODD_INTEGERS: Rule = (
    lambda values: is_list(values, lambda value: is_positive_integer(value) and value % 2 == 1),
    "a list of odd positive whole numbers",
)
POSITIVE_NUMBER: Rule = (lambda value: is_number(value) and value > 0, "a positive number")
SHARE_BELOW_ONE: Rule = (lambda value: is_number(value) and 0 <= value < 1, "a number of at least 0 and below 1")
YES_OR_NO: Rule = (lambda value: isinstance(value, bool), "True or False")

FIELD_RULES = {
    **dict.fromkeys(
        (
            *("sampling_rate", "audio_channels", "num_filters", "num_residual_layers", "kernel_size", "compress"),
            *("last_kernel_size", "residual_kernel_size", "dilation_growth_rate", "hidden_size", "codebook_dim"),
            *("codebook_size", "num_lstm_layers", "kmeans_iterations"),
        ),
        POSITIVE_INTEGER,
    ),
    **dict.fromkeys(("upsampling_ratios", "scales"), POSITIVE_INTEGERS),
    "phi_kernel_sizes": ODD_INTEGERS,
    **dict.fromkeys(("use_conv_shortcut", "use_causal_conv"), YES_OR_NO),
    "pad_mode": one_of("reflect", "constant", "replicate", "circular"),
    "norm_type": one_of("weight_norm", "time_group_norm"),
    "trim_right_ratio": number_between(0, 1),
    # at most a day, so that its samples can be counted
    "window_length_s": number_between(0, 86_400),
    "overlap": number_between(0, 0.5),
    "codebook_decay": SHARE_BELOW_ONE,
    "dead_code_threshold": SHARE_BELOW_ONE,
}


class SatConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SatModel`]: a SEANet encoder and decoder around a multi-scale residual quantizer. The defaults
    are the published model with D = C = 128 of "Efficient Autoregressive Audio Modeling via Next-Scale Prediction"
    (arXiv 2408.09027).

    Args:
        sampling_rate (`int`, defaults to 24000):
            Samples per second of the audio, in Hz.
        audio_channels (`int`, defaults to 1):
            Channels of the audio.
        upsampling_ratios (`list[int]`, defaults to `[8, 5, 4, 2]`):
            Strides of the decoder, first layer first; the encoder uses them in reverse. Their product is the hop
            length.
        num_filters (`int`, defaults to 32):
            Channels of the encoder's first convolution, doubled by every stride.
        num_residual_layers, kernel_size, last_kernel_size, residual_kernel_size, dilation_growth_rate, compress,
        num_lstm_layers, use_conv_shortcut, use_causal_conv, pad_mode, trim_right_ratio, norm_type:
            The other SEANet fields, with the meaning they have in [`EncodecConfig`]. Unlike there, convolutions are
            non-causal by default.
        hidden_size (`int`, defaults to 128):
            Channels of the encoder's output (D).
        codebook_dim (`int`, defaults to 128):
            Width of a code vector (C, the paper's latent dimension). Projections are added when it differs from D.
        codebook_size (`int`, defaults to 1024):
            Entries per codebook (V); every scale has its own codebook.
        scales (`list[int]`, defaults to the 16 published ones, 1 to 75):
            Tokens per scale, coarse to fine; the last one equals the frames of a window. Equal numbers are allowed:
            ten times 75 with no φ is a plain residual codec.
        phi_kernel_sizes (`list[int]`, defaults to six times 9):
            Kernel size of each of the K convolutions φ that the scales share. Empty means no φ.
        window_length_s (`float`, defaults to 1.0):
            Length of one window in seconds.
        overlap (`float`, defaults to 0.0):
            Share of a window that it has in common with the next one, 0 to 0.5; overlapping windows are cross-faded.
        codebook_decay (`float`, defaults to 0.99):
            Decay of the codebooks' moving averages in training.
        dead_code_threshold (`float`, defaults to 0.03):
            A code restarts from a sampled vector when its average use falls below this share of its scale's mean use.
        kmeans_iterations (`int`, defaults to 50):
            Iterations of the k-means that starts the codebooks on the first training batch.

    Raises:
        ValueError: when the values don't fit each other; the message names the field.

    Example:

    ```python
    >>> from transformers_aar import SatConfig, SatModel

    >>> model = SatModel(SatConfig())
    >>> model.config.tokens_per_window
    455
    ```"""

    model_type = "sat"

    sampling_rate: int = 24_000
    audio_channels: int = 1
    upsampling_ratios: list[int] | tuple[int, ...] = (8, 5, 4, 2)
    num_filters: int = 32
    num_residual_layers: int = 1
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    num_lstm_layers: int = 2
    use_conv_shortcut: bool = True
    use_causal_conv: bool = False
    pad_mode: str = "reflect"
    trim_right_ratio: float = 1.0
    norm_type: str = "weight_norm"
    hidden_size: int = 128
    codebook_dim: int = 128
    codebook_size: int = 1024
    scales: list[int] | tuple[int, ...] = (1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75)
    phi_kernel_sizes: list[int] | tuple[int, ...] = (9, 9, 9, 9, 9, 9)
    window_length_s: float = 1.0
    overlap: float = 0.0
    codebook_decay: float = 0.99
    dead_code_threshold: float = 0.03
    kmeans_iterations: int = 50

    def __post_init__(self, **kwargs):
        # JSON knows no tuples: lists throughout keep a saved configuration equal to the live one
        for name in ("upsampling_ratios", "scales", "phi_kernel_sizes"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Raises a `ValueError` that names the first field whose value is impossible."""
        check_fields(self, FIELD_RULES)
        if self.compress > self.num_filters:
            raise ValueError(
                f"`compress` ({self.compress}) must not exceed `num_filters` ({self.num_filters}): the first residual "
                "block would have no channels."
            )
        if self.trim_right_ratio != 1 and not self.use_causal_conv:
            raise ValueError(f"`trim_right_ratio` must be 1 without `use_causal_conv`, got {self.trim_right_ratio}.")
        if len(self.phi_kernel_sizes) > len(self.scales):
            raise ValueError(
                f"`phi_kernel_sizes` has {len(self.phi_kernel_sizes)} convolutions for {len(self.scales)} scales; "
                "give at most one per scale."
            )
        if list(self.scales) != sorted(self.scales):
            raise ValueError(f"`scales` must not decrease, got {self.scales}.")
        if self.window_length < 1 or self.window_length % self.hop_length:
            raise ValueError(
                f"`window_length_s` of {self.window_length_s} s is {self.window_length} samples, which is no positive "
                f"multiple of the hop length {self.hop_length} (the product of `upsampling_ratios`)."
            )
        if self.scales[-1] != self.window_length // self.hop_length:
            raise ValueError(
                f"The last of `scales` must be the {self.window_length // self.hop_length} frames of a window, "
                f"got {self.scales[-1]}."
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.hop_length

    @property
    def window_length(self) -> int:
        """Samples per window."""
        return round(self.window_length_s * self.sampling_rate)

    @property
    def window_stride(self) -> int:
        """Samples from the start of one window to the start of the next."""
        return self.window_length - round(self.overlap * self.window_length)

    @property
    def num_scales(self) -> int:
        return len(self.scales)

    @property
    def tokens_per_window(self) -> int:
        return sum(self.scales)

    @property
    def bandwidth(self) -> float:
        """Bit rate of the codes in kbit per second of audio."""
        bits_per_window = self.tokens_per_window * math.log2(self.codebook_size)
        return bits_per_window * self.sampling_rate / self.window_stride / 1000

    def num_windows(self, num_samples: int) -> int:
        """Windows that cover `num_samples` samples of audio; at least one."""
        return 1 + max(0, math.ceil((num_samples - self.window_length) / self.window_stride))


SatConfig.register_for_auto_class()

__all__ = ["SatConfig"]
