"""The blocks of AAR and what surrounds them: embeddings of slots, adaptive norms, the head (arXiv 2408.09027)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_aar import AarConfig
from .layers_sat import AtLeastFp32, at_least_fp32
from .linear_aar import AarLinear, AarOutputProjection


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention in the form of the library's attention interface."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = at_least_fp32(weights).softmax(-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def drop_path(hidden_states: torch.Tensor, rate: float, draws: torch.Tensor | None) -> torch.Tensor:
    """
    Stochastic depth: zeroes a residual branch `(batch_size, num_slots, hidden_size)` of the items whose uniform draw
    `(batch_size,)` is below `rate`, and scales up the rest. Without draws nothing is dropped.
    """
    if rate == 0.0 or draws is None:
        return hidden_states
    keep = draws >= rate
    return hidden_states * keep[:, None, None].to(hidden_states.dtype) / (1 - rate)


class AarModulation(nn.Linear):
    """Linear layer from the conditioning to the gains, scales and shifts of an adaptive norm, one after another."""

    def __init__(self, hidden_size: int, num_parts: int):
        super().__init__(hidden_size, num_parts * hidden_size)
        self.num_parts = num_parts


class AarAttention(nn.Module):
    """Multi-head attention with a fused projection, without a bias on the keys."""

    # without a mask the library's functions would take the queries of one scale for a causal sequence
    is_causal = False

    def __init__(self, config: AarConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.use_qk_norm = config.use_qk_norm
        width = config.hidden_size
        self.qkv_proj = AarLinear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.o_proj = AarOutputProjection(width, width)
        if self.use_qk_norm:
            self.log_scale = nn.Parameter(torch.empty(self.num_heads))
        self.scaling = 1.0 if self.use_qk_norm else 1 / (4 * math.sqrt(config.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = (self.qkv_proj(hidden_states) + bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.use_qk_norm:
            # exp(log_scale) is at most 100: sharper attention only makes training unstable
            scale = at_least_fp32(self.log_scale).clamp(max=math.log(100)).exp()[:, None, None]
            query = (F.normalize(at_least_fp32(query), dim=-1) * scale).to(value.dtype)
            key = F.normalize(at_least_fp32(key), dim=-1).to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(output.flatten(2)), weights


class AarMLP(nn.Module):
    def __init__(self, config: AarConfig):
        super().__init__()
        inner = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = AarLinear(config.hidden_size, inner)
        self.fc2 = AarOutputProjection(inner, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if isinstance(self.fc1, AarLinear):
            return self.fc2(self.fc1(hidden_states, with_gelu=True))
        # an adapter in its place adds to what the GELU gets
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


class AarLayer(GradientCheckpointingLayer):
    """
    Pre-norm transformer block. With adaptive norms: x ← x + γ1·Attn(LN(x)·(1+σ1) + β1), then
    x ← x + γ2·MLP(LN(x)·(1+σ2) + β2).
    """

    def __init__(self, config: AarConfig, layer_idx: int):
        super().__init__()
        self.adaln = config.adaln
        self.drop_path_rate = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)
        is_plain = config.adaln == "none"
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=is_plain)
        self.self_attn = AarAttention(config, layer_idx)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=is_plain)
        self.mlp = AarMLP(config)
        if config.adaln == "per_block":
            self.modulation = AarModulation(config.hidden_size, 6)
        elif config.adaln == "shared":
            self.modulation_offset = nn.Parameter(torch.empty(6, config.hidden_size))

    def modulate(self, layer_input: torch.Tensor) -> torch.Tensor | None:
        """
        γ1, γ2, σ1, σ2, β1, β2 as `(batch_size, 6, hidden_size)`, from what all blocks get: the activated conditioning
        `(batch_size, hidden_size)`, or, where they share their modulation, that as `(batch_size, 6, hidden_size)`.
        """
        if self.adaln == "per_block":
            return self.modulation(layer_input).unflatten(-1, (6, -1))
        if self.adaln == "shared":
            return layer_input.to(self.modulation_offset.device) + self.modulation_offset
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_input: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        dropout_draws: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `hidden_states` `(batch_size, num_slots, hidden_size)`; either `layer_input`, see `modulate`, or its result as
        `modulation`; `dropout_draws` `(batch_size, 2)` for stochastic depth, one draw per residual branch. Returns the
        new hidden states and the attention weights, if the implementation has them.
        """
        attention_draws, mlp_draws = (None, None) if dropout_draws is None else dropout_draws.unbind(-1)
        if modulation is None:
            modulation = self.modulate(layer_input)
        if modulation is None:
            gain1, gain2, scale1, scale2, shift1, shift2 = 1.0, 1.0, 0.0, 0.0, 0.0, 0.0
        else:
            gain1, gain2, scale1, scale2, shift1, shift2 = modulation.unsqueeze(2).unbind(1)
        branch, weights = self.self_attn(
            self.norm1(hidden_states) * (1 + scale1) + shift1, attention_mask, past_key_values
        )
        hidden_states = hidden_states + drop_path(gain1 * branch, self.drop_path_rate, attention_draws)
        branch = self.mlp(self.norm2(hidden_states) * (1 + scale2) + shift2)
        return hidden_states + drop_path(gain2 * branch, self.drop_path_rate, mlp_draws), weights


class AarFinalNorm(nn.LayerNorm):
    """Layer norm before the head: with a scale and a shift from the conditioning, or with learned ones."""

    def __init__(self, config: AarConfig):
        super().__init__(config.hidden_size, eps=1e-6, elementwise_affine=config.adaln == "none")
        self.modulation = AarModulation(config.hidden_size, 2) if config.adaln != "none" else None

    def modulate(self, activated: torch.Tensor) -> torch.Tensor | None:
        """Scale and shift as `(batch_size, 2, hidden_size)`, from the activated conditioning `(batch_size, …)`."""
        return None if self.modulation is None else self.modulation(activated).unflatten(-1, (2, -1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        activated: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`hidden_states` `(batch_size, num_slots, hidden_size)`; `activated`, or what `modulate` makes of it."""
        hidden_states = super().forward(hidden_states)
        if modulation is None:  # computed in here, where FSDP has gathered the weights
            modulation = self.modulate(activated)
        if modulation is None:
            return hidden_states
        scale, shift = modulation.unsqueeze(2).unbind(1)
        return hidden_states * (1 + scale) + shift


class AarConditioningMLP(nn.Module):
    def __init__(self, config: AarConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.conditioning_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, conditioning_embeds: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(conditioning_embeds), approximate="tanh"))


class AarEmbeddings(nn.Module):
    """Slots of the sequence: a learned position for each of them, a learned level for each scale, and their inputs."""

    def __init__(self, config: AarConfig):
        super().__init__()
        self.scales = list(config.codec_config.scales)
        self.input_proj = nn.Linear(config.codec_config.codebook_dim, config.hidden_size)
        self.start_position = nn.Parameter(torch.empty(self.scales[0], config.hidden_size))
        self.positions = nn.Parameter(torch.empty(sum(self.scales), config.hidden_size))
        self.levels = nn.Embedding(len(self.scales), config.hidden_size)

    def forward(
        self, conditioning: torch.Tensor, scale_inputs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            conditioning (`torch.Tensor` of shape `(batch_size, hidden_size)`):
                Input of the first scale's slots.
            scale_inputs (`torch.Tensor` of shape `(batch_size, length, codebook_dim)`, *optional*):
                The quantizer's pooled running sums, input of the slots that follow.

        Returns:
            The embedded inputs `(batch_size, n_0 + length, hidden_size)`, and what every slot adds to its input,
            position plus level, `(num_slots, hidden_size)`.
        """
        levels = self.levels(torch.arange(len(self.scales), device=conditioning.device))
        levels = [level.expand(size, -1) for level, size in zip(levels, self.scales, strict=True)]
        slots = self.positions + torch.cat(levels)
        inputs = conditioning[:, None] + self.start_position
        if scale_inputs is not None:
            inputs = torch.cat([inputs, self.project(scale_inputs)], dim=1)
        return inputs + slots[: inputs.shape[1]], slots

    def project(self, scale_inputs: torch.Tensor) -> torch.Tensor:
        """Running sums `(batch_size, length, codebook_dim)` in the transformer's width and dtype."""
        return self.input_proj(scale_inputs.to(self.positions.dtype))


class AarHead(AtLeastFp32, nn.Linear):
    """Linear layer to the logits, in fp32 whatever the model's dtype: sampling needs their differences."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.to(self.weight.dtype))


@dataclass
class AarPreparedScales:
    """
    Everything about a generation that doesn't depend on its tokens: computed once, not once per scale.

    Args:
        start (`torch.FloatTensor` of shape `(rows, n_0, hidden_size)`): input of the first scale.
        slots (`torch.FloatTensor` of shape `(num_slots, hidden_size)`): what every slot adds to its input.
        modulations (`list[torch.FloatTensor | None]`): of each block, see [`AarLayer`].
        norm_modulation (`torch.FloatTensor`, *optional*): of the final norm.
    """

    start: torch.FloatTensor
    slots: torch.FloatTensor
    modulations: list[torch.FloatTensor | None]
    norm_modulation: torch.FloatTensor | None

    def first(self, num_rows: int) -> "AarPreparedScales":
        """The same of the first `num_rows` rows only, as views."""
        modulations = [part if part is None else part[:num_rows] for part in (*self.modulations, self.norm_modulation)]
        return AarPreparedScales(self.start[:num_rows], self.slots, modulations[:-1], modulations[-1])
