"""
Next-scale generation as one would first write it down, and as the paper's code runs it: what the benchmark compares
`generate` with. Keys and values are concatenated pass by pass, every pass computes the modulation of all blocks again,
filters sort all logits, the blocks multiply with PyTorch's own linear layers, and everything is fp32.
"""

import math

import torch
import torch.nn.functional as F

from ..layers_aar import AarAttention, AarLayer
from ..modeling_aar import AarForConditionalGeneration
from ..quantizer_sat import SatQuantizer


@torch.no_grad()
def plain_generate(
    model: AarForConditionalGeneration,
    conditioning_embeds: torch.Tensor,
    guidance_scale: float = 4.0,
    top_k: int = 900,
    top_p: float = 0.95,
    do_sample: bool = True,
) -> tuple[torch.FloatTensor, torch.LongTensor]:
    """
    One window for each conditioning, with a model of fp32 weights and modulation per block.

    Args:
        conditioning_embeds (`torch.FloatTensor` of shape `(batch_size, conditioning_dim)`).
        guidance_scale, top_k, top_p, do_sample: as in `generate`; 0 turns guidance off.

    Returns:
        Waveforms `(batch_size, audio_channels, num_samples)` and codes `(batch_size, tokens_per_window)`.
    """
    codec, num_rows = model.codec_model, len(conditioning_embeds)
    scales = codec.quantizer.scales
    if guidance_scale:
        unconditional = model.model.uncond_embedding.expand_as(conditioning_embeds)
        conditioning_embeds = torch.cat([conditioning_embeds, unconditional])
    conditioning = model.model.conditioning_mlp(conditioning_embeds)
    start, slots = model.model.embeddings(conditioning)
    caches = [None] * len(model.model.layers)
    f_hat = start.new_zeros(num_rows, codec.config.codebook_dim, scales[-1])
    hidden_states, codes = start, []
    for scale, length in enumerate(scales):
        if scale:
            pooled = F.interpolate(f_hat, size=length, mode="area").transpose(1, 2)
            pooled = torch.cat([pooled, pooled]) if guidance_scale else pooled
            first = sum(scales[:scale])
            hidden_states = model.model.embeddings.input_proj(pooled) + slots[first : first + length]
        for index, layer in enumerate(model.model.layers):
            hidden_states, caches[index] = _block(layer, hidden_states, conditioning, caches[index])
        scale_shift = model.model.norm.modulate(F.silu(conditioning))
        hidden_states = _modulated(hidden_states, *scale_shift.unsqueeze(2).unbind(1))
        logits = model.lm_head(hidden_states)
        if guidance_scale:
            weight = guidance_scale * scale / (len(scales) - 1)
            logits = (1 + weight) * logits[:num_rows] - weight * logits[num_rows:]
        codes.append(draw(likely(logits, top_k, top_p)) if do_sample else logits.argmax(-1))
        f_hat = f_hat + _contribution(codec.quantizer, codes[-1], scale)
    audio = codec.decoder(codec.quantizer.project_out(f_hat.transpose(1, 2)).transpose(1, 2))
    return audio, torch.cat(codes, dim=1)


def _block(
    layer: AarLayer,
    hidden_states: torch.Tensor,
    conditioning: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One block, and its keys and values `(rows, heads, slots so far, head_dim)`."""
    modulation = layer.modulate(F.silu(conditioning))
    gain1, gain2, scale1, scale2, shift1, shift2 = modulation.unsqueeze(2).unbind(1)
    branch, cache = _attention(layer.self_attn, _modulated(hidden_states, scale1, shift1), cache)
    hidden_states = hidden_states + gain1 * branch
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    inner = F.linear(_modulated(hidden_states, scale2, shift2), fc1.weight, fc1.bias)
    branch = F.linear(F.gelu(inner, approximate="tanh"), fc2.weight, fc2.bias)
    return hidden_states + gain2 * branch, cache


def _modulated(hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _attention(
    attention: AarAttention, hidden_states: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    qkv = F.linear(hidden_states, attention.qkv_proj.weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if attention.use_qk_norm:
        scale = attention.log_scale.clamp(max=math.log(100)).exp()[:, None, None]
        query, key = F.normalize(query, dim=-1) * scale, F.normalize(key, dim=-1)
    if cache is not None:
        key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
    output = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    o_proj = attention.o_proj
    return F.linear(output.transpose(1, 2).flatten(2), o_proj.weight, o_proj.bias), (key, value)


def likely(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits `(rows, n_s, codebook_size)` after top-k, then top-p: −∞ for codes that aren't to be drawn."""
    lowest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    logits = logits.masked_fill(logits < lowest, -torch.inf)
    ordered, order = logits.sort(dim=-1)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def draw(logits: torch.Tensor) -> torch.LongTensor:
    """One code `(rows, n_s)` for each slot of logits `(rows, n_s, codebook_size)`."""
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def _contribution(quantizer: SatQuantizer, tokens: torch.LongTensor, scale: int) -> torch.Tensor:
    """h = φ_s(v), `(batch_size, codebook_dim, num_frames)`, of the tokens `(batch_size, n_s)` of a scale."""
    vectors = quantizer.codebook[scale][tokens].transpose(1, 2)
    vectors = F.interpolate(vectors, size=quantizer.scales[-1], mode="linear", align_corners=False)
    if not quantizer.phi_of_scale:
        return vectors
    return 0.5 * vectors + 0.5 * quantizer.phi[quantizer.phi_of_scale[scale]](vectors)
