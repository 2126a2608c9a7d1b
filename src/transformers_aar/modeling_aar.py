"""AAR, next-scale acoustic autoregression: a transformer over the scales of SAT's codes (arXiv 2408.09027)."""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ClapModel, GenerationConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.encodec.modeling_encodec import EncodecDecoder, EncodecEncoder
from transformers.utils import ModelOutput

from .configuration_aar import AarConfig
from .configuration_sat import SatConfig
from .generation_aar import AarGenerationMixin
from .layers_aar import (
    AarAttention,
    AarConditioningMLP,
    AarEmbeddings,
    AarFinalNorm,
    AarHead,
    AarLayer,
    AarModulation,
    AarPreparedScales,
)
from .layers_sat import AtLeastFp32, at_least_fp32, specialize
from .linear_aar import (
    AarFixedLinear,
    AarInt8Linear,
    AarOutputProjection,
    AarPackedLinear,
    fix_linears,
    has_fixed_linears,
    has_int8_products,
    has_packed_products,
)
from .modeling_sat import SatModel, SharingMixin


@dataclass
class AarModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`):
            Output of the last block, after the final norm.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Input of the first block and output of each one, all of that shape.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights `(batch_size, num_attention_heads, num_slots, num_slots)` of each block; `eager` only.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AarOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Mean cross-entropy of all tokens, in nats.
        logits (`torch.FloatTensor` of shape `(rows, tokens_per_window, codebook_size)`):
            Prediction of every token from all coarser scales; one row per window. In fp32 or wider.
        hidden_states, attentions: see [`AarModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class AarPreTrainedModel(SharingMixin, PreTrainedModel):
    config_class = AarConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "audio")
    supports_gradient_checkpointing = True
    _no_split_modules = ["AarLayer", "AarEmbeddings", "SatModel"]
    _keep_in_fp32_modules_strict = ["lm_head", "codec_model.encoder", "codec_model.decoder"]
    _keys_to_ignore_on_load_missing = SatModel._keys_to_ignore_on_load_missing
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True

    def save_pretrained(self, save_directory, *args, **kwargs):
        if has_fixed_linears(self):
            raise ValueError("Weights laid out for a CPU aren't saved: save the model before `prepack` or `to_int8`.")
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> None:
        """There is no table of tokens: what is put in are the codec's vectors, projected."""

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("There is no table of tokens to resize: how many codes there are is for the codec to say.")

    def enable_input_require_grads(self) -> None:
        """Lets gradients into the blocks of a frozen model: adapters need it with reentrant gradient checkpointing."""

        def require_grads(module, inputs, output) -> None:
            output[0].requires_grad_(True)

        embeddings = next(module for module in self.modules() if isinstance(module, AarEmbeddings))
        self._require_grads_hook = embeddings.register_forward_hook(require_grads)
        self._require_grads_hooks = [self._require_grads_hook]  # what the library takes away again

    @torch.no_grad()
    def _init_weights(self, module):
        """As the paper's code: blocks start as near-identities, and the head close to a uniform distribution."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        std = math.sqrt(1 / (3 * width))
        if isinstance(module, AarModulation):
            # of six parts the first two are the residual branches' gains
            factors = [1e-5, 1e-5, 0.5, 0.5, 0.5, 0.5] if module.num_parts == 6 else [0.5, 0.5]
            weight = init.trunc_normal_(torch.empty_like(module.weight), std=std)
            factors = torch.tensor(factors, dtype=weight.dtype, device=weight.device)
            init.copy_(module.weight, weight * factors.repeat_interleave(width)[:, None])
            init.zeros_(module.bias)
        elif isinstance(module, AarHead):
            init.trunc_normal_(module.weight, std=0.02 * std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            is_output = isinstance(module, AarOutputProjection)
            init.trunc_normal_(module.weight, std=std / math.sqrt(2 * depth) if is_output else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AarAttention):
            for bias in (module.q_bias, module.v_bias):
                init.zeros_(bias)
            if module.use_qk_norm:
                init.constant_(module.log_scale, math.log(4))
        elif isinstance(module, AarEmbeddings):
            init.trunc_normal_(module.start_position, std=std)
            init.trunc_normal_(module.positions, std=std)
        elif isinstance(module, AarLayer) and module.adaln == "shared":
            offset = init.normal_(torch.empty_like(module.modulation_offset), std=1 / math.sqrt(width))
            offset[:2] *= 1e-5
            init.copy_(module.modulation_offset, offset)
        elif isinstance(module, AarModel):
            init.normal_(module.uncond_embedding, std=1 / math.sqrt(self.config.conditioning_dim))


class AarModel(AarPreTrainedModel):
    """The backbone: from a conditioning vector and the quantizer's running sums to a hidden state per token."""

    def __init__(self, config: AarConfig):
        super().__init__(config)
        self.register_buffer("uncond_embedding", torch.empty(1, config.conditioning_dim))
        if config.conditioning == "label":
            self.label_embeddings = nn.Embedding(len(config.labels), config.conditioning_dim)
        self.conditioning_mlp = AarConditioningMLP(config)
        self.embeddings = AarEmbeddings(config)
        if config.adaln == "shared":
            self.shared_modulation = AarModulation(config.hidden_size, 6)
        self.layers = nn.ModuleList(AarLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = AarFinalNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        conditioning_embeds: torch.Tensor,
        scale_inputs: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        dropout_draws: torch.Tensor | None = None,
    ) -> AarModelOutput | tuple:
        """
        All scales in one pass (teacher forcing): token i sees token j iff level(j) ≤ level(i).

        Args:
            conditioning_embeds (`torch.FloatTensor` of shape `(batch_size, conditioning_dim)`).
            scale_inputs (`torch.FloatTensor` of shape `(batch_size, tokens_per_window − n_0, codebook_dim)`):
                see [`SatQuantizer.next_scale_inputs`].
            output_hidden_states, output_attentions (`bool`, *optional*): return them, too; see the config.
            return_dict (`bool`, *optional*): `False` for a tuple.
            dropout_draws (`torch.FloatTensor` of shape `(batch_size, 2 * num_hidden_layers)`, *optional*):
                Uniform draws for stochastic depth, two per block; without them no branch is dropped.

        Returns:
            [`AarModelOutput`].

        Raises:
            ValueError: for an attention implementation that can't express the mask.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if "flash" in self.config._attn_implementation and "flex" not in self.config._attn_implementation:
            raise ValueError(
                f"`{self.config._attn_implementation}` can't express the block-causal mask of a pass over all scales; "
                "use `sdpa`, `eager` or `flex_attention`."
            )
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("`output_attentions` needs `attn_implementation='eager'`.")
        conditioning = self.conditioning_mlp(conditioning_embeds.to(self.conditioning_mlp.fc1.weight.dtype))
        hidden_states, _ = self.embeddings(conditioning, scale_inputs)
        layer_input, activated = self._condition_blocks(conditioning)
        attention_mask = self._block_causal_mask(hidden_states)
        all_hidden_states, all_attentions = [], []
        draws = [None] * len(self.layers) if dropout_draws is None else dropout_draws.unflatten(1, (-1, 2)).unbind(1)
        for layer, layer_draws in zip(self.layers, draws, strict=True):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states, layer_input, attention_mask=attention_mask, dropout_draws=layer_draws
            )
            if output_attentions:
                all_attentions.append(weights)
        output = AarModelOutput(
            last_hidden_state=self.norm(hidden_states, activated),
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return self._output(output, return_dict)

    def _condition_blocks(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What every block derives its modulation from, see [`AarLayer`], and what the final norm does."""
        activated = F.silu(conditioning)
        if self.config.adaln != "shared":
            return activated, activated
        return self.shared_modulation(activated).unflatten(-1, (6, -1)), activated

    def _block_causal_mask(self, hidden_states: torch.Tensor):
        """The mask, in the form that the attention implementation takes."""
        scales = torch.tensor(self.embeddings.scales, device=hidden_states.device)
        levels = torch.repeat_interleave(scales, output_size=hidden_states.shape[1])
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=None,
            and_mask_function=lambda batch, head, query, key: levels[key] <= levels[query],
        )

    # --- one scale at a time -----------------------------------------------------------------------------------------

    def prepare_scales(self, conditioning_embeds: torch.Tensor) -> AarPreparedScales:
        """Computes from `(rows, conditioning_dim)` what the passes of all scales share."""
        conditioning = self.conditioning_mlp(conditioning_embeds.to(self.conditioning_mlp.fc1.weight.dtype))
        layer_input, activated = self._condition_blocks(conditioning)
        start, slots = self.embeddings(conditioning)
        modulations = [layer.modulate(layer_input) for layer in self.layers]
        return AarPreparedScales(start, slots, modulations, self.norm.modulate(activated))

    def forward_scale(
        self,
        prepared: AarPreparedScales,
        scale_input: torch.Tensor | None,
        past_key_values: Cache,
        first_slot: int,
    ) -> torch.Tensor:
        """
        Hidden states `(rows, n_s, hidden_size)` of one scale, which sees itself and all that the cache holds.

        Args:
            prepared ([`AarPreparedScales`]): result of `prepare_scales`.
            scale_input (`torch.FloatTensor` of shape `(rows, n_s, codebook_dim)`): `None` for the first scale.
            past_key_values (`Cache`): keys and values of the coarser scales; this one's are added.
            first_slot (`int`): number of tokens in the coarser scales.
        """
        if scale_input is None:
            hidden_states = prepared.start
        else:
            slots = prepared.slots[first_slot : first_slot + scale_input.shape[1]]
            hidden_states = self.embeddings.project(scale_input) + slots
        for layer, modulation in zip(self.layers, prepared.modulations, strict=True):
            # by its place: gradient checkpointing takes a cache away that is given by name
            hidden_states, _ = layer(hidden_states, None, modulation, None, past_key_values)
        return self.norm(hidden_states, modulation=prepared.norm_modulation)


class WideMixin(AtLeastFp32):
    """Keeps half of a codec in fp32, autocast or not: in a waveform, rounding to 8 or 11 bits can be heard."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(at_least_fp32(hidden_states))


class WideEncoder(WideMixin, EncodecEncoder):
    """A generator's encoder."""


class WideDecoder(WideMixin, EncodecDecoder):
    """A generator's decoder."""


class AarForConditionalGeneration(AarPreTrainedModel, AarGenerationMixin):
    """
    The complete generator: conditioner, transformer, head, and the codec that turns codes into sound. Codec and
    conditioner are frozen and stay in evaluation mode. In half precision codec and head stay in fp32.

    Example:

    ```python
    >>> from transformers import AutoModelForTextToWaveform, AutoProcessor
    >>> import transformers_aar

    >>> model = AutoModelForTextToWaveform.from_pretrained(folder)
    >>> processor = AutoProcessor.from_pretrained(folder)
    >>> waveform = model.generate(**processor(["Siren", "Dog; Rain"], return_tensors="pt"))
    ```"""

    other_auto_classes = ("AutoModelForTextToWaveform",)

    def __init__(self, config: AarConfig):
        super().__init__(config)
        self.codec_model = SatModel(config.codec_config)
        specialize(self.codec_model.encoder, WideEncoder)
        specialize(self.codec_model.decoder, WideDecoder)
        self.conditioner = None
        if config.conditioner_config is not None:
            config.conditioner_config._attn_implementation = "eager"  # CLAP has no other, whatever the generator's is
            self.conditioner = ClapModel(config.conditioner_config)
        self.model = AarModel(config)
        self.lm_head = AarHead(config.hidden_size, config.codec_config.codebook_size)
        self._apply(lambda tensor: tensor)  # see AtLeastFp32
        self.post_init()
        self._freeze_sub_models()
        # a new object: one that was made from the config would lose its custom fields when it is reloaded
        guidance_scale = 0.0 if config.conditioning == "none" else 4.0
        self.generation_config = GenerationConfig(
            do_sample=True, guidance_scale=guidance_scale, top_k=900, top_p=0.95, temperature=1.0, num_windows=1
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the blocks."""
        return self.model.dtype

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As the library's; the conditioner, which has one implementation only, keeps it."""
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation, "conditioner_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _freeze_sub_models(self) -> None:
        for module in (self.codec_model, self.conditioner):
            if module is not None:
                module.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze_sub_models()
        return self

    def prepack(self) -> "AarForConditionalGeneration":
        """
        Lays the blocks' weights out as a CPU's kernels want them, which speeds up generation of few sounds at a time
        and takes no memory; docs/performance.md has figures. Logits change by rounding. There is no way back: the
        model can neither be trained nor saved afterwards, and `compile_config` does nothing for it.

        Returns:
            The model itself.

        Raises:
            ValueError: on another device than a CPU, and for a dtype that the processor has no such kernels for.
        """
        if not has_packed_products(self.dtype):
            raise ValueError(f"This processor, or this PyTorch, has no kernels for packed {self.dtype}: leave it out.")
        return self._fix_linears(AarPackedLinear)

    def to_int8(self) -> "AarForConditionalGeneration":
        """
        Puts 8-bit integers in the place of the blocks' weights, which speeds up generation on a CPU. Logits change by
        some per cent; docs/performance.md says what that costs, and what it gains. There is no way back: the model can
        neither be trained nor saved afterwards, and `compile_config` does nothing for it.

        Returns:
            The model itself.

        Raises:
            ValueError: on another device than a CPU, or where the processor has no 8-bit products (VNNI).
        """
        if not has_int8_products():
            raise ValueError("This processor, or this PyTorch, can't multiply 8-bit integers: leave out `to_int8`.")
        return self._fix_linears(AarInt8Linear)

    def _fix_linears(self, layer_class: type[AarFixedLinear]) -> "AarForConditionalGeneration":
        if self.device.type != "cpu":
            raise ValueError(f"Weights are laid out on CPUs, and this model is on {self.device}: move it first.")
        fix_linears(self.model.layers, layer_class)
        return self.requires_grad_(False).eval()

    @classmethod
    def from_sub_models_pretrained(
        cls,
        conditioner_pretrained_model_name_or_path: str | None = None,
        codec_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | AarConfig | None = None,
        **kwargs,
    ) -> "AarForConditionalGeneration":
        """
        Puts a generator together from its parts.

        Args:
            conditioner_pretrained_model_name_or_path (`str`, *optional*):
                Folder or repository of a CLAP model. `None` for a generator without one.
            codec_pretrained_model_name_or_path (`str`):
                Folder or repository of a [`SatModel`].
            decoder_pretrained_model_name_or_path (`str` or [`AarConfig`]):
                Folder or repository of an [`AarModel`] or of a complete generator, whose codec and conditioner are
                left out; or the configuration of a new one with random weights.
            kwargs:
                Fields of the generator's configuration, overriding the decoder's.

        Returns:
            The generator, in evaluation mode. Its head is new unless the decoder's folder holds one.

        Raises:
            ValueError: without a codec or a decoder, or for a codec that the decoder wasn't made for.
        """
        decoder = decoder_pretrained_model_name_or_path
        if codec_pretrained_model_name_or_path is None or decoder is None:
            raise ValueError(
                "A generator needs `codec_pretrained_model_name_or_path` and `decoder_pretrained_model_name_or_path`."
            )
        unknown = kwargs.keys() - inspect.signature(AarConfig).parameters.keys()
        if unknown:
            raise ValueError(f"`{min(unknown)}` is no field of a generator's configuration; leave it out.")
        codec, loading = SatModel.from_pretrained(codec_pretrained_model_name_or_path, output_loading_info=True)
        if loading["missing_keys"]:
            raise ValueError(
                f"{codec_pretrained_model_name_or_path} holds no complete codec: it lacks "
                f"{min(loading['missing_keys'])}. `generator.codec_model.save_pretrained` saves a generator's own."
            )
        is_new = isinstance(decoder, PreTrainedConfig)
        config = decoder if is_new else AarConfig.from_pretrained(decoder)
        if not is_new:
            cls._check_codec(codec.config, config.codec_config)
        fields = {"codec_config": codec.config.to_dict(), "conditioner_config": None} | kwargs
        config = AarConfig(**(config.to_dict() | fields))
        model = cls(config) if is_new else cls.from_pretrained(decoder, config=config)
        model.codec_model.load_state_dict(codec.state_dict())
        if conditioner_pretrained_model_name_or_path is not None:
            model.attach_conditioner(conditioner_pretrained_model_name_or_path)
        return model.eval()

    @staticmethod
    def _check_codec(given: SatConfig, expected: SatConfig) -> None:
        for name in ("scales", "codebook_dim", "codebook_size"):
            if getattr(given, name) != getattr(expected, name):
                raise ValueError(
                    f"The decoder was made for a codec with `{name}` {getattr(expected, name)} but this one has "
                    f"{getattr(given, name)}; give the codec that it was trained on."
                )

    def attach_conditioner(self, name_or_model: str | ClapModel) -> None:
        """
        Gives a `"clap"` generator the CLAP model that turns text and audio into its conditioning.

        Args:
            name_or_model (`str` or [`ClapModel`]):
                A folder, a repository, or the model itself, which is moved to the generator's device and dtype, and
                frozen.

        Raises:
            ValueError: for other conditionings, or a CLAP of another width.
        """
        if self.config.conditioning != "clap":
            raise ValueError(f"A model conditioned on `{self.config.conditioning}` takes no CLAP conditioner.")
        is_model = isinstance(name_or_model, ClapModel)
        conditioner = name_or_model if is_model else ClapModel.from_pretrained(name_or_model)
        if conditioner.config.projection_dim != self.config.conditioning_dim:
            raise ValueError(
                f"The conditioner's embeddings have {conditioner.config.projection_dim} dimensions but this model "
                f"takes {self.config.conditioning_dim}."
            )
        self.conditioner = conditioner.to(self.device, self.dtype)
        self.config.conditioner_config = conditioner.config
        self._freeze_sub_models()

    def encode_conditioning(
        self,
        conditioning_embeds: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        is_longer: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        The conditioning vectors `(batch_size, conditioning_dim)` of one of:

        Args:
            conditioning_embeds (`torch.FloatTensor` of shape `(batch_size, conditioning_dim)`): ready vectors.
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`) with attention_mask (same shape, optional):
                CLAP's text tokens; or label ids, where several labels of one sound are averaged.
            input_features (`torch.FloatTensor`) with is_longer (optional): CLAP's audio features.

        Returns:
            The vectors; `None` for a model without conditioning.

        Raises:
            ValueError: when not exactly one is given, or the model can't take it.
        """
        given = {"conditioning_embeds": conditioning_embeds, "input_ids": input_ids, "input_features": input_features}
        given = [name for name, value in given.items() if value is not None]
        if self.config.conditioning == "none":
            if given not in ([], ["input_ids"]):
                raise ValueError(f"This model has no conditioning; leave out `{given[0]}`.")
            return None
        if len(given) != 1:
            raise ValueError(
                "Give exactly one of `conditioning_embeds`, `input_ids` and `input_features`, "
                f"got {' and '.join(given) or 'none'}."
            )
        if conditioning_embeds is not None:
            if conditioning_embeds.ndim != 2 or conditioning_embeds.shape[1] != self.config.conditioning_dim:
                raise ValueError(
                    f"`conditioning_embeds` must have the shape (batch_size, {self.config.conditioning_dim}), "
                    f"got {tuple(conditioning_embeds.shape)}."
                )
            return conditioning_embeds
        if self.config.conditioning == "label":
            if input_features is not None:
                raise ValueError("This model is conditioned on labels; give their ids as `input_ids`.")
            return self._encode_labels(input_ids, attention_mask)
        if self.conditioner is None:
            raise ValueError(
                "This model has no CLAP weights, so it takes `conditioning_embeds` only; add them with "
                "`model.attach_conditioner(name_or_model)`."
            )
        with torch.no_grad():
            if input_ids is not None:
                output = self.conditioner.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
            else:
                output = self.conditioner.get_audio_features(
                    input_features=input_features.to(self.conditioner.dtype), is_longer=is_longer
                )
        return output.pooler_output

    def _encode_labels(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Mean of the table's rows over the labels of each sound; one without any is unconditional."""
        if input_ids.ndim != 2:
            raise ValueError(f"`input_ids` must have the shape (batch_size, labels), got {tuple(input_ids.shape)}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # ids that the mask leaves out are the tokenizer's padding, which has no row in the table
        embeds = self.model.label_embeddings(input_ids.masked_fill(attention_mask == 0, 0))
        weights = attention_mask.to(embeds.dtype)[..., None]
        counts = weights.sum(1)
        mean = (embeds * weights).sum(1) / counts.clamp(min=1)
        return torch.where(counts > 0, mean, self.model.uncond_embedding.to(mean.dtype))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        conditioning_embeds: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        is_longer: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        input_values: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        dropout_draws: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> AarOutput | tuple:
        """
        Teacher forcing: predicts all codes of a sound from its own coarser scales, in one pass. In training mode the
        conditioning of a share of the rows is dropped, and residual branches by stochastic depth.

        Args:
            input_ids, attention_mask, conditioning_embeds, input_features, is_longer:
                The conditioning, one per sound; see `encode_conditioning`.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens_per_window)` or `(batch_size,
                tokens_per_window)`):
                Codes of the codec; negative ones are left out of the loss.
            input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`) with padding_mask
                (`(batch_size, num_samples)`, *optional*):
                Raw audio to encode, in place of `audio_codes`.
            dropout_draws (`torch.FloatTensor` of shape `(rows, 1 + 2 * num_hidden_layers)`, *optional*):
                Numbers from [0, 1) that decide what training drops of each window: its conditioning, then the two
                residual branches of every block. By default they are drawn from PyTorch's global generator; a run that
                must not depend on how its examples are batched gives its own.
            output_hidden_states, output_attentions (`bool`, *optional*): return them, too; see the config.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            [`AarOutput`], with one row per window.

        Raises:
            ValueError: when the conditioning or the sound is missing, or given twice.
        """
        if (audio_codes is None) == (input_values is None):
            raise ValueError("Give exactly one of `audio_codes` and `input_values`.")
        if audio_codes is None:
            audio_codes = self._encode_audio(input_values, padding_mask)
        if audio_codes.ndim == 2:
            audio_codes = audio_codes[:, None]
        if audio_codes.ndim != 3 or audio_codes.shape[-1] != self.config.num_slots or audio_codes.is_floating_point():
            raise ValueError(
                f"`audio_codes` must be whole numbers of shape (batch_size, num_windows, {self.config.num_slots}), "
                f"got {tuple(audio_codes.shape)} of {audio_codes.dtype}."
            )
        batch_size, num_windows, _ = audio_codes.shape
        embeds = self.encode_conditioning(conditioning_embeds, input_ids, attention_mask, input_features, is_longer)
        embeds = self._expand_conditioning(embeds, batch_size).repeat_interleave(num_windows, dim=0)
        branch_draws = None
        if self.training:
            if dropout_draws is None:
                dropout_draws = torch.rand(len(embeds), 1 + 2 * self.config.num_hidden_layers, device=embeds.device)
            embeds = self._drop_conditioning(embeds, dropout_draws[:, :1])
            branch_draws = dropout_draws[:, 1:]
        scale_inputs = self.codec_model.quantizer.next_scale_inputs(audio_codes.clamp(min=0))
        output = self.model(
            embeds, scale_inputs, output_hidden_states, output_attentions, return_dict=True, dropout_draws=branch_draws
        )
        logits = self.lm_head(output.last_hidden_state)
        targets = audio_codes.flatten().to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(targets < 0, -100))
        result = AarOutput(loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions)
        return self._output(result, return_dict)

    @torch.no_grad()
    def _encode_audio(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.LongTensor:
        """Codes of raw audio, −1 in windows of padding."""
        encoded = self.codec_model.encode(input_values, padding_mask, return_dict=True)
        return encoded.audio_codes.masked_fill(~encoded.audio_codes_mask[..., None], -1)

    def _expand_conditioning(self, embeds: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        if embeds is None:
            return self.model.uncond_embedding.expand(batch_size, -1)
        if embeds.shape[0] != batch_size:
            raise ValueError(f"Got {embeds.shape[0]} conditionings for {batch_size} sounds; give one for each.")
        return embeds

    def _drop_conditioning(self, embeds: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Puts the fixed vector for "no conditioning" into the rows whose draw `(rows, 1)` is low enough."""
        dropped = draws < self.config.conditioning_dropout
        return torch.where(dropped, self.model.uncond_embedding.to(embeds.dtype), embeds)


AarForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["AarPreTrainedModel", "AarModel", "AarForConditionalGeneration"]
