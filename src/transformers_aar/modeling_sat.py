"""SAT, the scale-level audio tokenizer: SEANet blocks around a multi-scale residual quantizer (arXiv 2408.09027)."""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecDecoder, EncodecEncoder
from transformers.utils import ModelOutput

from .configuration_sat import SatConfig
from .layers_sat import (
    ChannelsLastConv1d,
    ChannelsLastConvTranspose1d,
    FoldedWeightNorm,
    SatConv1d,
    at_least_fp32,
    specialize,
)
from .quantizer_sat import SatQuantizer


@dataclass
class SatEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens)`):
            Codes of every window, one scale after the other, coarse first. `tokens` is `config.tokens_per_window`, or
            less when only the first scales were asked for. Windows that lie entirely in the padding hold zeros.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_windows)`):
            False for windows that lie entirely in the padding.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None


@dataclass
class SatDecoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
            Decoded waveform.
    """

    audio_values: torch.FloatTensor | None = None


@dataclass
class SatOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean absolute error of the waveform plus the commitment loss: a complete, if plain, training objective.
            Absent when `audio_codes` were given.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens_per_window)`):
            Codes of every window, coarse scales first.
        audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
            Reconstruction, of the input's length.
        commitment_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean of the scales' commitment losses. Absent when `audio_codes` were given.
    """

    loss: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_values: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None


class SharingMixin:
    """
    What both models have in common: saved, they name all their Auto classes, and bring a model card; loaded they are
    from safetensors only; and outputs are tuples where a call or the config says so.
    """

    # called with (model, folder); the package sets it, and without the package there is no card
    model_card_writer: ClassVar[Callable | None] = None
    # Auto classes besides the one that the library records by itself
    other_auto_classes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded: leave out `use_safetensors=False`, or convert the weights.")
        return super().from_pretrained(*args, **kwargs | {"use_safetensors": True})

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        for name in self.config.sub_configs:
            # what loading writes there: a model that was loaded is saved with the same configuration again
            if (sub_config := getattr(self.config, name)) is not None:
                sub_config.dtype = self.dtype
        for name in self.config._get_generation_parameters():
            # the pipeline of some versions leaves its arguments here, and the library then refuses to save
            delattr(self.config, name)
        if self._auto_class is not None:
            name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = known | dict.fromkeys(self.other_auto_classes, name)
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            self._write_model_card(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # by now the library has put its stock card over ours
        self._write_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _output(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _write_model_card(self, folder) -> None:
        # a backbone by itself has no Auto class, and no card
        if SharingMixin.model_card_writer is not None and self._auto_class is not None:
            SharingMixin.model_card_writer(self, folder)


class SatPreTrainedModel(SharingMixin, PreTrainedAudioTokenizerBase):
    config_class = SatConfig
    base_model_prefix = "sat"
    main_input_name = "input_values"
    input_modalities = "audio"
    other_auto_classes = ("AutoModelForAudioTokenization",)
    _no_split_modules = ["SatQuantizer", "EncodecResnetBlock", "EncodecLSTM"]
    # not all of the quantizer: its flag and its counter are no floating-point tensors, and would become some
    _keep_in_fp32_modules_strict = [
        *("quantizer.codebook", "quantizer.cluster_size", "quantizer.phi"),
        *("quantizer.project_in", "quantizer.project_out"),
    ]
    # published folders may leave out what only training needs; it then restarts from the codebooks
    _keys_to_ignore_on_load_missing = [r"quantizer\.codebook_sum$"]
    # the codec has no attention; a generator's choice is handed down to it all the same
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module):
        """PyTorch's own defaults, as in the reference, through helpers that leave loaded tensors alone."""
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Linear)):
            if parametrize.is_parametrized(module, "weight"):
                magnitude = module.parametrizations.weight.original0
                weight = module.parametrizations.weight.original1
                init.kaiming_uniform_(weight, a=math.sqrt(5))
                init.copy_(magnitude, torch.norm_except_dim(weight, 2, 0))
            else:
                weight = module.weight
                init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -1 / math.sqrt(module.hidden_size), 1 / math.sqrt(module.hidden_size))
        elif isinstance(module, SatQuantizer):
            init.uniform_(module.codebook, -1.0, 1.0)
            init.ones_(module.cluster_size)
            init.copy_(module.codebook_sum, module.codebook * module.cluster_size[..., None])
            init.zeros_(module.initialized)
            init.zeros_(module.num_updates)


class SatModel(SatPreTrainedModel):
    """
    The scale-level audio tokenizer: audio of any length becomes windows of one second, and each window
    `config.tokens_per_window` codes in `config.num_scales` scales, coarse to fine.

    Example:

    ```python
    >>> from transformers import AutoFeatureExtractor, AutoModel
    >>> import transformers_aar

    >>> model = AutoModel.from_pretrained(folder)
    >>> feature_extractor = AutoFeatureExtractor.from_pretrained(folder)
    >>> inputs = feature_extractor(waveform, sampling_rate=24_000, return_tensors="pt")
    >>> with torch.no_grad():
    ...     codes = model.encode(**inputs).audio_codes
    ...     waveform = model.decode(codes, padding_mask=inputs["padding_mask"]).audio_values
    ```"""

    # windows that `encode` and `decode` hold in memory at once, some 30 MB each for the published sizes
    windows_per_batch = 32

    def __init__(self, config: SatConfig):
        super().__init__(config)
        self.encoder = EncodecEncoder(config)
        self.decoder = EncodecDecoder(config)
        self.quantizer = SatQuantizer(config)
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, EncodecConv1d):
                SatConv1d.convert(module)
            elif isinstance(module, nn.Conv1d):
                specialize(module, ChannelsLastConv1d)
            elif isinstance(module, nn.ConvTranspose1d):
                specialize(module, ChannelsLastConvTranspose1d)
            if parametrize.is_parametrized(module, "weight"):
                module.parametrizations.weight[0] = FoldedWeightNorm()
        self._apply(lambda tensor: tensor)  # see AtLeastFp32
        self.post_init()

    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        max_scales: int | None = None,
        return_dict: bool | None = None,
    ) -> SatEncoderOutput | tuple:
        """
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
                Waveform at `config.sampling_rate`.
            padding_mask (`torch.BoolTensor` or `torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples of the sound, 0 for padding at its end.
            max_scales (`int`, *optional*):
                Codes of the first, coarse scales only.
            return_dict (`bool`, *optional*):
                `False` for a tuple.

        Returns:
            [`SatEncoderOutput`] with the codes `(batch_size, num_windows, tokens)`. Each item gets the codes that it
            gets alone. A GPU's convolutions round to TF32 by default, and many codes are other ones than a CPU's then,
            though no worse; `torch.backends.cudnn.allow_tf32 = False` keeps them alike.

        Raises:
            ValueError: for a wrong shape or number of scales, and for padding that isn't at the end.
        """
        num_scales = self._check_max_scales(max_scales)
        windows, window_mask = self._split_windows(input_values, padding_mask)
        codes = [
            self.quantizer.encode(self.encoder(batch), num_scales)
            for batch in _chosen(windows, window_mask).split(self.windows_per_batch)
        ]
        audio_codes = _put_back(torch.cat(codes), window_mask, windows.shape[:2])
        if window_mask is None:
            window_mask = torch.ones(windows.shape[:2], dtype=torch.bool, device=windows.device)
        return self._output(SatEncoderOutput(audio_codes=audio_codes, audio_codes_mask=window_mask), return_dict)

    def decode(
        self,
        audio_codes: torch.LongTensor,
        padding_mask: torch.Tensor | None = None,
        max_scales: int | None = None,
        return_dict: bool | None = None,
    ) -> SatDecoderOutput | tuple:
        """
        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens)`):
                Codes of all scales, or of the first few.
            padding_mask (`torch.BoolTensor` or `torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                The mask that the sound was encoded with; the result then has exactly its length, with zeros in the
                padding. Without it the result is as long as its windows.
            max_scales (`int`, *optional*):
                Decode the first, coarse scales only.
            return_dict (`bool`, *optional*):
                `False` for a tuple.

        Returns:
            [`SatDecoderOutput`] with the waveform `(batch_size, audio_channels, num_samples)`.

        Raises:
            ValueError: for codes out of range, incomplete scales, or a mask of another length.
        """
        num_scales = self._check_max_scales(max_scales)
        self._check_codes(audio_codes)
        audio_codes = audio_codes[..., : sum(self.config.scales[:num_scales])].long()
        window_mask = None if padding_mask is None else self._window_mask(padding_mask)
        if window_mask is not None and window_mask.shape != audio_codes.shape[:2]:
            raise ValueError(
                f"`padding_mask` belongs to {tuple(window_mask.shape)} windows (batch, windows) but `audio_codes` "
                f"holds {tuple(audio_codes.shape[:2])}; pass the mask that the sound was encoded with."
            )
        batches = _chosen(audio_codes, window_mask).split(self.windows_per_batch)
        decoded = torch.cat([self._decode_windows(batch) for batch in batches])
        audio_values = self._join_windows(_put_back(decoded, window_mask, audio_codes.shape[:2]), window_mask)
        if padding_mask is not None:
            audio_values = audio_values[..., : padding_mask.shape[-1]]
            audio_values = audio_values * padding_mask[:, None].to(audio_values.dtype)
        return self._output(SatDecoderOutput(audio_values=audio_values), return_dict)

    def decode_f_hat(self, f_hat: torch.Tensor) -> torch.FloatTensor:
        """
        Waveform `(batch_size, audio_channels, num_samples)` of the quantizer's running sums `(batch_size, num_windows,
        codebook_dim, num_frames)`, as a generator has them in hand; see [`SatQuantizer.accumulate`].
        """
        latents = self.quantizer.project_f_hat(f_hat.flatten(0, 1)).to(self.dtype)
        windows = torch.cat([self.decoder(batch) for batch in latents.split(self.windows_per_batch)])
        return self._join_windows(windows.unflatten(0, f_hat.shape[:2]), None)

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        return_dict: bool | None = None,
    ) -> SatOutput | tuple:
        """
        Encodes and decodes with gradients, all windows at once. In training mode the codebooks move; see
        [`SatQuantizer`]. For long audio without gradients use `encode` and `decode`.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`).
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*): 0 for padding at the end.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens)`, *optional*):
                Decode these instead of the input's own.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            [`SatOutput`].
        """
        if audio_codes is not None:
            if padding_mask is None:
                padding_mask = torch.ones_like(input_values[:, 0], dtype=torch.bool)
            audio_values = self.decode(audio_codes, padding_mask, return_dict=True).audio_values
            return self._output(SatOutput(audio_codes=audio_codes, audio_values=audio_values), return_dict)

        windows, window_mask = self._split_windows(input_values, padding_mask)
        quantized = self.quantizer(self.encoder(_chosen(windows, window_mask)))
        decoded = self.decoder(quantized.quantized.to(self.dtype))
        audio_codes = _put_back(quantized.audio_codes, window_mask, windows.shape[:2])
        decoded_windows = _put_back(decoded, window_mask, windows.shape[:2])
        audio_values = self._join_windows(decoded_windows, window_mask)[..., : input_values.shape[-1]]
        error = (at_least_fp32(audio_values) - at_least_fp32(input_values)).abs()
        if padding_mask is None:
            reconstruction_loss = error.mean()
        else:
            audio_values = audio_values * padding_mask[:, None].to(audio_values.dtype)
            error = error * padding_mask[:, None]
            reconstruction_loss = error.sum() / (padding_mask.sum() * input_values.shape[1])
        commitment_loss = quantized.commitment_losses.mean()
        output = SatOutput(
            loss=reconstruction_loss + commitment_loss,
            audio_codes=audio_codes,
            audio_values=audio_values,
            commitment_loss=commitment_loss,
        )
        return self._output(output, return_dict)

    def split_scales(self, audio_codes: torch.LongTensor) -> list[torch.LongTensor]:
        """Codes `(batch_size, num_windows, tokens)` as one tensor `(batch_size, num_windows, n_s)` per scale."""
        return list(self.quantizer.split(audio_codes))

    def merge_scales(self, scale_codes: list[torch.LongTensor]) -> torch.LongTensor:
        """Joins what `split_scales` has split; all or the first few scales."""
        audio_codes = torch.cat(list(scale_codes), dim=-1)
        self.quantizer.split(audio_codes)  # refuses incomplete scales
        return audio_codes

    def start_codebooks(self, input_values: torch.Tensor) -> None:
        """k-means start of the codebooks from windows `(batch_size, audio_channels, window_length)`; see training."""
        with torch.no_grad():
            hidden = [self.encoder(batch.to(self.dtype)) for batch in input_values.split(self.windows_per_batch)]
            self.quantizer.start_codebooks(torch.cat(hidden))

    @contextmanager
    def accumulate_codebook_statistics(self):
        """
        Within this context forwards in training mode leave the codebooks alone; the first forward outside moves them
        by all vectors seen since the last move. For gradient accumulation, as `no_sync` of DistributedDataParallel.
        """
        self.quantizer._defer_update = True
        try:
            yield
        finally:
            self.quantizer._defer_update = False

    def fingerprint(self) -> str:
        """
        SHA-256, as 64 hexadecimal digits, of everything that gives codes their meaning: the framing, the codebooks and
        φ. Codes of a model with another fingerprint can't be decoded by this one.
        """
        fields = ("sampling_rate", "audio_channels", "hop_length", "scales", "window_length", "window_stride")
        digest = hashlib.sha256(json.dumps({name: getattr(self.config, name) for name in fields}).encode())
        for tensor in (self.quantizer.codebook, *self.quantizer.phi.parameters()):
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _check_max_scales(self, max_scales: int | None) -> int:
        if max_scales is None:
            return self.config.num_scales
        if not isinstance(max_scales, Integral) or not 1 <= max_scales <= self.config.num_scales:
            raise ValueError(f"`max_scales` must lie between 1 and {self.config.num_scales}, got {max_scales}.")
        return max_scales

    def _check_codes(self, audio_codes: torch.LongTensor) -> None:
        if audio_codes.ndim != 3:
            raise ValueError(
                f"`audio_codes` must have the shape (batch_size, num_windows, tokens), got {tuple(audio_codes.shape)}."
            )
        self.quantizer.split(audio_codes)  # refuses incomplete scales
        if audio_codes.is_floating_point() or audio_codes.dtype == torch.bool or audio_codes.numel() == 0:
            raise ValueError("`audio_codes` must hold whole numbers, at least one window of them.")
        if torch.compiler.is_compiling():
            return  # an exported graph can't look
        low, high = torch.stack(torch.aminmax(audio_codes)).tolist()
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"`audio_codes` must lie between 0 and {self.config.codebook_size - 1}, got {low} to {high}; they "
                "belong to another codec."
            )

    def _window_mask(self, padding_mask: torch.Tensor) -> torch.BoolTensor:
        """True `(batch_size, num_windows)` for the windows that an item needs when it is encoded alone."""
        num_windows = self.config.num_windows(padding_mask.shape[-1])
        covered_before = torch.arange(num_windows, device=padding_mask.device) * self.config.window_stride
        covered_before = covered_before + self.config.window_length - self.config.window_stride
        covered_before[0] = -1
        return covered_before < padding_mask.sum(-1, keepdim=True)

    def _split_windows(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.BoolTensor | None]:
        """
        Windows `(batch_size, num_windows, audio_channels, window_length)`, zero-padded, and which of them count, where
        not all do.
        """
        if input_values.ndim != 3 or input_values.shape[1] != self.config.audio_channels or not input_values.numel():
            raise ValueError(
                f"`input_values` must have the shape (batch_size, {self.config.audio_channels}, num_samples) with at "
                f"least one sample, got {tuple(input_values.shape)}."
            )
        batch_size, _, num_samples = input_values.shape
        input_values, window_mask = input_values.to(self.dtype), None
        if padding_mask is not None:
            self._check_padding_mask(padding_mask, (batch_size, num_samples))
            input_values = input_values * padding_mask[:, None].to(self.dtype)
            window_mask = self._window_mask(padding_mask)
        stride, length = self.config.window_stride, self.config.window_length
        full_length = (self.config.num_windows(num_samples) - 1) * stride + length
        windows = F.pad(input_values, (0, full_length - num_samples)).unfold(-1, length, stride)
        return windows.transpose(1, 2), window_mask

    @staticmethod
    def _check_padding_mask(padding_mask: torch.Tensor, shape: tuple[int, int]) -> None:
        if padding_mask.shape != shape:
            raise ValueError(f"`padding_mask` must have the shape {shape}, got {tuple(padding_mask.shape)}.")
        if (padding_mask[:, 1:].long() > padding_mask[:, :-1].long()).any():
            raise ValueError("`padding_mask` has padding before sound; padding belongs at the end.")

    def _decode_windows(self, codes: torch.LongTensor) -> torch.Tensor:
        """Waveforms `(windows, audio_channels, window_length)` of codes `(windows, tokens)`."""
        return self.decoder(self.quantizer.decode(codes).to(self.dtype))

    def _join_windows(self, windows: torch.Tensor, window_mask: torch.BoolTensor | None) -> torch.Tensor:
        """
        Waveform `(batch_size, audio_channels, num_samples)` of windows `(batch_size, num_windows, audio_channels,
        window_length)`. Where windows overlap they are cross-faded linearly; absent windows have no weight.
        """
        batch_size, num_windows, channels, length = windows.shape
        stride = self.config.window_stride
        if stride == length or num_windows == 1:
            return windows.transpose(1, 2).reshape(batch_size, channels, num_windows * length)
        # the smallest weights are no normal numbers of a shorter dtype
        dtype, windows = windows.dtype, at_least_fp32(windows)
        ramp = (torch.arange(length, device=windows.device) + 0.5) / (length - stride)
        fade = torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0).to(windows.dtype)
        weights = fade.expand(batch_size, num_windows, 1, -1)
        if window_mask is not None:
            weights = weights * window_mask[:, :, None, None]
        total = (num_windows - 1) * stride + length
        joined = windows.new_zeros(batch_size, channels, total)
        weight_sum = windows.new_zeros(batch_size, 1, total)
        for index in range(num_windows):
            span = slice(index * stride, index * stride + length)
            joined[..., span] += windows[:, index] * weights[:, index]
            weight_sum[..., span] += weights[:, index]
        # absent windows at the end leave samples without any weight, which stay zero
        return (joined / weight_sum.clamp(min=torch.finfo(weight_sum.dtype).tiny)).to(dtype)


def _chosen(windows: torch.Tensor, window_mask: torch.BoolTensor | None) -> torch.Tensor:
    """The windows that count, `(windows, …)`, of `(batch_size, num_windows, …)`; without a mask they all do."""
    return windows.flatten(0, 1) if window_mask is None else windows[window_mask]


def _put_back(chosen: torch.Tensor, window_mask: torch.BoolTensor | None, shape: torch.Size) -> torch.Tensor:
    """What became of the chosen windows, `(batch_size, num_windows, …)` again; zeros for those that don't count."""
    if window_mask is None:
        return chosen.unflatten(0, shape)
    windows = chosen.new_zeros(*shape, *chosen.shape[1:])
    windows[window_mask] = chosen
    return windows


SatModel.register_for_auto_class("AutoModel")

__all__ = ["SatPreTrainedModel", "SatModel"]
