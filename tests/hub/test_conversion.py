"""Converting the reference's checkpoints: the tensors and numbers that come out, and what bad files are told."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import ClapModel, pipeline

from transformers_aar import AarForConditionalGeneration, AarProcessor, SatFeatureExtractor, SatModel
from transformers_aar.hub.conversion import convert_checkpoint
from transformers_aar.training.discriminators import AudioDiscriminator

FOLDERS = ("tiny", "tiny_noproj", "tiny_noaln")


def reference_tensors(path: Path, key: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint[key].items()}


def edited(path: Path, target: Path, key: str | None, edit) -> Path:
    """A copy of a checkpoint after `edit` has changed it, or the state dict under `key`."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    edit(checkpoint if key is None else checkpoint[key])
    torch.save(checkpoint, target)
    return target


@pytest.mark.parametrize("name", FOLDERS)
def test_codec_equals_the_reference(name, fixtures_dir, tmp_path):
    """Read back from its folder, the codec gives the reference's numbers and has its codebooks' statistics."""
    fixture = fixtures_dir / name
    scales = json.loads((fixture / "config.json").read_text())["sat"]["multi_scale"]
    convert_checkpoint(fixture / "sat_upstream.pth", tmp_path / "sat", scales=scales)

    model = SatModel.from_pretrained(tmp_path / "sat")
    expected = load_file(fixture / "expected.safetensors")
    with torch.no_grad():
        encoder_out = model.encoder(expected["wave"])
        audio_codes = model.encode(expected["wave"]).audio_codes
        audio_values = model.decode(audio_codes).audio_values
    torch.testing.assert_close(encoder_out, expected["encoder_out"], rtol=0, atol=1e-5)
    for index, codes in enumerate(model.split_scales(audio_codes)):
        assert torch.equal(codes.flatten(0, 1), expected[f"codes_{index:02d}"])
    recon = expected["recon"]
    torch.testing.assert_close(audio_values[: len(recon)], recon, rtol=0, atol=1e-5)

    theirs = reference_tensors(fixture / "sat_upstream.pth", "generator_state_dict")
    for index in range(len(scales)):
        prefix = f"quantizer.vq.layers.{index}._codebook"
        assert torch.equal(model.quantizer.codebook[index], theirs[f"{prefix}.embed"])
        assert torch.equal(model.quantizer.codebook_sum[index], theirs[f"{prefix}.embed_avg"])
        assert torch.equal(model.quantizer.cluster_size[index], theirs[f"{prefix}.cluster_size"])
    assert bool(model.quantizer.initialized)
    weight = model.encoder.layers[0].conv.parametrizations.weight
    assert torch.equal(weight.original0, theirs["encoder.model.0.conv.conv.weight_g"])
    assert torch.equal(weight.original1, theirs["encoder.model.0.conv.conv.weight_v"])
    assert SatFeatureExtractor.from_pretrained(tmp_path / "sat").sampling_rate == 24_000


@pytest.mark.parametrize("name", FOLDERS)
def test_generator_equals_the_reference(name, fixtures_dir, tmp_path):
    """Read back from its folder, the generator gives the reference's logits; the scales come from its own table."""
    fixture = fixtures_dir / name
    convert_checkpoint(fixture / "sat_upstream.pth", tmp_path / "aar", aar_path=fixture / "aar_upstream.pth")

    model = AarForConditionalGeneration.from_pretrained(tmp_path / "aar")
    expected = load_file(fixture / "expected.safetensors")
    codes = [expected[key] for key in sorted(expected) if key.startswith("codes_")]
    with torch.no_grad():
        audio_codes = torch.cat(codes, dim=1)[:, None]
        logits = model(conditioning_embeds=expected["aar.cond"], audio_codes=audio_codes).logits
    torch.testing.assert_close(logits, expected["aar.logits"], rtol=0, atol=1e-4)

    config = json.loads((fixture / "config.json").read_text())
    assert model.config.use_qk_norm == config["aar"]["cos_attn"]
    assert model.config.codec_config.scales == config["sat"]["multi_scale"]
    assert model.config.drop_path_rate == pytest.approx(config["aar_derived"]["drop_path_rate"])
    theirs = reference_tensors(fixture / "aar_upstream.pth", "model_state_dict")
    assert torch.equal(model.model.uncond_embedding, theirs["uncond_embedding"])
    if "blocks.1.ada_gss" in theirs:
        assert torch.equal(model.model.layers[1].modulation_offset, theirs["blocks.1.ada_gss"][0, 0])
    assert model.conditioner is None


def test_codec_inside_the_generator_is_the_whole_codec(fixtures_dir, tmp_path):
    """The generator's folder needs no second one: its codec has every tensor of the codec converted alone."""
    fixture = fixtures_dir / "tiny"
    codec = convert_checkpoint(fixture / "sat_upstream.pth", tmp_path / "sat")
    convert_checkpoint(fixture / "sat_upstream.pth", tmp_path / "aar", aar_path=fixture / "aar_upstream.pth")
    inside = AarForConditionalGeneration.from_pretrained(tmp_path / "aar").codec_model
    assert inside.state_dict().keys() == codec.state_dict().keys()
    for name, tensor in codec.state_dict().items():
        assert torch.equal(inside.state_dict()[name], tensor), name


def test_discriminator_comes_along(fixtures_dir, tmp_path):
    """Training goes on with it: loaded again, it gives the reference's logits."""
    fixture = fixtures_dir / "tiny"
    convert_checkpoint(fixture / "sat_upstream.pth", tmp_path / "sat")
    discriminator = AudioDiscriminator.load(tmp_path / "sat" / "discriminator.safetensors")
    expected = load_file(fixture / "expected.safetensors")
    with torch.no_grad():
        output = discriminator(expected["wave"])
    assert len(output.logits) == 3
    for index, logits in enumerate(output.logits):
        torch.testing.assert_close(logits, expected[f"disc.{index}.logits"], rtol=0, atol=5e-5)


def test_card_claims_no_licence(fixtures_dir, tmp_path):
    """Nobody stated a licence for the published weights, so a converted folder must not claim ours."""
    convert_checkpoint(fixtures_dir / "tiny" / "sat_upstream.pth", tmp_path / "sat")
    card = ModelCard.load(tmp_path / "sat" / "README.md")
    assert card.data.license == "unknown"
    assert "AudioSet" in card.text


def test_conditioner_goes_inside(fixtures_dir, tmp_path, tiny_clap_dir):
    """With a CLAP folder the converted generator takes text."""
    fixture = fixtures_dir / "tiny"
    convert_checkpoint(
        fixture / "sat_upstream.pth",
        tmp_path / "aar",
        aar_path=fixture / "aar_upstream.pth",
        conditioner=str(tiny_clap_dir),
    )
    model = AarForConditionalGeneration.from_pretrained(tmp_path / "aar")
    for name, tensor in ClapModel.from_pretrained(tiny_clap_dir).state_dict().items():
        assert torch.equal(model.conditioner.state_dict()[name], tensor), name
    processor = AarProcessor.from_pretrained(tmp_path / "aar")
    inputs = processor(["a dog barks", "rain"], return_tensors="pt")
    audio = model.generate(**inputs, guidance_scale=0.0, generator=torch.Generator().manual_seed(0))
    assert audio.shape == (2, 1, 24_000)


def test_generator_without_conditioner_has_a_processor(fixtures_dir, tmp_path):
    """The pipeline loads its folder, and says what is missing when it is given text."""
    fixture = fixtures_dir / "tiny"
    convert_checkpoint(fixture / "sat_upstream.pth", tmp_path / "aar", aar_path=fixture / "aar_upstream.pth")
    processor = AarProcessor.from_pretrained(tmp_path / "aar")
    assert processor.feature_extractor.sampling_rate == 24_000
    assert processor.labels is None
    generator = pipeline("text-to-audio", str(tmp_path / "aar"))
    with pytest.raises(ValueError, match="attach_conditioner"):
        generator("a dog barks")


def bad_conversions(fixtures: Path, tmp_path: Path) -> dict[str, tuple[dict, str]]:
    """Arguments that must be refused, and what the one sentence must say."""
    sat, aar = fixtures / "tiny" / "sat_upstream.pth", fixtures / "tiny" / "aar_upstream.pth"
    text, truncated, tensors = tmp_path / "text.pth", tmp_path / "truncated.pth", tmp_path / "x.safetensors"
    text.write_text("no checkpoint")
    truncated.write_bytes(sat.read_bytes()[:100_000])
    sound = tmp_path / "sound.pth"
    sound.write_bytes(b"RIFF\x24\x08\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00")
    save_file({"x": torch.zeros(1)}, tensors)
    foreign, plain = tmp_path / "foreign.pth", tmp_path / "plain.pth"
    torch.save({"generator_state_dict": {"x": os.system}}, foreign)
    torch.save({"generator_state_dict": [1, 2]}, plain)

    def codebooks(state_dict: dict) -> list[str]:
        return [name for name in state_dict if name.endswith("_codebook.embed")]

    def changed(path: Path, key: str | None, edit) -> Path:
        return edited(path, tmp_path / f"changed-{len(list(tmp_path.iterdir()))}.pth", key, edit)

    sat_key, aar_key, disc_key = "generator_state_dict", "model_state_dict", "disc_state_dict"
    k_bias, kernel = "module.blocks.1.attn.zero_k_bias", "module.discriminators.1.spec_transform.conv_imag.weight"
    embed, positions = "module.word_embed.weight", "module.pos_1LC"
    phi, codebook = "module.quantizer.vq.quant_resi.qresi_ls.3.weight", "module.quantizer.vq.layers.7._codebook.embed"
    return {
        "missing": ({"sat_path": tmp_path / "nowhere.pth"}, "nowhere.pth doesn't exist"),
        "folder": ({"sat_path": tmp_path}, "can't be read"),
        "text": ({"sat_path": text}, "can't be read"),
        "truncated": ({"sat_path": truncated}, "can't be read"),
        "sound": ({"sat_path": sound}, "can't be read"),
        "safetensors": ({"sat_path": tensors}, "x.safetensors"),
        "code": ({"sat_path": foreign}, "can't be read"),
        "no tensors": ({"sat_path": plain}, "doesn't hold a dictionary of tensors"),
        "AAR as SAT": ({"sat_path": aar}, "is the AAR's checkpoint"),
        "SAT as AAR": ({"sat_path": sat, "aar_path": sat}, "is the SAT's checkpoint"),
        "other file": ({"sat_path": fixtures / "tiny" / "disc5_upstream.pth"}, "is no checkpoint of the reference"),
        "entry": ({"sat_path": changed(sat, None, lambda c: c.update(ema_state_dict={}))}, "ema_state_dict"),
        "left over": (
            {"sat_path": changed(sat, sat_key, lambda c: c.update({"module.encoder.gate": torch.zeros(1)}))},
            "no part of the model takes: encoder.gate.",
        ),
        "left over in AAR": (
            {"sat_path": sat, "aar_path": changed(aar, aar_key, lambda c: c.update({"blocks.0.gamma": c[k_bias]}))},
            "no part of the model takes: blocks.0.gamma.",
        ),
        "missing tensor": (
            {"sat_path": changed(sat, sat_key, lambda c: c.pop("module.decoder.model.15.conv.conv.bias"))},
            "makes: decoder.layers.15.conv.bias",
        ),
        "missing codebook": ({"sat_path": changed(sat, sat_key, lambda c: c.pop(codebook))}, "_codebook.embed"),
        "unequal codebooks": (
            {"sat_path": changed(sat, sat_key, lambda c: c.update({codebook: c[codebook][:5]}))},
            "different sizes",
        ),
        "dimensions": (
            {"sat_path": changed(sat, sat_key, lambda c: c.update({phi: c[phi][0, 0, 0]}))},
            "quantizer.vq.quant_resi.qresi_ls.3.weight has the shape ()",
        ),
        "dimensions of a codebook": (
            {"sat_path": changed(sat, sat_key, lambda c: c.update(dict.fromkeys(codebooks(c), torch.zeros(3))))},
            "quantizer.codebook has the shape (16, 3)",
        ),
        "dimensions in AAR": (
            {"sat_path": sat, "aar_path": changed(aar, aar_key, lambda c: c.update({positions: c[positions][0]}))},
            "pos_1LC has the shape (455, 128)",
        ),
        "wrong size": (
            {"sat_path": changed(sat, sat_key, lambda c: c.update({phi: c[phi][:, :4]}))},
            "quantizer.vq.quant_resi.qresi_ls.3.weight",
        ),
        "no scales": ({"sat_path": fixtures / "tiny_noproj" / "sat_upstream.pth"}, "10 scales"),
        "wrong scales": ({"sat_path": sat, "aar_path": aar, "scales": [1, 75]}, "trained with the scales"),
        "impossible scales": ({"sat_path": sat, "scales": [1] * 16}, "`scales`"),
        "too few scales": ({"sat_path": sat, "scales": [1, 2, 75]}, "has 16 scales, but 3 are given"),
        "wrong ratios": ({"sat_path": sat, "upsampling_ratios": [2, 4, 5, 8]}, "upsampling ratios [8, 5, 4, 2]"),
        "other codec": (
            {"sat_path": fixtures / "tiny_noproj" / "sat_upstream.pth", "aar_path": aar},
            "has 10 scales, but 16",
        ),
        "other width": (
            {"sat_path": sat, "aar_path": changed(aar, aar_key, lambda c: c.update({embed: c[embed][:, :8]}))},
            "belongs to a SAT with codebook_dim 8",
        ),
        "levels": (
            {"sat_path": sat, "aar_path": changed(aar, aar_key, lambda c: c["module.lvl_1L"].fill_(2))},
            "lvl_1L",
        ),
        "mask": (
            {"sat_path": sat, "aar_path": changed(aar, aar_key, lambda c: c["module.attn_bias_for_masking"].zero_())},
            "attn_bias_for_masking",
        ),
        "key bias": (
            {"sat_path": sat, "aar_path": changed(aar, aar_key, lambda c: c[k_bias].fill_(1))},
            "zero_k_bias",
        ),
        "Fourier": ({"sat_path": changed(sat, disc_key, lambda c: c[kernel].mul_(2))}, "Fourier"),
        "no CLAP": ({"sat_path": sat, "aar_path": aar, "conditioner": str(tmp_path)}, "loaded as a CLAP model"),
        "conditioner": ({"sat_path": sat, "conditioner": "laion/clap"}, "--aar"),
    }


def test_bad_input_gets_one_sentence_and_no_folder(fixtures_dir, tmp_path):
    """Each wrong argument is refused by a ValueError that names the fault; nothing is left behind."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name, (arguments, sentence) in bad_conversions(fixtures_dir, tmp_path / "in").items():
        with pytest.raises(ValueError) as caught:
            convert_checkpoint(output_dir=tmp_path / "out" / "model", **arguments)
        assert sentence in str(caught.value), f"{name}: {caught.value}"
        assert "\n" not in str(caught.value), name
        assert not list((tmp_path / "out").iterdir()), name


def test_output_that_cannot_be_written(fixtures_dir, tmp_path):
    """A used folder stays as it is, and a place where no folder can be is named."""
    sat = fixtures_dir / "tiny" / "sat_upstream.pth"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_checkpoint(sat, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="can't be written"):
        convert_checkpoint(sat, tmp_path / "used" / "notes.txt" / "model")
    (tmp_path / "empty").mkdir()
    convert_checkpoint(sat, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "used"]
