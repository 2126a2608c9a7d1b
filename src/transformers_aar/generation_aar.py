"""Next-scale generation: sixteen forward passes for a second of sound (arXiv 2408.09027, section 3.2)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .compilation_aar import CompiledScales, compiled_scales
from .layers_aar import AarPreparedScales
from .linear_aar import has_fixed_linears

logger = logging.get_logger(__name__)

# what `generate` reads of a generation config; custom fields come with the value they have when nobody sets them
_CUSTOM_DEFAULTS = {
    **{"num_windows": 1, "max_batch_rows": 128, "gumbel_smoothing": False},
    **{"unguided_scales": 0, "max_scales": None},
}
_LIBRARY_FIELDS = (
    *("do_sample", "guidance_scale", "temperature", "top_k", "top_p", "num_return_sequences"),
    *("return_dict_in_generate", "output_scores", "output_logits", "compile_config"),
)
# what the text-to-audio pipeline and loaded files always carry, and what has no effect here
_TOLERATED_FIELDS = (
    *("max_new_tokens", "max_length", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config", "is_assistant"),
)


@dataclass
class AarGenerateOutput(ModelOutput):
    """
    Args:
        audio (`torch.FloatTensor` of shape `(num_sounds, audio_channels, num_samples)`):
            Generated waveforms.
        audio_codes (`torch.LongTensor` of shape `(num_sounds, num_windows, tokens)`):
            Their codes: of all scales, or of the first `max_scales`. They decode to `audio`, unless Gumbel smoothing
            was on.
        scores (`tuple(torch.FloatTensor)`, *optional*):
            Per generated scale the logits `(num_sounds · num_windows, n_s, codebook_size)` that were sampled from:
            guided, with temperature, top-k and top-p.
        logits (`tuple(torch.FloatTensor)`, *optional*):
            The same before temperature, top-k and top-p, after guidance.
        lengths (`torch.LongTensor` of shape `(num_sounds,)`):
            Samples per sound.
    """

    audio: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    scores: tuple[torch.FloatTensor, ...] | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None
    lengths: torch.LongTensor | None = None


class AarCacheLayer(CacheLayerMixin):
    """
    Keys and values of one block, allocated once for all slots. Attention gets a view of those written so far, so that
    neither a mask nor a copy is needed, and lengths are known without asking the device. A pass of fewer rows
    than the first goes on with the first of them.
    """

    is_sliding = False

    def __init__(self, num_slots: int):
        super().__init__()
        self.num_slots = num_slots
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, head_dim = key_states.shape
        shape = (rows, heads, self.num_slots, head_dim)
        # what is made in inference mode can't be written to in a later call outside of it
        with torch.inference_mode(False):
            self.keys = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.values = torch.empty_like(self.keys)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end = len(key_states), self.length + key_states.shape[-2]
        self.keys[:rows, :, self.length : end] = key_states
        self.values[:rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def reset(self) -> None:
        self.length = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.num_slots

    # the name of the same method in versions of the library before `get_max_length`
    get_max_cache_shape = get_max_length


class AarTopKWarper(TopKLogitsWarper):
    """The library's filter, bit for bit; but its `topk` sorts what it keeps, which here is most of the codebook."""

    def __call__(self, input_ids: torch.LongTensor | None, scores: torch.FloatTensor) -> torch.FloatTensor:
        codebook_size = scores.shape[-1]
        # the k-th largest, counted from the other end
        rank = codebook_size - min(self.top_k, codebook_size) + 1
        lowest = scores.kthvalue(rank, dim=-1, keepdim=True).values
        return scores.masked_fill(scores < lowest, self.filter_value)


class AarPreviewStreamer(BaseStreamer):
    """
    Streamer for `generate` that decodes what is known of the sound after every scale, coarse to fine.

    Args:
        codec_model ([`SatModel`]): the generator's codec.
        on_preview (`Callable[[int, torch.Tensor], None]`):
            Called with the number of scales so far and the waveform `(num_sounds, audio_channels, num_samples)`.
    """

    def __init__(self, codec_model, on_preview: Callable[[int, torch.Tensor], None]):
        self.codec_model = codec_model
        self.on_preview = on_preview
        self.scales: list[torch.LongTensor] = []

    def put(self, value: torch.LongTensor) -> None:
        """Takes the codes `(num_sounds, num_windows, n_s)` of the next scale."""
        self.scales.append(value)
        audio = self.codec_model.decode(self.codec_model.merge_scales(self.scales), return_dict=True).audio_values
        self.on_preview(len(self.scales), audio)

    def end(self) -> None:
        self.scales.clear()


@dataclass
class _Rows:
    """The rows of one pass: some windows of some sounds, sound-major."""

    num_windows: int
    conditioning: torch.Tensor
    unconditional: torch.Tensor | None
    given_codes: torch.LongTensor | None
    generators: list[torch.Generator] | torch.Generator | None


@dataclass
class _Passes:
    """What the passes of one batch share. Of the rows in `prepared` the conditional ones come first."""

    num_rows: int
    prepared: AarPreparedScales
    cache: Cache
    compiled: CompiledScales | None


class AarGenerationMixin(GenerationMixin):
    """Gives [`AarForConditionalGeneration`] its `generate`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        conditioning_embeds: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        is_longer: torch.Tensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        negative_conditioning_embeds: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        audio_codes: torch.LongTensor | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs,
    ) -> torch.FloatTensor | AarGenerateOutput:
        r"""
        Generates sounds, coarse scales first:

        1. Conditioning vectors are computed, and repeated for every returned sound and window; for guidance the same
           number of unconditional rows joins the batch.
        2. Whatever doesn't depend on tokens (the blocks' modulation) is computed once.
        3. For each scale s = 0 … S − 1 one forward pass predicts all its tokens from the scales before, whose keys and
           values are in a cache of fixed size.
        4. Guidance: logits = (1 + t)·conditional − t·unconditional with t = guidance_scale · s / (S − 1), where the
           unconditional rows haven't been dropped.
        5. Temperature, top-k and top-p, then one draw per token.
        6. The tokens' contribution is added to the quantizer's running sum, which pooled is the next scale's input.
        7. The codec decodes the sum; several windows are joined.

        Args:
            input_ids, attention_mask, conditioning_embeds, input_features, is_longer:
                The conditioning, one per sound; see `encode_conditioning`. A model without conditioning takes none, or
                `input_ids` for the number of sounds only.
            negative_input_ids, negative_attention_mask, negative_conditioning_embeds (*optional*):
                What to steer away from, in place of "no conditioning": one, or one per sound.
            generation_config ([`GenerationConfig`], *optional*):
                Defaults for everything below; the model's own otherwise.
            generator (`torch.Generator` or a list of them, *optional*):
                One for all draws, or one per returned sound, which makes each sound independent of its batch.
            audio_codes (`torch.LongTensor` of shape `(num_sounds or 1, num_windows, tokens)`, *optional*):
                Codes of the first scales, which are kept: the rest is sampled around them. Whole scales only. Their
                number of windows replaces `num_windows`.
            streamer ([`BaseStreamer`], *optional*):
                Receives the codes `(num_sounds, num_windows, n_s)` of each scale as soon as it is finished.
            kwargs:
                `guidance_scale` (`float`, default 4.0): the paper's *maximum* of a ramp over the scales that starts at
                0. It is not the library's classifier-free guidance scale, where 1.0 means off and which applies in
                full to every token: here 0.0 means off (and saves the unconditional rows), and w corresponds to 1 + w
                there, reached at the last scale.
                `unguided_scales` (`int`, 0): the last so many scales are not guided, which halves their rows, and they
                are the largest. What is saved grows with this number, and so does what is lost: the ramp is at its
                strongest in these scales, so their details follow the conditioning less.
                `max_scales` (`int`, all of them by default): stop after the first so many scales, as in
                [`SatModel.encode`]; the ramp stays that of all scales. The sound is what the codec makes of coarse
                scales: whatever it keeps in the finer ones is missing.
                `do_sample` (`bool`, default `True`): `False` takes the most likely token.
                `temperature` (`float`, 1.0), `top_k` (`int`, 900), `top_p` (`float`, 0.95): as in the library.
                `num_return_sequences` (`int`, 1): sounds per conditioning.
                `num_windows` (`int`, 1): windows per sound. They are independent draws, joined by the codec; they
                don't continue each other.
                `gumbel_smoothing` (`bool`, `False`): decode mixtures of code vectors instead of hard choices. For
                listening only: the returned codes don't decode to that sound.
                `max_batch_rows` (`int`, 128): rows of the largest batch, which bounds the memory; a window is one row,
                and two with guidance. A sound with more windows than fit is drawn in pieces, and then its draws depend
                on this number.
                `compile_config` ([`CompileConfig`], *optional*): put the pass of every scale through `torch.compile`,
                on any device. Each scale is compiled on its own, for each number of rows and dtype, which takes long;
                the graphs are kept for later calls. Logits then differ by rounding, and so may draws. Its `mode` is
                "reduce-overhead" by default, which on a GPU means CUDA graphs and has not been run yet: a call without
                a streamer, with generators of the GPU or none, is recorded whole, for its shapes and settings, and
                then repeated with other conditionings and draws. Where compilation or recording fails there is a
                warning, and everything runs as without it.
                `return_dict_in_generate`, `output_scores`, `output_logits` (`bool`, `False`).

        Returns:
            Waveforms `(num_sounds, audio_channels, num_samples)`, or an [`AarGenerateOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: for arguments that have no meaning here, by name, and for inputs that don't fit.
        """
        config = self._resolve_generation_config(generation_config, kwargs)
        embeds = self._checked_conditioning(conditioning_embeds, input_ids, attention_mask, input_features, is_longer)
        if embeds is None:
            num_sounds = next((len(given) for given in (input_ids, audio_codes) if given is not None), 1)
            embeds = self._expand_conditioning(None, num_sounds)
        embeds = embeds.repeat_interleave(config.num_return_sequences, dim=0)
        negative = self._negative_conditioning(
            len(embeds), config, negative_conditioning_embeds, negative_input_ids, negative_attention_mask
        )
        given = self._check_given_codes(audio_codes, len(embeds), config)
        num_windows = config.num_windows if given is None else given.shape[1]
        generator = list(generator) if isinstance(generator, (list, tuple)) else generator
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator | None):
                raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, got {one!r}.")
        if isinstance(generator, list) and len(generator) != len(embeds):
            raise ValueError(
                f"Got {len(generator)} generators for {len(embeds)} sounds; give one for each, or one in all."
            )

        max_windows = max(config.max_batch_rows // (1 if negative is None else 2), 1)
        parts = list(self._split_rows(embeds, negative, given, generator, num_windows, max_windows))
        if streamer is not None and len(parts) > 1:
            raise ValueError(
                f"A streamer needs all {len(embeds) * num_windows} windows in one batch; raise `max_batch_rows`, "
                f"which is {config.max_batch_rows}."
            )
        warpers = self._get_warpers(config)
        compiled = self._compiled_scales(config)
        try:
            results = [self._generate_rows(rows, config, warpers, streamer, compiled) for rows in parts]
        finally:
            if streamer is not None:
                streamer.end()
        return self._collect(results, len(embeds), num_windows, config, compiled)

    # --- arguments ---------------------------------------------------------------------------------------------------

    def _resolve_generation_config(self, generation_config: GenerationConfig | None, kwargs: dict) -> GenerationConfig:
        """Arguments over `generation_config` over the model's own; everything that has no meaning here is refused."""
        custom = {name: kwargs.pop(name) for name in _CUSTOM_DEFAULTS if name in kwargs}
        config, unknown = self._prepare_generation_config(generation_config, **kwargs)
        unknown = {name: value for name, value in unknown.items() if value is not None}
        if unknown:
            raise ValueError(f"`{next(iter(unknown))}` has no meaning for next-scale generation; leave it out.")
        for name, default in _CUSTOM_DEFAULTS.items():
            value = custom.get(name, getattr(config, name, None))
            setattr(config, name, default if value is None else value)

        known = {*_CUSTOM_DEFAULTS, *_LIBRARY_FIELDS, *_TOLERATED_FIELDS}
        library_defaults = GenerationConfig().to_dict() | config._get_default_generation_params()
        for name, value in config.to_dict().items():
            if name not in known and value is not None and value != library_defaults.get(name):
                raise ValueError(f"`{name}` has no meaning for next-scale generation; leave it out.")
        self._check_generation_config(config)
        return config

    def _check_generation_config(self, config: GenerationConfig) -> None:
        config.guidance_scale = 0.0 if config.guidance_scale is None else config.guidance_scale
        for name in ("num_windows", "max_batch_rows", "num_return_sequences"):
            value = getattr(config, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")
        if not 0 <= config.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be 0 (off) or a positive number, got {config.guidance_scale}.")
        self._check_scales(config)
        if config.gumbel_smoothing and not config.do_sample:
            raise ValueError("`gumbel_smoothing` is random; set `do_sample=True`, or leave it out.")
        if config.guidance_scale and self.config.conditioning == "none":
            raise ValueError("A model without conditioning can't be guided; set `guidance_scale` to 0.")
        if config.guidance_scale == 1.0:
            logger.warning_once(
                "`guidance_scale=1.0` is guidance at half strength here, on a ramp over the scales; in the library's "
                "other models it means no guidance, which is 0.0 here."
            )

    def _check_scales(self, config: GenerationConfig) -> None:
        num_scales = self.codec_model.config.num_scales
        if not isinstance(config.unguided_scales, int) or not 0 <= config.unguided_scales <= num_scales:
            raise ValueError(
                f"`unguided_scales` must be a whole number from 0 to {num_scales}, got {config.unguided_scales!r}."
            )
        if config.unguided_scales and not config.guidance_scale:
            raise ValueError(
                "`unguided_scales` has no effect without guidance; set `guidance_scale`, or leave it out."
            )
        self.codec_model._check_max_scales(config.max_scales)

    def _checked_conditioning(self, embeds, input_ids, attention_mask, *reference) -> torch.Tensor | None:
        """`encode_conditioning`, but refuses what a model would answer with noise: ids that are no labels, and NaN."""
        if self.config.conditioning == "label" and input_ids is not None:
            is_label = (input_ids < len(self.config.labels)) & (input_ids >= 0)
            is_given = torch.ones_like(is_label) if attention_mask is None else attention_mask != 0
            if not (is_label | ~is_given).all() or not is_given.any(-1).all():
                raise ValueError(
                    f"`input_ids` must hold at least one label per sound, 0 to {len(self.config.labels) - 1}, with "
                    "`attention_mask` 0 elsewhere; the processor makes them from names."
                )
        embeds = self.encode_conditioning(embeds, input_ids, attention_mask, *reference)
        if embeds is not None and not embeds.isfinite().all():
            raise ValueError("The conditioning holds NaN or infinite numbers.")
        return embeds

    def _negative_conditioning(
        self, num_sounds: int, config: GenerationConfig, embeds, input_ids, attention_mask
    ) -> torch.Tensor | None:
        """What guidance steers away from, `(num_sounds, conditioning_dim)`; `None` without guidance."""
        if embeds is not None and input_ids is not None:
            raise ValueError("Give one of `negative_conditioning_embeds` and `negative_input_ids`, not both.")
        if embeds is None and input_ids is None:
            return self.model.uncond_embedding.expand(num_sounds, -1) if config.guidance_scale else None
        if not config.guidance_scale:
            raise ValueError("A negative conditioning has no effect without guidance; set `guidance_scale`.")
        negative = self._checked_conditioning(embeds, input_ids, attention_mask)
        return self._repeat_for_sounds(negative, num_sounds, config, "negative conditionings")

    def _check_given_codes(
        self, audio_codes: torch.LongTensor | None, num_sounds: int, config: GenerationConfig
    ) -> torch.LongTensor | None:
        if audio_codes is None:
            return None
        self.codec_model._check_codes(audio_codes)
        num_given = len(self.codec_model.quantizer.split(audio_codes))
        if config.max_scales is not None and num_given > config.max_scales:
            raise ValueError(f"`audio_codes` holds {num_given} scales, more than `max_scales`, {config.max_scales}.")
        return self._repeat_for_sounds(audio_codes, num_sounds, config, "sounds in `audio_codes`")

    @staticmethod
    def _repeat_for_sounds(given: torch.Tensor, num_sounds: int, config: GenerationConfig, name: str) -> torch.Tensor:
        """One row per sound, of one in all, one per conditioning, or one per sound."""
        counts = (1, num_sounds // config.num_return_sequences, num_sounds)
        if len(given) not in counts:
            raise ValueError(f"Got {len(given)} {name} for {num_sounds} to generate; give one, or one each.")
        return given.repeat_interleave(num_sounds // len(given), dim=0)

    @staticmethod
    def _get_warpers(config: GenerationConfig) -> LogitsProcessorList:
        """The library's temperature, top-k and top-p, in its own order; greedy choices need none of them."""
        warpers = LogitsProcessorList()
        if not config.do_sample:
            return warpers
        if config.temperature is not None and config.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            warpers.append(AarTopKWarper(config.top_k))
        if config.top_p is not None and config.top_p != 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
        return warpers

    def _compiled_scales(self, config: GenerationConfig) -> CompiledScales | None:
        if config.compile_config is not None and has_fixed_linears(self):
            logger.warning_once("`compile_config` does nothing for a model after `prepack` or `to_int8`.")
            return None
        return None if config.compile_config is None else compiled_scales(self, config.compile_config)

    # --- the loop ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _split_rows(embeds, negative, given, generator, num_windows: int, max_windows: int):
        """
        Cuts the work into batches of at most `max_windows` windows: whole sounds where they fit, otherwise pieces of
        one sound. A sound's pieces don't depend on the other sounds, and so neither do its draws.
        """
        sounds_at_once = max(max_windows // num_windows, 1)
        for start in range(0, len(embeds), sounds_at_once):
            sounds = slice(start, min(start + sounds_at_once, len(embeds)))
            for first in range(0, num_windows, max_windows):
                count = min(max_windows, num_windows - first)
                yield _Rows(
                    num_windows=count,
                    conditioning=embeds[sounds].repeat_interleave(count, dim=0),
                    unconditional=None if negative is None else negative[sounds].repeat_interleave(count, dim=0),
                    given_codes=None if given is None else given[sounds, first : first + count].flatten(0, 1),
                    generators=generator[sounds] if isinstance(generator, list) else generator,
                )

    def _generate_rows(
        self, rows: _Rows, config: GenerationConfig, warpers, streamer, compiled: CompiledScales | None
    ) -> dict:
        """All scales of one batch of windows; returns codes, running sums, and logits where they are wanted."""

        def run(inputs: dict[str, torch.Tensor], generators) -> dict:
            own_rows = replace(rows, **inputs, generators=generators)
            passes = self._prepare_passes(own_rows, compiled)
            return self._run_scales(passes, own_rows, config, warpers, streamer)

        inputs = {name: getattr(rows, name) for name in ("conditioning", "unconditional", "given_codes")}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if compiled is None or streamer is not None:
            return run(inputs, rows.generators)
        settings = (*_CUSTOM_DEFAULTS, *_LIBRARY_FIELDS)
        key = tuple(getattr(config, name) for name in settings if name != "compile_config")
        return compiled.run(self, key, run, inputs, rows.generators)

    def _prepare_passes(self, rows: _Rows, compiled: CompiledScales | None) -> _Passes:
        embeds = rows.conditioning
        if rows.unconditional is not None:
            embeds = torch.cat([embeds, rows.unconditional.to(embeds)])
        cache = Cache(layers=[AarCacheLayer(self.config.num_slots) for _ in self.model.layers])
        return _Passes(len(rows.conditioning), self.model.prepare_scales(embeds), cache, compiled)

    def _run_scales(self, passes: _Passes, rows: _Rows, config: GenerationConfig, warpers, streamer) -> dict:
        quantizer = self.codec_model.quantizer
        num_scales = len(quantizer.scales)
        scales = quantizer.scales[: config.max_scales]
        given = [] if rows.given_codes is None else quantizer.split(rows.given_codes)
        f_hat, next_input, slot = quantizer.empty_f_hat(passes.num_rows), None, 0
        result = {"codes": [], "scores": [], "logits": []}
        for scale, length in enumerate(scales):
            # a ramp from 0; with a single scale there is nothing to ramp over
            progress = scale / (num_scales - 1) if num_scales > 1 else 1.0
            is_given = scale < len(given)
            if scale == num_scales - config.unguided_scales:
                # nothing from here on reads the unconditional rows
                passes.prepared = passes.prepared.first(passes.num_rows)
            if len(given) < len(scales):
                logits = self._scale_logits(passes, next_input, slot, config.guidance_scale * progress, is_given)
            if is_given:
                tokens = vectors = given[scale].to(f_hat.device)
            else:
                scores = warpers(None, logits.flatten(0, 1)).view_as(logits)
                tokens = self._choose(scores, config.do_sample, rows.generators)
                tokens = vectors = tokens.to(f_hat.device)
                if config.gumbel_smoothing:
                    vectors = self._gumbel_mixture(scores, scale, progress, rows.generators)
                if config.output_logits:
                    result["logits"].append(logits)
                if config.output_scores:
                    result["scores"].append(scores)
            f_hat, next_input = quantizer.accumulate(f_hat, vectors, scale)
            result["codes"].append(tokens)
            slot += length
            if streamer is not None:
                streamer.put(tokens.unflatten(0, (-1, rows.num_windows)))
        return result | {"f_hat": f_hat}

    def _scale_logits(
        self, passes: _Passes, next_input: torch.Tensor | None, slot: int, weight: float, is_given: bool
    ) -> torch.Tensor | None:
        """
        One forward pass; logits `(num_rows, n_s, codebook_size)`, guided where there are unconditional rows, or `None`
        for a scale that is given.
        """
        num_rows, prepared = passes.num_rows, passes.prepared
        guided = len(prepared.start) > num_rows
        if next_input is not None:
            next_input = next_input.to(prepared.start.device)
            next_input = torch.cat([next_input, next_input]) if guided else next_input
        if passes.compiled is not None:
            logits = passes.compiled(self, prepared, next_input, passes.cache, slot)
        else:
            hidden_states = self.model.forward_scale(prepared, next_input, passes.cache, slot)
            logits = None if is_given else self.lm_head(hidden_states)
        if is_given:
            return None
        return (1 + weight) * logits[:num_rows] - weight * logits[num_rows:] if guided else logits

    @classmethod
    def _choose(cls, scores: torch.Tensor, do_sample: bool, generators) -> torch.LongTensor:
        """
        One token `(rows, n_s)` per slot. With exponential noise, argmax(p / noise) is a draw from p, the very one that
        `torch.multinomial` makes of the same generator state, and never waits for the device.
        """
        if not do_sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        return (probabilities / cls._exponential_noise(scores, generators)).argmax(-1)

    @staticmethod
    def _exponential_noise(like: torch.Tensor, generators) -> torch.Tensor:
        """Exponential(1) noise in the shape of `like`; of a list of generators each draws for its sound's rows."""

        def draw(shape, generator) -> torch.Tensor:
            device = like.device if generator is None else generator.device
            noise = torch.empty(shape, dtype=like.dtype, device=device).exponential_(1.0, generator=generator)
            return noise.to(like.device)

        if not isinstance(generators, list):
            return draw(like.shape, generators)
        rows_per_sound = len(like) // len(generators)
        return torch.cat([draw((rows_per_sound, *like.shape[1:]), generator) for generator in generators])

    def _gumbel_mixture(self, scores: torch.Tensor, scale: int, progress: float, generators) -> torch.Tensor:
        """Mixtures `(rows, n_s, codebook_dim)` of code vectors: Gumbel-softmax, sharper from scale to scale."""
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        gumbel = -self._exponential_noise(scores, generators).log()
        weights = ((scores * (1 + progress) + gumbel) / temperature).softmax(-1)
        return self.codec_model.quantizer.mix(weights, scale)

    def _collect(self, results: list[dict], num_sounds: int, num_windows: int, config, compiled):
        """Joins the batches, which are whole sounds or pieces of one in order, decodes them, and shapes the output."""
        codes = torch.cat([torch.cat(result["codes"], dim=-1) for result in results])
        f_hat = torch.cat([result["f_hat"] for result in results]).unflatten(0, (num_sounds, num_windows))
        audio = self._decode(f_hat, compiled)
        if not config.return_dict_in_generate:
            return audio
        per_scale = {
            name: tuple(torch.cat(parts) for parts in zip(*(result[name] for result in results), strict=True))
            for name, wanted in (("scores", config.output_scores), ("logits", config.output_logits))
            if wanted
        }
        return AarGenerateOutput(
            audio=audio,
            audio_codes=codes.unflatten(0, (num_sounds, num_windows)),
            lengths=torch.full((num_sounds,), audio.shape[-1], device=audio.device),
            **per_scale,
        )

    def _decode(self, f_hat: torch.Tensor, compiled: CompiledScales | None) -> torch.Tensor:
        """Waveforms `(num_sounds, audio_channels, num_samples)` of running sums `(num_sounds, num_windows, …)`."""

        def run(inputs: dict[str, torch.Tensor], generators) -> dict:
            return {"audio": self.codec_model.decode_f_hat(inputs["f_hat"])}

        inputs = {"f_hat": f_hat}
        result = run(inputs, []) if compiled is None else compiled.run(self, ("decode",), run, inputs, [])
        return result["audio"]


__all__ = ["AarGenerationMixin", "AarGenerateOutput", "AarPreviewStreamer"]
