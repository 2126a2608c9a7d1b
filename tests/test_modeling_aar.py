"""AarForConditionalGeneration: what sees what, what is trained, how it is loaded, and what it is conditioned on."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, ClapModel
from transformers.cache_utils import Cache

from transformers_aar import AarConfig, AarForConditionalGeneration
from transformers_aar.generation_aar import AarCacheLayer
from transformers_aar.linear_aar import AarLinear

SCALES = [1, 2, 4, 6]
VARIANTS = [(adaln, qk_norm) for adaln in ("per_block", "shared", "none") for qk_norm in (True, False)]


def random_codes(*shape: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(16, shape, generator=torch.Generator().manual_seed(seed))


def random_embeds(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def generator(build_generator) -> AarForConditionalGeneration:
    """A model without CLAP weights in scales 1, 2, 4, 6; not to be changed."""
    return build_generator().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> dict:
    """Two sounds of two windows each."""
    return {"conditioning_embeds": random_embeds(2), "audio_codes": random_codes(2, 2, 13)}


@pytest.fixture(scope="module")
def saved(build_generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    build_generator().save_pretrained(folder)
    return folder


# --- teacher forcing -------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_cross_entropy(generator, inputs):
    output = generator(**inputs)
    assert output.logits.shape == (4, 13, 16)
    log_probabilities = output.logits.log_softmax(-1)
    expected = -log_probabilities.gather(-1, inputs["audio_codes"].view(4, 13, 1)).mean()
    torch.testing.assert_close(output.loss, expected)
    assert abs(output.loss - math.log(16)) > 0.1


def test_negative_codes_are_left_out_of_the_loss(generator, inputs):
    codes = inputs["audio_codes"].clone()
    codes[1, 1] = -1
    output = generator(conditioning_embeds=inputs["conditioning_embeds"], audio_codes=codes)
    first = F.cross_entropy(output.logits[:3].flatten(0, 1), codes.flatten(0, 1)[:3].flatten())
    torch.testing.assert_close(output.loss, first)


def test_one_window_needs_no_axis(generator, inputs):
    flat = generator(conditioning_embeds=inputs["conditioning_embeds"], audio_codes=inputs["audio_codes"][:, 0])
    full = generator(conditioning_embeds=inputs["conditioning_embeds"], audio_codes=inputs["audio_codes"][:, :1])
    assert torch.equal(flat.logits, full.logits)


def test_raw_audio_equals_its_codes(generator):
    """Raw audio is encoded with its mask; windows of padding take no part in the loss."""
    lengths = torch.tensor([1500, 5000])
    mask = torch.arange(5000) < lengths[:, None]
    audio = torch.randn(2, 1, 5000, generator=torch.Generator().manual_seed(0))
    encoded = generator.codec_model.encode(audio, mask)
    codes = torch.where(encoded.audio_codes_mask[..., None], encoded.audio_codes, -1)
    assert (codes < 0).any()
    embeds = random_embeds(2)
    raw = generator(conditioning_embeds=embeds, input_values=audio, padding_mask=mask)
    ready = generator(conditioning_embeds=embeds, audio_codes=codes)
    assert torch.equal(raw.logits, ready.logits) and torch.equal(raw.loss, ready.loss)
    unmasked = generator(conditioning_embeds=embeds, input_values=audio)
    assert not torch.equal(raw.loss, unmasked.loss)


def test_scales_see_coarser_scales_only(generator, inputs):
    """Other codes at scale s leave the predictions of scales up to s alone and change the later ones."""
    before = generator(**inputs).logits.split(SCALES, dim=1)
    for scale in range(len(SCALES)):
        parts = list(inputs["audio_codes"].split(SCALES, dim=-1))
        parts[scale] = (parts[scale] + 5) % 16
        after = generator(**inputs | {"audio_codes": torch.cat(parts, dim=-1)}).logits.split(SCALES, dim=1)
        for other in range(len(SCALES)):
            same = torch.allclose(before[other], after[other], atol=1e-6)
            assert same == (other <= scale), (scale, other)


def test_slots_of_a_scale_see_each_other(generator, inputs):
    """Within a scale attention goes both ways: the first slot depends on the input of the last."""
    inputs = generator.codec_model.quantizer.next_scale_inputs(inputs["audio_codes"])
    before = generator.model(random_embeds(4), inputs).last_hidden_state
    inputs = inputs.clone()
    inputs[:, -1] += 1.0
    after = generator.model(random_embeds(4), inputs).last_hidden_state
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-4).all()


def cached_logits(model, embeds: torch.Tensor, codes: torch.LongTensor) -> list[torch.Tensor]:
    """Logits of each scale, one pass per scale, with given codes `(rows, tokens)`."""
    quantizer = model.codec_model.quantizer
    prepared = model.model.prepare_scales(embeds)
    cache = Cache(layers=[AarCacheLayer(13) for _ in model.model.layers])
    f_hat, scale_input, slot, logits = quantizer.empty_f_hat(len(codes)), None, 0, []
    for scale, tokens in enumerate(quantizer.split(codes)):
        logits.append(model.lm_head(model.model.forward_scale(prepared, scale_input, cache, slot)))
        f_hat, scale_input = quantizer.accumulate(f_hat, tokens, scale)
        slot += tokens.shape[-1]
        assert cache.get_seq_length() == slot
    return logits


@pytest.mark.parametrize(("adaln", "use_qk_norm"), VARIANTS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_steps_equal_teacher_forcing(build_generator, inputs, adaln, use_qk_norm, implementation):
    """Scale by scale with a cache gives the logits of one masked pass over all scales."""
    model = build_generator(adaln=adaln, use_qk_norm=use_qk_norm).requires_grad_(False)
    model.set_attn_implementation(implementation)
    expected = model(**inputs).logits
    assert expected.std() > 0.1
    stepwise = cached_logits(
        model, inputs["conditioning_embeds"].repeat_interleave(2, 0), inputs["audio_codes"].flatten(0, 1)
    )
    torch.testing.assert_close(torch.cat(stepwise, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_attention_is_declared_bidirectional(build_generator, inputs, monkeypatch):
    """Without a mask the library takes a module for causal unless it says otherwise, and steps would go wrong."""
    model = build_generator().requires_grad_(False)
    embeds, codes = inputs["conditioning_embeds"].repeat_interleave(2, 0), inputs["audio_codes"].flatten(0, 1)
    right = torch.cat(cached_logits(model, embeds, codes), dim=1)
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "is_causal", True)
    wrong = torch.cat(cached_logits(model, embeds, codes), dim=1)
    torch.testing.assert_close(model(**inputs).logits, right, atol=1e-4, rtol=1e-4)
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize(("adaln", "use_qk_norm"), VARIANTS)
def test_every_parameter_is_trained(build_generator, inputs, adaln, use_qk_norm):
    model = build_generator(adaln=adaln, use_qk_norm=use_qk_norm).train()
    model.config.conditioning_dropout = 0.0
    model(**inputs).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = {name for name in trained if not model.get_parameter(name).grad.any()}
    assert not any(name.startswith("codec_model") for name in trained)
    # plain norms take the conditioning through the first slots only, which reaches everything all the same
    assert idle == set()


# --- attention implementations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_qk_norm", [True, False])
@pytest.mark.parametrize(
    "implementation",
    ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],  # compiled at the first call
)
def test_attention_implementations_agree(build_generator, inputs, implementation, use_qk_norm):
    """Every implementation gives the logits of plain attention, and the codec puts up with the choice."""
    model = build_generator(use_qk_norm=use_qk_norm).requires_grad_(False)
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits
    model.set_attn_implementation(implementation)
    assert model.model.config._attn_implementation == implementation
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert model.codec_model.encode(torch.zeros(1, 1, 100)).audio_codes.shape == (1, 1, 13)
    arguments = {"conditioning_embeds": inputs["conditioning_embeds"], "do_sample": False}
    torch.testing.assert_close(
        model.generate(**arguments), build_generator(use_qk_norm=use_qk_norm).generate(**arguments)
    )


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_refused(build_generator, inputs, name):
    model = build_generator()
    model.model.config._attn_implementation = name
    with pytest.raises(ValueError, match=f"`{name}` can't express the block-causal mask"):
        model(**inputs)


def test_hidden_states_and_attentions(build_generator, inputs):
    model = build_generator().requires_grad_(False)
    with pytest.raises(ValueError, match="eager"):
        model(**inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in output.hidden_states] == [(4, 13, 64)] * 3
    assert [weights.shape for weights in output.attentions] == [(4, 2, 13, 13)] * 2
    levels = torch.repeat_interleave(torch.tensor(SCALES))
    hidden_from = levels[None, :] > levels[:, None]
    for weights in output.attentions:
        assert not weights[..., hidden_from].any() and (weights[..., ~hidden_from] > 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 13))
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    assert torch.equal(plain.logits, output.logits)
    model.config.output_hidden_states = True
    assert (
        len(model(**inputs).hidden_states) == 3 and model(**inputs, output_hidden_states=False).hidden_states is None
    )


def test_tuples(generator, inputs):
    output, values = generator(**inputs), generator(**inputs, return_dict=False)
    assert isinstance(values, tuple) and len(values) == 2
    assert torch.equal(values[0], output.loss) and torch.equal(values[1], output.logits)
    scale_inputs = generator.codec_model.quantizer.next_scale_inputs(inputs["audio_codes"])
    (hidden,) = generator.model(random_embeds(4), scale_inputs, return_dict=False)
    assert torch.equal(hidden, generator.model(random_embeds(4), scale_inputs).last_hidden_state)


# --- memory and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(build_generator, inputs, use_reentrant):
    """The same loss and gradients, from blocks that are computed twice."""
    gradients, calls = [], []
    for is_checkpointed in (False, True):
        model = build_generator(drop_path_rate=0.3).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        count = []
        model.model.layers[0].mlp.register_forward_hook(lambda *args, count=count: count.append(1))
        torch.manual_seed(5)
        loss = model(**inputs).loss
        loss.backward()
        calls.append(len(count))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
    assert calls == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved, generator, inputs, dtype):
    """Loaded or made by `dtype=`, blocks are short, head and codec fp32, and logits fp32 and near the full ones."""
    model = AarForConditionalGeneration.from_pretrained(saved, dtype=dtype).eval()
    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.model.parameters()} == {dtype}
    made = AutoModel.from_config(copy.deepcopy(generator.config), dtype=dtype)
    for module in (model, made, model.to(dtype), copy.deepcopy(generator).to(dtype)):
        assert {parameter.dtype for parameter in module.codec_model.parameters()} == {torch.float32}
        assert module.lm_head.weight.dtype == torch.float32 and module.dtype == dtype
    assert torch.equal(model.lm_head.weight, generator.lm_head.weight)
    assert torch.equal(
        model.codec_model.decoder.layers[0].conv.bias, generator.codec_model.decoder.layers[0].conv.bias
    )
    logits = model(**inputs).logits
    assert logits.dtype == torch.float32
    expected = generator(**inputs).logits
    assert (logits - expected).abs().mean() < 0.1 * expected.std()
    sound = model.generate(conditioning_embeds=inputs["conditioning_embeds"], do_sample=False)
    assert sound.shape == (2, 1, 1920) and torch.isfinite(sound).all()
    assert torch.equal(model.to(dtype)(**inputs).logits, logits)


@torch.no_grad()
def test_the_codec_of_a_generator_stays_wide(build_generator):
    """Its sounds and codes are those of fp32 under autocast, too."""
    codec = build_generator().codec_model
    sound = torch.randn(1, 1, 1920, generator=torch.Generator().manual_seed(0))
    expected = codec(sound)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = codec(sound)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    assert torch.equal(output.audio_values, expected.audio_values)


def test_autocast(build_generator, inputs):
    """Training under bf16 autocast: fp32 logits, and fp32 gradients everywhere."""
    model = build_generator().train()
    model.config.conditioning_dropout = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    output.loss.backward()
    assert output.logits.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(output.loss, model.eval()(**inputs).loss, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        {"codec_model": "cpu", "lm_head": "cpu", "model": "disk"},
        {"codec_model": "disk", "lm_head": "cpu", "model": "cpu"},
    ],
    ids=["cpu", "layers on disk", "codec on disk"],
)
def test_device_map(saved, tmp_path, generator, inputs, device_map):
    """Wherever the parts lie, logits and generated sounds are the same."""
    model = AarForConditionalGeneration.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path).eval()
    torch.testing.assert_close(model(**inputs).logits, generator(**inputs).logits)
    arguments = {"conditioning_embeds": inputs["conditioning_embeds"], "return_dict_in_generate": True, "top_k": 8}
    ours = model.generate(**arguments, generator=torch.Generator().manual_seed(0))
    expected = generator.generate(**arguments, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.audio_codes, expected.audio_codes)
    torch.testing.assert_close(ours.audio, expected.audio)


# --- training mode ---------------------------------------------------------------------------------------------------


def test_randomness_in_training_only(build_generator, inputs):
    """Conditioning is dropped and blocks are skipped in training mode; evaluation is deterministic."""
    model = build_generator(conditioning_dropout=0.5, drop_path_rate=0.5).requires_grad_(False)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    torch.manual_seed(0)
    first = model(**inputs).logits
    assert not torch.equal(first, model(**inputs).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(**inputs).logits)


def test_given_draws_decide_what_is_dropped(build_generator, inputs):
    """With draws of its own an example doesn't depend on its batch or on the global generator."""
    model = build_generator(conditioning_dropout=0.5, drop_path_rate=0.5).requires_grad_(False)
    evaluated = model(**inputs).logits
    model.train()
    rows = inputs["audio_codes"].shape[0] * inputs["audio_codes"].shape[1]
    draws = torch.rand(rows, 5, generator=torch.Generator().manual_seed(0))
    logits = model(**inputs, dropout_draws=draws).logits
    assert torch.equal(logits, model(**inputs, dropout_draws=draws).logits)
    alone = {name: value[:1] for name, value in inputs.items()}
    windows = inputs["audio_codes"].shape[1]
    torch.testing.assert_close(model(**alone, dropout_draws=draws[:windows]).logits, logits[:windows])
    nothing_dropped = model(**inputs, dropout_draws=torch.ones(rows, 5))
    # the first block is never skipped, and the branches of the second are scaled up by 1 / (1 - 0.5)
    assert not torch.equal(nothing_dropped.logits, evaluated)
    dropped = model(**inputs, dropout_draws=torch.tensor([[0.0, 1, 1, 1, 1]]).expand(rows, -1)).logits
    unconditional = {
        **inputs,
        "conditioning_embeds": model.model.uncond_embedding.expand(len(inputs["audio_codes"]), -1),
    }
    torch.testing.assert_close(dropped, model(**unconditional, dropout_draws=torch.ones(rows, 5)).logits)


def test_dropped_rows_are_unconditional(build_generator):
    """A dropped row is predicted as with `uncond_embedding`, about the configured share of all rows."""
    model = build_generator(conditioning_dropout=0.3, drop_path_rate=0.0).requires_grad_(False)
    count = 400
    inputs = {"conditioning_embeds": random_embeds(1).expand(count, -1), "audio_codes": random_codes(1, 1, 13)}
    inputs["audio_codes"] = inputs["audio_codes"].expand(count, -1, -1)
    conditional = model(**inputs).logits[0]
    dropped = model(conditioning_embeds=model.model.uncond_embedding, audio_codes=inputs["audio_codes"][:1]).logits[0]
    torch.manual_seed(0)
    rows = model.train()(**inputs).logits
    is_dropped = ((rows - dropped).abs().amax((1, 2)) < 1e-4).tolist()
    is_kept = ((rows - conditional).abs().amax((1, 2)) < 1e-4).tolist()
    assert all(one != other for one, other in zip(is_dropped, is_kept, strict=True))
    assert 0.2 < sum(is_dropped) / count < 0.4


def test_codec_and_conditioner_stay_frozen(build_generator, clap_config, inputs):
    model = build_generator(conditioner_config=clap_config).train()
    assert model.training and model.model.training and model.lm_head.training
    for part in (model.codec_model, model.conditioner):
        assert not any(module.training for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())
    codebook = model.codec_model.quantizer.codebook.clone()
    codes = inputs["audio_codes"]
    model(input_ids=torch.randint(3, 60, (2, 5)), audio_codes=codes).loss.backward()
    model(input_ids=torch.randint(3, 60, (2, 5)), input_values=torch.randn(2, 1, 3000)).loss.backward()
    assert torch.equal(codebook, model.codec_model.quantizer.codebook)
    assert not model.eval().training


def test_lora(build_generator, inputs, tmp_path):
    """A PEFT adapter on the attention layers trains, changes the output, and survives saving."""
    peft = pytest.importorskip("peft")
    before = build_generator().requires_grad_(False)(**inputs).logits
    config = peft.LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"], init_lora_weights=True)
    model = peft.get_peft_model(build_generator(), config)
    torch.testing.assert_close(model.eval()(**inputs).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = model(**inputs).logits
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build_generator(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, after)
    sounds = again.generate(conditioning_embeds=inputs["conditioning_embeds"], do_sample=False)
    assert sounds.shape == (2, 1, 1920)


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_lora_on_all_linear_layers(build_generator, inputs, adaln, use_reentrant):
    """Modulations, too; and with either kind of gradient checkpointing every adapter gets a gradient."""
    peft = pytest.importorskip("peft")
    base = build_generator(adaln=adaln, drop_path_rate=0.0, conditioning_dropout=0.0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).train()
    if use_reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        base.enable_input_require_grads()
    model(**inputs).loss.backward()
    adapters = {name: part for name, part in model.named_parameters() if "lora_" in name and "codec" not in name}
    assert any(".modulation." in name or "shared_modulation" in name for name in adapters)
    in_blocks = [part.grad for name, part in adapters.items() if ".layers." in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in in_blocks)


def test_gradients_into_the_blocks_are_taken_away_again(build_generator):
    model = build_generator()
    model.enable_input_require_grads()
    assert len(model.model.embeddings._forward_hooks) == 1
    model.disable_input_require_grads()
    assert len(model.model.embeddings._forward_hooks) == 0


def test_there_is_no_table_to_resize(generator):
    with pytest.raises(ValueError, match="no table of tokens"):
        generator.resize_token_embeddings(20)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 300])
@pytest.mark.parametrize("with_gelu", [False, True])
def test_fused_linear_layers(dtype, num_rows, with_gelu):
    """Whatever kernel computes it, it is the product, the bias and the GELU."""
    torch.manual_seed(0)
    layer, inputs = AarLinear(256, 64).to(dtype), torch.randn(num_rows, 3, 256, dtype=dtype)
    expected = torch.nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double())
    expected = torch.nn.functional.gelu(expected, approximate="tanh") if with_gelu else expected
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(layer(inputs, with_gelu).double(), expected, atol=tolerance, rtol=tolerance)


def test_fused_linear_layers_are_for_inference():
    """Gradients and autocast take PyTorch's own kernels."""
    layer, inputs = AarLinear(256, 64), torch.randn(9, 256)
    layer(inputs, with_gelu=True).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16


def test_adapters_add_to_what_the_gelu_gets(build_generator):
    """An adapter on the MLP's first layer equals the layer that it is merged into, with and without gradients."""
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 256, "num_attention_heads": 4}
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=False)
    mlp = peft.get_peft_model(build_generator(**sizes).model.layers[0].mlp, config)
    inputs = torch.randn(2, 5, 256)
    trained = mlp(inputs)
    with torch.no_grad():
        torch.testing.assert_close(mlp(inputs), trained, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mlp.merge_and_unload()(inputs), trained, atol=1e-5, rtol=1e-4)


def test_lora_through_the_library(build_generator, inputs):
    peft = pytest.importorskip("peft")
    model = build_generator()
    before = model(**inputs).logits
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"], init_lora_weights=False))
    assert (model(**inputs).logits - before).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(model(**inputs).logits, before)


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_labels_are_averaged(build_generator):
    """Several labels of one sound are the mean of their rows; what the mask leaves out doesn't count."""
    model = build_generator(conditioning="label", labels=["Dog", "Rain", "Siren"]).requires_grad_(False)
    table = model.model.label_embeddings.weight
    embeds = model.encode_conditioning(input_ids=torch.tensor([[0, 2], [1, 0]]))
    torch.testing.assert_close(embeds, torch.stack([(table[0] + table[2]) / 2, (table[1] + table[0]) / 2]))
    masked = model.encode_conditioning(
        input_ids=torch.tensor([[0, 2], [1, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]])
    )
    torch.testing.assert_close(masked, torch.stack([(table[0] + table[2]) / 2, table[1]]))
    padded = model.encode_conditioning(input_ids=torch.tensor([[2, 3, 4]]), attention_mask=torch.tensor([[1, 0, 0]]))
    torch.testing.assert_close(padded, table[[2]])
    unlabelled = model.encode_conditioning(input_ids=torch.tensor([[0]]), attention_mask=torch.tensor([[0]]))
    assert torch.equal(unlabelled, model.model.uncond_embedding)
    with pytest.raises(ValueError, match="labels"):
        model.encode_conditioning(input_features=torch.zeros(1, 1, 100, 16))
    with pytest.raises(ValueError, match=r"\(batch_size, labels\)"):
        model.encode_conditioning(input_ids=torch.tensor([0, 1]))


def test_labels_are_trained(build_generator):
    model = build_generator(conditioning="label", labels=["Dog", "Rain", "Siren"]).train()
    model.config.conditioning_dropout = 0.0
    model(input_ids=torch.tensor([[0, 2]]), audio_codes=random_codes(1, 1, 13)).loss.backward()
    gradient = model.model.label_embeddings.weight.grad.abs().sum(-1)
    assert gradient[0] > 0 and gradient[2] > 0 and gradient[1] == 0


def test_clap_text_and_audio(build_generator, clap_config):
    """The conditioning is CLAP's joint embedding, of text or of a sound."""
    model = build_generator(conditioner_config=clap_config).requires_grad_(False)
    text = {"input_ids": torch.randint(3, 60, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    audio = {"input_features": torch.randn(2, 1, 100, 16), "is_longer": torch.tensor([[False], [False]])}
    expected = model.conditioner.get_text_features(**text).pooler_output
    assert torch.equal(model.encode_conditioning(**text), expected)
    sound = model.conditioner.get_audio_features(**audio).pooler_output
    assert torch.equal(model.encode_conditioning(**audio), sound)
    codes = random_codes(2, 1, 13)
    by_text = model(**text, audio_codes=codes).logits
    assert torch.equal(by_text, model(conditioning_embeds=expected, audio_codes=codes).logits)
    assert not torch.equal(by_text, model(**audio, audio_codes=codes).logits)


def test_attaching_a_conditioner(build_generator, clap_config, tmp_path):
    """A model without CLAP weights takes embeddings only, and says what to do, until it is given some."""
    model = build_generator()
    ids = torch.randint(3, 60, (1, 4))
    for arguments in ({"input_ids": ids}, {"input_features": torch.zeros(1, 1, 100, 16)}):
        with pytest.raises(ValueError, match=r"model\.attach_conditioner"):
            model.generate(**arguments)
    clap = ClapModel(clap_config).eval()
    model.attach_conditioner(clap)
    expected = clap.get_text_features(input_ids=ids).pooler_output
    assert torch.equal(model.encode_conditioning(input_ids=ids), expected)
    assert not any(parameter.requires_grad for parameter in model.conditioner.parameters())
    model.save_pretrained(tmp_path / "model")
    again = AarForConditionalGeneration.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.encode_conditioning(input_ids=ids), expected)
    clap.save_pretrained(tmp_path / "clap")
    fresh = build_generator().bfloat16()
    fresh.attach_conditioner(str(tmp_path / "clap"))
    assert fresh.conditioner.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="32 dimensions but this model takes 48"):
        build_generator(conditioning_dim=48).attach_conditioner(clap)
    with pytest.raises(ValueError, match="takes no CLAP"):
        build_generator(conditioning="label", labels=["Dog"]).attach_conditioner(clap)


def test_without_conditioning(build_generator):
    """A model without conditioning always sees `uncond_embedding`, and refuses others."""
    model = build_generator(conditioning="none").requires_grad_(False)
    codes = random_codes(2, 1, 13)
    logits = model(audio_codes=codes).logits
    inner = model.model(
        model.model.uncond_embedding.expand(2, -1), model.codec_model.quantizer.next_scale_inputs(codes)
    )
    assert torch.equal(logits, model.lm_head(inner.last_hidden_state))
    assert torch.equal(logits, model(input_ids=torch.zeros(2, 1, dtype=torch.long), audio_codes=codes).logits)
    with pytest.raises(ValueError, match="leave out `conditioning_embeds`"):
        model(conditioning_embeds=random_embeds(2), audio_codes=codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `conditioning_embeds`, `input_ids` and `input_features`, got none"),
        (
            {"conditioning_embeds": torch.zeros(2, 32), "input_ids": torch.zeros(2, 1, dtype=torch.long)},
            "got conditioning_embeds and input_ids",
        ),
        ({"conditioning_embeds": torch.zeros(2, 31)}, r"\(batch_size, 32\), got \(2, 31\)"),
        ({"conditioning_embeds": torch.zeros(3, 32)}, "3 conditionings for 2 sounds"),
        (
            {"conditioning_embeds": torch.zeros(2, 32), "input_values": torch.zeros(2, 1, 100)},
            "exactly one of `audio_",
        ),
        ({"conditioning_embeds": torch.zeros(2, 32), "audio_codes": None}, "exactly one of `audio_codes`"),
        (
            {"conditioning_embeds": torch.zeros(2, 32), "audio_codes": torch.zeros(2, 1, 12, dtype=torch.long)},
            r"num_windows, 13\), got \(2, 1, 12\)",
        ),
    ],
)
def test_bad_input_is_refused(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator(**{"audio_codes": torch.zeros(2, 1, 13, dtype=torch.long), **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 65, "num_attention_heads": 2}, "`hidden_size`"),
        ({"conditioning": "tags"}, "`conditioning`"),
        ({"adaln": "all"}, "`adaln`"),
        ({"conditioning": "label"}, "`labels`"),
        ({"labels": ["Dog"]}, "`labels`"),
        ({"conditioning": "label", "labels": ["Dog", "Dog"]}, "`labels`"),
        ({"conditioning": "label", "labels": ["Dog; Rain"]}, "`labels`"),
        ({"conditioning_dropout": 1.0}, "`conditioning_dropout`"),
        ({"drop_path_rate": -0.1}, "`drop_path_rate`"),
        ({"mlp_ratio": 0}, "`mlp_ratio`"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers`"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AarConfig(**fields)


def test_conditioner_must_fit(clap_config):
    with pytest.raises(ValueError, match="projection_dim"):
        AarConfig(conditioner_config=clap_config)
    with pytest.raises(ValueError, match="`conditioner_config` is for"):
        AarConfig(conditioner_config=clap_config, conditioning="none", conditioning_dim=32)


# --- initialisation --------------------------------------------------------------------------------------------------


def fresh_model(codec_fields: dict, **fields) -> AarForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    return AarForConditionalGeneration(AarConfig(codec_config=codec_fields, **sizes, **fields))


@torch.no_grad()
def test_initialisation(codec_fields):
    """Deviations of fresh weights: truncated normal of sqrt(1/3W), with the factors of near-identity blocks."""
    model = fresh_model(codec_fields, conditioning="label", labels=[f"label {index}" for index in range(50)])
    std, depth = math.sqrt(1 / (3 * 128)), 4
    layer = model.model.layers[1]
    expected = {
        "lm_head.weight": 0.02 * std,
        "model.label_embeddings.weight": std,
        "model.conditioning_mlp.fc1.weight": std,
        "model.conditioning_mlp.fc2.weight": std,
        "model.embeddings.input_proj.weight": std,
        "model.embeddings.positions": std,
        "model.embeddings.start_position": std,
        "model.embeddings.levels.weight": std,
        "model.layers.1.self_attn.qkv_proj.weight": std,
        "model.layers.1.self_attn.o_proj.weight": std / math.sqrt(2 * depth),
        "model.layers.1.mlp.fc1.weight": std,
        "model.layers.1.mlp.fc2.weight": std / math.sqrt(2 * depth),
        "model.norm.modulation.weight": 0.5 * std,
        "model.uncond_embedding": 1 / math.sqrt(512),
    }
    tensors = model.state_dict()
    for name, value in expected.items():
        tensor = tensors[name]
        tolerance = 0.05 + 2 / math.sqrt(tensor.numel())
        assert abs(tensor.std() / value - 1) < tolerance, name
        assert tensor.mean().abs() < 5 * value / math.sqrt(tensor.numel()), name
    parts = layer.modulation.weight.view(6, 128, 128)
    for part, factor in zip(parts, (1e-5, 1e-5, 0.5, 0.5, 0.5, 0.5), strict=True):
        assert abs(part.std() / (factor * std) - 1) < 0.05
    assert torch.equal(layer.self_attn.log_scale, torch.full((2,), math.log(4)))
    biases = [name for name in tensors if name.endswith("bias") and not name.startswith("codec_model")]
    assert len(biases) > 20 and not any(tensors[name].any() for name in biases)


@torch.no_grad()
def test_initialisation_of_variants(codec_fields):
    model = fresh_model(codec_fields, adaln="shared")
    parts = model.model.shared_modulation.weight.view(6, 128, 128).std((1, 2))
    std = math.sqrt(1 / (3 * 128))
    torch.testing.assert_close(parts / std, torch.tensor([1e-5, 1e-5, 0.5, 0.5, 0.5, 0.5]), atol=0, rtol=0.05)
    offsets = torch.stack([layer.modulation_offset for layer in model.model.layers]).std((0, 2)) * math.sqrt(128)
    torch.testing.assert_close(offsets, torch.tensor([1e-5, 1e-5, 1, 1, 1, 1]), atol=0, rtol=0.15)
    plain = fresh_model(codec_fields, adaln="none").model
    assert torch.equal(plain.layers[0].norm1.weight, torch.ones(128)) and not plain.layers[0].norm2.bias.any()
    assert torch.equal(plain.norm.weight, torch.ones(128))


@torch.no_grad()
def test_fresh_blocks_are_near_identities(codec_fields):
    model = fresh_model(codec_fields).eval()
    codes = random_codes(2, 1, 455)
    output = model(conditioning_embeds=torch.randn(2, 512), audio_codes=codes, output_hidden_states=True)
    first, last = output.hidden_states[0], output.hidden_states[-1]
    assert 0 < (last - first).abs().max() < 1e-3 * first.abs().max()
    assert abs(output.loss - math.log(16)) < 0.01
