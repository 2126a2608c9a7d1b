"""Packed and int8 weights: what they change of products and sounds, and what a model can't do any more."""

import copy

import pytest
import torch
from transformers import CompileConfig

from transformers_aar import compilation_aar, modeling_aar
from transformers_aar.linear_aar import (
    AarFixedLinear,
    AarInt8Linear,
    AarLinear,
    AarPackedLinear,
    has_int8_products,
    has_packed_products,
)

needs_kernel = pytest.mark.skipif(not has_int8_products(), reason="this processor has no 8-bit products")
needs_packed = pytest.mark.skipif(not has_packed_products(torch.float32), reason="PyTorch has no packed products here")
# methods that lay weights out, and the largest relative error of logits that they may bring
METHODS = [
    pytest.param("prepack", AarPackedLinear, 1e-5, marks=needs_packed),
    pytest.param("to_int8", AarInt8Linear, 0.05, marks=needs_kernel),
]


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values.double() - expected).norm() / expected.norm()).item()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_nearly_the_same(dtype, with_gelu, has_bias):
    """Eight bits for each factor leave an error of about one per cent, whatever the sizes of rows and outputs."""
    torch.manual_seed(0)
    layer = AarLinear(256, 64, bias=has_bias).requires_grad_(False)
    layer.weight.mul_(torch.logspace(-3, 1, 64)[:, None])
    inputs = (torch.randn(2, 9, 256) * torch.logspace(-2, 2, 9)[:, None]).to(dtype)
    output = AarInt8Linear(layer)(inputs, with_gelu)
    expected = layer.double()(inputs.double(), with_gelu)
    assert output.dtype == dtype and output.shape == (2, 9, 64)
    for row in range(9):
        assert 1e-4 < relative_error(output[:, row], expected[:, row]) < 0.025


@needs_packed
@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.001)])
@pytest.mark.parametrize("num_rows", [1, 2, 18, 150, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_products_are_the_same(dtype, tolerance, num_rows, has_bias):
    """For any number of rows, and inputs of any dtype."""
    if not has_packed_products(dtype):
        pytest.skip(f"this processor multiplies no {dtype}")
    torch.manual_seed(0)
    layer = AarLinear(256, 64, bias=has_bias, dtype=dtype).requires_grad_(False)
    packed = AarPackedLinear(layer)
    for input_dtype, input_tolerance in ((torch.float32, 0), (torch.bfloat16, 0.01), (torch.float16, 0.001)):
        inputs = torch.randn(2, num_rows, 256).to(input_dtype)
        for with_gelu in (False, True):
            output = packed(inputs, with_gelu)
            expected = copy.deepcopy(layer).double()(inputs.double(), with_gelu)
            assert output.dtype == input_dtype and output.shape == (2, num_rows, 64)
            assert relative_error(output, expected) < max(tolerance, input_tolerance)


@needs_kernel
@torch.no_grad()
def test_rows_and_zeros():
    """A row is the same alone and among others, and zeros stay zeros."""
    torch.manual_seed(0)
    layer = AarInt8Linear(AarLinear(256, 64))
    inputs = torch.randn(7, 256) * torch.logspace(-2, 2, 7)[:, None]
    inputs[3] = 0
    together = layer(inputs)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in inputs]), together, atol=0, rtol=1e-6)
    assert torch.equal(together[3], layer.bias) and together.isfinite().all()
    empty = AarLinear(256, 64, bias=False)
    empty.weight.zero_()
    assert torch.equal(AarInt8Linear(empty)(inputs), torch.zeros(7, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method, layer_class, tolerance", METHODS)
def test_generator(build_generator, method, layer_class, tolerance, dtype):
    """Logits change a little; sounds are drawn as ever, each one alike alone and among others."""
    if method == "prepack" and not has_packed_products(dtype):
        pytest.skip(f"this processor multiplies no {dtype}")
    model = build_generator().to(dtype)
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = torch.randint(0, 16, (3, model.config.num_slots), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(conditioning_embeds=embeds, audio_codes=codes).logits
        assert getattr(model, method)() is model
        after = model(conditioning_embeds=embeds, audio_codes=codes).logits
    assert relative_error(after, before.double()) < (tolerance if dtype == torch.float32 else 0.05)
    layers = [module for module in model.modules() if isinstance(module, AarLinear)]
    assert len(layers) == 4 * model.config.num_hidden_layers
    assert all(isinstance(layer, layer_class) for layer in layers)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    output = model.generate(conditioning_embeds=embeds, generator=generators(), return_dict_in_generate=True)
    assert output.audio.shape == (3, 1, 1920) and output.audio.isfinite().all()
    for number, generator in enumerate(generators()):
        alone = model.generate(
            conditioning_embeds=embeds[number : number + 1], generator=generator, return_dict_in_generate=True
        )
        assert torch.equal(alone.audio_codes[0], output.audio_codes[number])


@pytest.mark.parametrize("method, layer_class, tolerance", METHODS)
def test_adapters_stay(build_generator, method, layer_class, tolerance):
    """An adapter goes on adding to what the layer gives."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(build_generator(), config).eval()
    embeds = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(2, model.config.num_slots, dtype=torch.long)
    with torch.no_grad():
        before = model(conditioning_embeds=embeds, audio_codes=codes).logits
        getattr(model.base_model.model, method)()
        after = model(conditioning_embeds=embeds, audio_codes=codes).logits
        with model.disable_adapter():
            without = model(conditioning_embeds=embeds, audio_codes=codes).logits
    assert relative_error(after, before.double()) < tolerance
    assert relative_error(without, before.double()) > 0.05


@pytest.mark.parametrize("method, layer_class, tolerance", METHODS)
def test_no_way_back(build_generator, tmp_path, method, layer_class, tolerance):
    """What would lose the weights says so, and writes nothing."""
    model = getattr(build_generator(), method)()
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    with pytest.raises(ValueError, match="before `prepack` or `to_int8`"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    layer = model.model.layers[0].mlp.fc1
    with pytest.raises(ValueError, match="load the model anew to use it on another device"):
        layer(torch.zeros(1, layer.in_features, device="meta"))
    with pytest.raises(ValueError, match="load the model anew to train it"):
        layer(torch.zeros(1, layer.in_features, requires_grad=True))


@torch.no_grad()
@pytest.mark.parametrize("method, layer_class, tolerance", METHODS)
def test_copies(build_generator, method, layer_class, tolerance):
    """A copy computes the same, whatever becomes of the dtype of the rest; and a second time changes nothing."""
    model = getattr(build_generator(), method)()
    inputs = {
        "conditioning_embeds": torch.randn(1, 32, generator=torch.Generator().manual_seed(0)),
        "audio_codes": torch.zeros(1, model.config.num_slots, dtype=torch.long),
    }
    logits = model(**inputs).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, logits)
    copied.bfloat16()
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(getattr(model, method)()(**inputs).logits, logits)


@pytest.mark.parametrize("method, layer_class, tolerance", METHODS)
def test_nothing_is_compiled(build_generator, method, layer_class, tolerance):
    model = getattr(build_generator(), method)()
    embeds = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))

    def refuse(graph, inputs):
        raise AssertionError("compiled")

    config = CompileConfig(backend=refuse, mode="default")
    plain, compiled = (
        model.generate(conditioning_embeds=embeds, generator=torch.Generator().manual_seed(1), **arguments)
        for arguments in ({}, {"compile_config": config})
    )
    assert torch.equal(compiled, plain)
    assert model not in compilation_aar._COMPILED


@needs_kernel
@needs_packed
def test_one_after_the_other(build_generator):
    model = build_generator().prepack()
    with pytest.raises(ValueError, match="laid out for a CPU already: load the model anew"):
        model.to_int8()


def test_where_it_is_refused(build_generator, monkeypatch):
    """Other devices, dtypes and processors without the kernels; the model stays as it was."""
    model = build_generator()
    with pytest.raises(ValueError, match="packed torch.float64"):
        copy.deepcopy(model).double().prepack()
    for name, method in (("has_int8_products", "to_int8"), ("has_packed_products", "prepack")):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_aar, name, lambda *_: False)
            with pytest.raises(ValueError, match="leave "):
                getattr(model, method)()
            patch.setattr(modeling_aar, name, lambda *_: True)
            with pytest.raises(ValueError, match="on meta: move it first"):
                getattr(copy.deepcopy(model).to("meta"), method)()
    assert not any(isinstance(module, AarFixedLinear) for module in model.modules())
