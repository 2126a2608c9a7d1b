"""
The baseline of next-scale prediction: the same transformer, one token at a time over a plain residual codec. What it
shares with AAR is AAR's own code, so that the order of prediction is all that a comparison compares.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from ..configuration_aar import AarConfig
from ..layers_aar import AarEmbeddings
from ..modeling_aar import AarForConditionalGeneration, AarOutput


def to_frame_major(level_major: torch.Tensor, num_levels: int) -> torch.Tensor:
    """
    From the codec's order, one level after the other, to the order of prediction: all levels of a frame, coarse first,
    then the next frame.

    Args:
        level_major (`torch.Tensor` of shape `(batch_size, num_levels * num_frames, ...)`): something for each code.
        num_levels (`int`): codes of a frame.

    Returns:
        A tensor of the same shape; code q of frame t is at t · num_levels + q.
    """
    return level_major.unflatten(1, (num_levels, -1)).transpose(1, 2).flatten(1, 2)


def to_level_major(frame_major: torch.Tensor, num_levels: int) -> torch.Tensor:
    """The inverse of [`to_frame_major`]."""
    return frame_major.unflatten(1, (-1, num_levels)).transpose(1, 2).flatten(1, 2)


class NextTokenEmbeddings(AarEmbeddings):
    """
    AAR's embeddings for scales of one token each, in frame-major order: a learned position for every token, a learned
    level for each of a frame's. The input of a token is the code vector of the one before, through the same projection
    as AAR's running sums: both models then know the same of a code and have equally many weights to learn it with.
    """

    def __init__(self, config: AarConfig):
        super().__init__(config)
        self.scales = [1] * config.num_slots
        self.start_position = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(
        self, conditioning: torch.Tensor, scale_inputs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`AarEmbeddings`]; `scale_inputs` are the code vectors `(batch_size, length, codebook_dim)`."""
        slots = self.positions + self.levels.weight.repeat(len(self.scales) // self.levels.num_embeddings, 1)
        inputs = (conditioning + self.start_position)[:, None]
        if scale_inputs is not None:
            inputs = torch.cat([inputs, self.project(scale_inputs)], dim=1)
        return inputs + slots[: inputs.shape[1]], slots


class NextTokenModel(AarForConditionalGeneration):
    """
    [`AarForConditionalGeneration`] that predicts codes one by one: all codes of a frame, then the next frame (the
    flattening pattern of MusicGen, arXiv 2306.05284, section 2.2). Width, depth, conditioning, head, initialisation
    and training are AAR's. A second of 75 frames with ten codes each takes 750 forward passes.

    `generate` takes AAR's arguments and gives its output, with three differences: `guidance_scale` applies in full to
    every token, since there is no scale to ramp over; logits and scores come one token at a time, frame by frame; and
    what belongs to scales (`audio_codes`, `streamer`, `gumbel_smoothing`, `unguided_scales`, `max_scales`,
    `compile_config`) is refused.

    Args:
        config ([`AarConfig`]): its codec must be a plain residual one, with equal scales and without φ.

    Raises:
        ValueError: for another codec.

    Example:

    ```python
    >>> codec_config = SatConfig(scales=[75] * 10, phi_kernel_sizes=[])
    >>> model = NextTokenModel(AarConfig(codec_config, conditioning="label", labels=["Dog", "Rain"]))
    >>> waveform = model.generate(**processor(["Dog"], return_tensors="pt"))
    ```"""

    # no remote code is written for it, and no model card
    _auto_class = None

    def __init__(self, config: AarConfig):
        codec_config = config.codec_config
        if len(set(codec_config.scales)) > 1 or codec_config.phi_kernel_sizes:
            raise ValueError(
                "Next-token prediction needs a plain residual codec: give one with equal `scales`, such as ten times "
                "75, and empty `phi_kernel_sizes`."
            )
        super().__init__(config)
        self.num_levels = codec_config.num_scales
        self.model.embeddings = NextTokenEmbeddings(config)
        self.post_init()  # which initialises what is new

    def forward(
        self, audio_codes: torch.LongTensor, dropout_draws: torch.Tensor | None = None, **conditioning: torch.Tensor
    ) -> AarOutput:
        """
        Teacher forcing: predicts all codes of a window, each from those before it, in one pass. In training mode the
        conditioning of a share of the rows is dropped, and residual branches by stochastic depth.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, tokens_per_window)`):
                Codes of the codec, in its order.
            dropout_draws (`torch.FloatTensor` of shape `(batch_size, 1 + 2 * num_hidden_layers)`, *optional*):
                As in [`AarForConditionalGeneration`].
            conditioning:
                One for each window; see `encode_conditioning`.

        Returns:
            [`AarOutput`] with `loss` and `logits`, the latter in the codec's order.

        Raises:
            ValueError: for codes of another shape, or a conditioning that doesn't fit.
        """
        if audio_codes.ndim != 2 or audio_codes.shape[1] != self.config.num_slots:
            raise ValueError(
                f"`audio_codes` must have the shape (batch_size, {self.config.num_slots}), "
                f"got {tuple(audio_codes.shape)}."
            )
        embeds = self._expand_conditioning(self.encode_conditioning(**conditioning), len(audio_codes))
        branch_draws = None
        if self.training:
            if dropout_draws is None:
                dropout_draws = torch.rand(len(embeds), 1 + 2 * self.config.num_hidden_layers, device=embeds.device)
            embeds = self._drop_conditioning(embeds, dropout_draws[:, :1])
            branch_draws = dropout_draws[:, 1:]
        vectors = [
            self._code_vectors(codes, level)
            for level, codes in enumerate(self.codec_model.quantizer.split(audio_codes))
        ]
        previous = torch.stack(vectors, dim=2).flatten(1, 2)[:, :-1]
        output = self.model(embeds, previous, return_dict=True, dropout_draws=branch_draws)
        logits = to_level_major(self.lm_head(output.last_hidden_state), self.num_levels)
        return AarOutput(loss=F.cross_entropy(logits.flatten(0, 1), audio_codes.flatten()), logits=logits)

    def _code_vectors(self, codes: torch.LongTensor, level: int) -> torch.Tensor:
        """Code vectors `(batch_size, length, codebook_dim)` of codes `(batch_size, length)` of one level."""
        return F.embedding(codes, self.codec_model.quantizer.codebook[level])

    def _generate_rows(
        self, rows, config: GenerationConfig, warpers: LogitsProcessorList, streamer: BaseStreamer | None, compiled
    ) -> dict:
        """All tokens of one batch of windows; returns what [`AarForConditionalGeneration`] returns of its scales."""
        of_scales = (rows.given_codes, streamer, config.max_scales, compiled)
        if any(value is not None for value in of_scales) or config.gumbel_smoothing or config.unguided_scales:
            raise ValueError(
                "Next-token generation knows no scales: leave out `audio_codes`, `streamer`, `gumbel_smoothing`, "
                "`unguided_scales`, `max_scales` and `compile_config`."
            )
        return self._run_tokens(self._prepare_passes(rows, compiled), rows, config, warpers)

    def _run_tokens(self, passes, rows, config: GenerationConfig, warpers: LogitsProcessorList) -> dict:
        vectors, all_tokens, result = None, [], {"logits": [], "scores": []}
        for slot in range(self.config.num_slots):
            logits = self._scale_logits(passes, vectors, slot, config.guidance_scale, is_given=False)
            scores = warpers(None, logits.flatten(0, 1)).view_as(logits)
            tokens = self._choose(scores, config.do_sample, rows.generators)
            vectors = self._code_vectors(tokens, slot % self.num_levels)
            all_tokens.append(tokens)
            if config.output_logits:
                result["logits"].append(logits)
            if config.output_scores:
                result["scores"].append(scores)
        codes = to_level_major(torch.cat(all_tokens, dim=1), self.num_levels)
        return result | {"codes": [codes], "f_hat": self._sum_levels(codes)}

    def _sum_levels(self, codes: torch.LongTensor) -> torch.Tensor:
        """The quantizer's running sums `(rows, codebook_dim, num_frames)` after the last level of codes."""
        quantizer = self.codec_model.quantizer
        f_hat = quantizer.empty_f_hat(len(codes))
        for level, level_codes in enumerate(quantizer.split(codes)):
            f_hat, _ = quantizer.accumulate(f_hat, level_codes, level)
        return f_hat
