"""What the generator's loss is a mean of."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from transformers_aar import AarConfig, AarForConditionalGeneration
from transformers_aar.training.aar_training import AarStage


@pytest.fixture
def generator(short_codec_fields) -> AarForConditionalGeneration:
    torch.manual_seed(0)
    config = AarConfig(
        codec_config=short_codec_fields,
        conditioning="none",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return AarForConditionalGeneration(config).eval()


@pytest.mark.parametrize("average", ["tokens", "scales"])
def test_scales_count_as_their_tokens_or_the_same(generator, average):
    codec = generator.config.codec_config
    codes = torch.randint(codec.codebook_size, (3, codec.tokens_per_window))
    stage = SimpleNamespace(
        args=SimpleNamespace(loss_average=average),
        generator=generator,
        _codes=lambda inputs: inputs["audio_codes"],
        _forward=lambda inputs: generator(**inputs),
    )
    loss = AarStage._loss(stage, {"audio_codes": codes})
    losses = F.cross_entropy(generator(audio_codes=codes).logits.mT, codes, reduction="none")
    of_scales = torch.stack([part.mean() for part in losses.split(list(codec.scales), dim=1)])
    shares = torch.tensor(codec.scales) if average == "tokens" else torch.ones(len(codec.scales))
    torch.testing.assert_close(loss, (of_scales * shares).sum() / shares.sum())
    assert loss.dtype == torch.float32
    loss.backward()
    assert generator.lm_head.weight.grad.abs().sum() > 0
