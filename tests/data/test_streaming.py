"""Streaming through the codec equals encoding and decoding everything at once."""

import pytest
import torch

from transformers_aar import SatConfig, SatModel
from transformers_aar.data.streaming import Excerpt, decode_blocks, encode_blocks


@pytest.fixture(params=[0.0, 0.25, 0.5])
def codec(request):
    torch.manual_seed(0)
    config = SatConfig(
        sampling_rate=1000,
        upsampling_ratios=[5, 4],
        num_filters=2,
        num_lstm_layers=1,
        hidden_size=8,
        codebook_dim=4,
        codebook_size=16,
        scales=[1, 5, 50],
        phi_kernel_sizes=[9],
        overlap=request.param,
    )
    model = SatModel(config).eval()
    model.windows_per_batch = 3
    return model


@pytest.mark.parametrize("num_samples", [1, 999, 1000, 1001, 3000, 2500, 3250, 3251, 6500, 12_345])
@torch.no_grad()
def test_streaming_equals_the_whole(codec, num_samples):
    """Lengths at, before and behind the ends of windows and of batches of windows."""
    sound = torch.rand(1, num_samples, generator=torch.Generator().manual_seed(1)) - 0.5
    codes = list(encode_blocks(codec, sound.split(700, dim=-1)))
    whole = codec.encode(sound[None]).audio_codes
    assert torch.equal(torch.cat(codes), whole[0])
    assert all(len(batch) <= codec.windows_per_batch for batch in codes)

    blocks = list(decode_blocks(codec, codes, num_samples))
    decoded = torch.cat(blocks, dim=-1)
    expected = codec.decode(whole, padding_mask=torch.ones(1, num_samples)).audio_values[0]
    assert decoded.shape == sound.shape
    torch.testing.assert_close(decoded, expected, atol=1e-6, rtol=0)


def test_excerpt_keeps_the_beginning():
    blocks = list(torch.arange(10.0).view(1, 10).split(4, dim=-1))
    excerpt = Excerpt(6)
    passed = torch.cat(list(excerpt.watch(blocks)), dim=-1)
    assert torch.equal(passed, torch.cat(blocks, dim=-1))
    assert excerpt.samples.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert excerpt.num_samples == 10
