"""Loading and sharing: Auto classes, the pipeline, code that travels with a folder, and what a saved folder holds."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoModelForTextToWaveform,
    AutoProcessor,
    ClapModel,
    PreTrainedModel,
    pipeline,
)

from transformers_aar import (
    AarConfig,
    AarForConditionalGeneration,
    AarModel,
    AarProcessor,
    SatConfig,
    SatFeatureExtractor,
    SatModel,
)
from transformers_aar.hub.label_tokenizer import label_tokenizer

LABELS = ["Siren", "Dog", "Rain"]
CONDITIONINGS = ["clap", "label", "none"]
MODELS = ["codec", *CONDITIONINGS]


@dataclass
class Saved:
    """A model with what processes its inputs, and the folder that both were saved in."""

    model: PreTrainedModel
    processor: AarProcessor | SatFeatureExtractor
    folder: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, build_codec, build_generator, clap_config, build_clap_processor) -> dict[str, Saved]:
    """The codec and a generator of each conditioning, saved once; neither they nor their folders are to be changed."""
    clap = build_clap_processor()
    labels = {"conditioning": "label", "labels": LABELS}
    parts = {
        "codec": (build_codec(), SatFeatureExtractor()),
        "clap": (
            build_generator(conditioning="clap", conditioner_config=clap_config),
            AarProcessor(SatFeatureExtractor(), clap.tokenizer, clap.feature_extractor),
        ),
        "label": (
            build_generator(**labels),
            AarProcessor(SatFeatureExtractor(), label_tokenizer(LABELS), labels=LABELS),
        ),
        "none": (build_generator(conditioning="none"), AarProcessor(SatFeatureExtractor(), label_tokenizer())),
    }
    root = tmp_path_factory.mktemp("models")
    for name, (model, processor) in parts.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: Saved(model, processor, root / name) for name, (model, processor) in parts.items()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(model: AarForConditionalGeneration, processor: AarProcessor, text="siren", **kwargs) -> torch.Tensor:
    return model.generate(**processor(text, return_tensors="pt"), generator=seeded(), **kwargs)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that aren't saved included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


# --- Auto classes and the pipeline ---


def test_auto_classes_load_the_codec(saved):
    """By its folder alone: configuration, model under both its Auto classes, and feature extractor."""
    folder = saved["codec"].folder
    assert type(AutoConfig.from_pretrained(folder)) is SatConfig
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is SatFeatureExtractor
    for auto_class in (AutoModel, AutoModelForAudioTokenization):
        model = auto_class.from_pretrained(folder)
        assert type(model) is SatModel
        assert model.fingerprint() == saved["codec"].model.fingerprint()
        assert not model.training


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_auto_classes_load_the_generator(saved, name):
    """By its folder alone: configuration, model under both its Auto classes, processor; and it sounds as it did."""
    folder = saved[name].folder
    assert type(AutoConfig.from_pretrained(folder)) is AarConfig
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is SatFeatureExtractor
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is AarProcessor
    expected = generate(saved[name].model, saved[name].processor)
    for auto_class in (AutoModel, AutoModelForTextToWaveform):
        model = auto_class.from_pretrained(folder)
        assert type(model) is AarForConditionalGeneration
        assert torch.equal(generate(model, processor), expected)


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_pipeline(saved, name):
    """One prompt and several, with the saved defaults and with arguments, give what `generate` gives."""
    text_to_audio = pipeline("text-to-audio", str(saved[name].folder))
    sound = text_to_audio("Siren", generate_kwargs={"generator": seeded()})
    assert sound["sampling_rate"] == 24_000
    expected = generate(saved[name].model, saved[name].processor, "Siren")
    np.testing.assert_array_equal(sound["audio"], expected.squeeze().numpy())

    arguments = {"num_windows": 2, "top_k": 5, "guidance_scale": 0.0 if name == "none" else 2.0}
    sounds = text_to_audio(["Siren", "Dog"], generate_kwargs={"generator": seeded(), **arguments})
    assert len(sounds) == 2
    expected = generate(saved[name].model, saved[name].processor, "Siren", **arguments)
    np.testing.assert_array_equal(sounds[0]["audio"], expected.squeeze().numpy())
    assert sounds[1]["audio"].shape == (3840,)
    assert not np.array_equal(sounds[0]["audio"], sounds[1]["audio"])


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_pipeline_in_bf16(saved, name):
    text_to_audio = pipeline("text-to-audio", str(saved[name].folder), dtype=torch.bfloat16)
    assert text_to_audio.model.model.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    audio = text_to_audio("Siren")["audio"]
    assert audio.shape == (1920,)
    assert np.isfinite(audio).all() and audio.std() > 0


def test_pipeline_names_the_nearest_labels(saved):
    text_to_audio = pipeline("text-to-audio", str(saved["label"].folder))
    with pytest.raises(ValueError, match="'sirn'.*'Siren'"):
        text_to_audio("sirn")


# --- without the package ---

WITHOUT_PACKAGE = """
import json, sys
from pathlib import Path
sys.modules["transformers_aar"] = None  # it may well be installed here: from now on importing it fails
try:
    import transformers_aar
except ImportError:
    pass
else:
    sys.exit("the package can be imported")
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization, AutoModelForTextToWaveform,
    AutoProcessor, pipeline,
)

models, again = map(Path, sys.argv[1:])
classes, audio = {}, {}

def load(auto_class, folder):
    loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    classes.setdefault(folder.name, []).append(type(loaded).__name__)
    return loaded

def sound(model, processor):
    return model.generate(**processor("siren", return_tensors="pt"), generator=torch.Generator().manual_seed(0))

for auto_class in (AutoConfig, AutoFeatureExtractor, AutoModelForAudioTokenization, AutoModel):
    codec = load(auto_class, models / "codec")
torch.set_grad_enabled(False)
codec.save_pretrained(again / "codec")
load(AutoFeatureExtractor, models / "codec").save_pretrained(again / "codec")
audio["codec"] = codec.decode(codec.encode(torch.linspace(-1, 1, 3000)[None, None]).audio_codes).audio_values
for name in ("clap", "label", "none"):
    for auto_class in (AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTextToWaveform):
        model = load(auto_class, models / name)
    processor = load(AutoProcessor, models / name)
    model.save_pretrained(again / name)
    processor.save_pretrained(again / name)
    audio[name] = sound(model, processor)
    audio[name + " again"] = sound(load(AutoModel, again / name), load(AutoProcessor, again / name))
    text_to_audio = pipeline("text-to-audio", str(models / name), trust_remote_code=True)
    torch.manual_seed(1)
    audio[name + " by pipeline"] = torch.from_numpy(text_to_audio("siren")["audio"])
assert [name for name in sys.modules if name.startswith("transformers_aar")] == ["transformers_aar"]
save_file({name: tensor.contiguous() for name, tensor in audio.items()}, again / "audio.safetensors")
(again / "classes.json").write_text(json.dumps(classes))
"""


@pytest.fixture(scope="module")
def remote(saved, tmp_path_factory) -> Path:
    """Folder with what a process without the package made of the saved models, and with what it saved of them."""
    again = tmp_path_factory.mktemp("remote")
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(saved["codec"].folder.parent), str(again)]
    process = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    return again


def test_remote_code_is_loaded_by_the_auto_classes(remote):
    classes = json.loads((remote / "classes.json").read_text())
    codec = ["SatConfig", "SatFeatureExtractor", "SatModel", "SatModel"]
    assert classes["codec"] == [*codec, "SatFeatureExtractor"]
    generator = ["AarConfig", "SatFeatureExtractor", *["AarForConditionalGeneration"] * 2, "AarProcessor"]
    assert [classes[name] for name in CONDITIONINGS] == [[*generator, *generator[-2:]]] * 3


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_remote_code_gives_the_same_sounds(saved, remote, name):
    """From the package's folder, from one that was saved without the package, and through the pipeline."""
    audio = load_file(remote / "audio.safetensors")
    expected = generate(saved[name].model, saved[name].processor)
    assert torch.equal(audio[name], expected)
    assert torch.equal(audio[f"{name} again"], expected)
    torch.manual_seed(1)
    expected = saved[name].model.generate(**saved[name].processor("siren"))
    assert torch.equal(audio[f"{name} by pipeline"], expected.squeeze())


def test_remote_code_of_the_codec_gives_the_same_sound(saved, remote):
    codec = saved["codec"].model
    with torch.no_grad():
        expected = codec.decode(codec.encode(torch.linspace(-1, 1, 3000)[None, None]).audio_codes).audio_values
    assert torch.equal(load_file(remote / "audio.safetensors")["codec"], expected)


@pytest.mark.parametrize("name", MODELS)
def test_saving_without_the_package_carries_the_code_along(saved, remote, name):
    """The folder is the one that the package wrote, byte by byte; only the card comes from the package."""
    expected = files_of(saved[name].folder)
    del expected["README.md"]
    assert files_of(remote / name) == expected


# --- folders ---


@pytest.mark.parametrize("name", MODELS)
def test_saving_again_gives_identical_files(saved, name, tmp_path):
    """Save, load, save: the same files with the same bytes; all weights are safetensors."""
    auto_class = AutoFeatureExtractor if name == "codec" else AutoProcessor
    AutoModel.from_pretrained(saved[name].folder).save_pretrained(tmp_path)
    auto_class.from_pretrained(saved[name].folder).save_pretrained(tmp_path)
    files = files_of(saved[name].folder)
    assert files_of(tmp_path) == files
    assert {"config.json", "model.safetensors", "README.md", "modeling_sat.py"} <= files.keys()
    assert {Path(file).suffix for file in files} == {".json", ".safetensors", ".md", ".py"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_survives(saved, name, dtype):
    """All parameters and buffers come back as they were; quantizer, head and a generator's codec stay fp32."""
    expected = tensors_of(saved[name].model)
    loaded = tensors_of(AutoModel.from_pretrained(saved[name].folder, dtype=dtype))
    assert loaded.keys() == expected.keys()
    kept = 0
    for key, tensor in expected.items():
        is_kept = "quantizer." in key or key.startswith(("lm_head.", "codec_model."))
        kept += is_kept
        if tensor.is_floating_point() and not is_kept:
            tensor = tensor.to(dtype)
        assert loaded[key].dtype == tensor.dtype, key
        assert torch.equal(loaded[key], tensor), key
    assert kept > 5


@pytest.mark.parametrize("name", ["codec", "clap"])
def test_shards_and_subfolders(saved, name, tmp_path):
    """A model in several files, inside a folder that isn't the root."""
    saved[name].model.save_pretrained(tmp_path / "inner", max_shard_size="50KB")
    assert len(list((tmp_path / "inner").glob("*.safetensors"))) > 1
    loaded = tensors_of(AutoModel.from_pretrained(tmp_path, subfolder="inner"))
    for key, tensor in tensors_of(saved[name].model).items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("name", ["codec", "label"])
def test_pickles_are_not_loaded(saved, name, tmp_path):
    """A folder whose weights are a pickle counts as one without weights."""
    shutil.copy(saved[name].folder / "config.json", tmp_path)
    torch.save(saved[name].model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModel.from_pretrained(tmp_path)


# --- incomplete files ---


def load_without(saved: Saved, folder: Path, keys: list[str]) -> tuple[PreTrainedModel, set[str]]:
    """The model of a file that lacks tensors, and the names that the library calls missing."""
    shutil.copytree(saved.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in keys:
        del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    loaded = tensors_of(model)
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor), key
    return model, set(info["missing_keys"])


@pytest.mark.parametrize("name, prefix", [("codec", ""), ("label", "codec_model.")])
def test_codebook_sums_may_be_left_out(saved, name, prefix, tmp_path):
    """They are restored from the codebooks and the clusters' sizes, without a warning, so that training can go on."""
    model, missing = load_without(saved[name], tmp_path / "model", [f"{prefix}quantizer.codebook_sum"])
    assert not missing
    quantizer = model.get_submodule(f"{prefix}quantizer")
    assert quantizer.cluster_size.std() > 0
    torch.testing.assert_close(quantizer.codebook_sum / quantizer.cluster_size[..., None], quantizer.codebook)


def test_codebook_averages_start_from_the_codebook(saved, tmp_path):
    """Without sizes, each code counts once."""
    keys = ["quantizer.codebook_sum", "quantizer.cluster_size"]
    quantizer = load_without(saved["codec"], tmp_path / "model", keys)[0].quantizer
    assert torch.equal(quantizer.cluster_size, torch.ones_like(quantizer.cluster_size))
    assert torch.equal(quantizer.codebook_sum, quantizer.codebook)


def test_tensors_that_are_missing_are_initialised(saved, tmp_path):
    """They are named, and get what a new model gets, never whatever the memory held."""
    attention, modulation = "model.layers.1.self_attn", "model.layers.0.modulation"
    keys = [
        f"{attention}.qkv_proj.weight",
        f"{attention}.o_proj.weight",
        f"{attention}.q_bias",
        f"{attention}.log_scale",
        f"{modulation}.weight",
        f"{modulation}.bias",
        "model.embeddings.positions",
        "model.label_embeddings.weight",
        "model.uncond_embedding",
        "lm_head.weight",
        "codec_model.decoder.layers.0.conv.parametrizations.weight.original0",
        "codec_model.decoder.layers.0.conv.parametrizations.weight.original1",
        "codec_model.decoder.layers.0.conv.bias",
        "codec_model.encoder.layers.13.lstm.weight_hh_l0",
        "codec_model.quantizer.phi.1.weight",
    ]
    model, missing = load_without(saved["label"], tmp_path / "model", keys)
    assert missing == set(keys)
    tensors = tensors_of(model)
    std = math.sqrt(1 / (3 * 64))
    gains, others = tensors[f"{modulation}.weight"].split([2 * 64, 4 * 64])
    expected_std = {
        "qkv_proj": (tensors[f"{attention}.qkv_proj.weight"], std),
        "o_proj": (tensors[f"{attention}.o_proj.weight"], std / math.sqrt(2 * 2)),
        "gains": (gains, 1e-5 * std),
        "other modulation": (others, 0.5 * std),
        "positions": (tensors["model.embeddings.positions"], std),
        "labels": (tensors["model.label_embeddings.weight"], std),
        "unconditional": (tensors["model.uncond_embedding"], 1 / math.sqrt(32)),
        "head": (tensors["lm_head.weight"], 0.02 * std),
        "LSTM": (tensors["codec_model.encoder.layers.13.lstm.weight_hh_l0"], 1 / math.sqrt(3 * 32)),
        "φ": (tensors["codec_model.quantizer.phi.1.weight"], 1 / math.sqrt(3 * 12)),
    }
    for name, (tensor, expected) in expected_std.items():
        # three standard errors of an estimate of the standard deviation
        assert tensor.std().item() == pytest.approx(expected, rel=3 / math.sqrt(2 * tensor.numel())), name
    assert not tensors[f"{attention}.q_bias"].any() and not tensors[f"{modulation}.bias"].any()
    assert torch.equal(tensors[f"{attention}.log_scale"], torch.full((2,), math.log(4)))
    decoder = model.codec_model.decoder.layers[0].conv
    fan_in = math.prod(decoder.weight.shape[1:])
    direction = decoder.parametrizations.weight.original1
    assert 0 < direction.abs().max() <= 1 / math.sqrt(fan_in)
    # the magnitude is the direction's norm, so that the weight is PyTorch's usual one
    torch.testing.assert_close(decoder.weight, direction)
    assert 0 < decoder.bias.abs().max() <= 1 / math.sqrt(fan_in)


# --- putting a generator together ---


@pytest.fixture
def parts(saved, build_codec, clap_config, tmp_path) -> dict[str, str]:
    """Folders of the parts of a generator: another codec, a backbone, a complete generator, a CLAP."""
    build_codec(seed=5).save_pretrained(tmp_path / "codec")
    saved["clap"].model.model.save_pretrained(tmp_path / "backbone")
    torch.manual_seed(0)
    ClapModel(clap_config).save_pretrained(tmp_path / "clap")
    folders = {name: str(tmp_path / name) for name in ("codec", "backbone", "clap")}
    return folders | {"generator": str(saved["clap"].folder)}


@pytest.mark.parametrize("decoder", ["backbone", "generator"])
def test_generator_from_folders(saved, parts, decoder, tmp_path):
    """The codec and the conditioner are those given, the rest is the decoder's; and it saves and loads as one."""
    model = AarForConditionalGeneration.from_sub_models_pretrained(parts["clap"], parts["codec"], parts[decoder])
    assert not model.training
    origins = {
        "codec_model": SatModel.from_pretrained(parts["codec"]),
        "conditioner": ClapModel.from_pretrained(parts["clap"]),
        "model": saved["clap"].model.model,
    }
    if decoder == "generator":
        origins["lm_head"] = saved["clap"].model.lm_head
    for name, origin in origins.items():
        for key, tensor in origin.state_dict().items():
            assert torch.equal(model.get_submodule(name).state_dict()[key], tensor), f"{name}.{key}"
    assert model.lm_head.weight.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.conditioner.parameters())
    model.save_pretrained(tmp_path / "whole")
    loaded = AarForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(generate(loaded, saved["clap"].processor), generate(model, saved["clap"].processor))


def test_generator_from_a_configuration(parts):
    """A new backbone gets the size of the codec that it is given; keyword arguments go over the configuration."""
    config = AarConfig(conditioning="label", labels=LABELS, hidden_size=64, num_hidden_layers=3, num_attention_heads=2)
    model = AarForConditionalGeneration.from_sub_models_pretrained(None, parts["codec"], config, num_hidden_layers=1)
    assert len(model.model.layers) == 1
    assert model.config.codec_config.scales == [1, 2, 4, 6]
    assert model.codec_model.fingerprint() == SatModel.from_pretrained(parts["codec"]).fingerprint()
    assert model.generate(input_ids=torch.tensor([[0]])).shape == (1, 1, 1920)


@pytest.mark.parametrize("name, value", [("scales", [1, 3, 6]), ("codebook_dim", 6), ("codebook_size", 32)])
def test_codec_of_another_size_is_refused(parts, build_codec, name, value, tmp_path):
    build_codec(**{name: value}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"`{name}`.*give the codec that it was trained on"):
        AarForConditionalGeneration.from_sub_models_pretrained(None, tmp_path / "other", parts["backbone"])


def test_a_generator_is_no_codec(parts):
    """Its folder would be loaded as a codec of random weights."""
    with pytest.raises(ValueError, match="holds no complete codec.*codec_model.save_pretrained"):
        AarForConditionalGeneration.from_sub_models_pretrained(None, parts["generator"], parts["backbone"])


def test_what_is_no_field_is_refused(parts):
    with pytest.raises(ValueError, match="`dtype` is no field of a generator's configuration"):
        AarForConditionalGeneration.from_sub_models_pretrained(
            None, parts["codec"], parts["backbone"], dtype="bfloat16"
        )


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_of_a_generator_with_clap(saved, implementation):
    """The choice is the blocks'; CLAP has one implementation."""
    model = AarForConditionalGeneration.from_pretrained(saved["clap"].folder, attn_implementation=implementation)
    assert model.model.config._attn_implementation == implementation
    assert model.conditioner.config._attn_implementation == "eager"
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.model.config._attn_implementation == name
    expected, inputs = saved["clap"].model, saved["clap"].processor(["siren"])
    assert torch.equal(model.encode_conditioning(**inputs), expected.encode_conditioning(**inputs))


@pytest.mark.parametrize("name", ["codec", "clap"])
def test_only_the_main_process_writes(saved, name, tmp_path):
    saved[name].model.save_pretrained(tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_missing(parts):
    with pytest.raises(ValueError, match="needs `codec_pretrained_model_name_or_path` and"):
        AarForConditionalGeneration.from_sub_models_pretrained(parts["clap"], None, parts["backbone"])


@pytest.mark.parametrize("by", ["name", "path", "object"])
def test_attach_conditioner(saved, parts, build_generator, by):
    """Text is refused before, and gives the conditioner's embedding after."""
    model = build_generator(conditioning="clap")
    inputs = saved["clap"].processor(["siren", "a dog barks"])
    with pytest.raises(ValueError, match="attach_conditioner"):
        model.generate(**inputs)
    clap = ClapModel.from_pretrained(parts["clap"])
    model.attach_conditioner({"name": parts["clap"], "path": Path(parts["clap"]), "object": copy.deepcopy(clap)}[by])
    with torch.no_grad():
        expected = clap.get_text_features(**inputs).pooler_output
    assert torch.equal(model.encode_conditioning(**inputs), expected)
    assert model.config.conditioner_config.to_dict() == clap.config.to_dict()
    assert not model.conditioner.training


def test_conditioners_that_do_not_fit(parts, build_generator):
    with pytest.raises(ValueError, match="conditioned on `label` takes no CLAP"):
        build_generator(conditioning="label", labels=LABELS).attach_conditioner(parts["clap"])
    with pytest.raises(ValueError, match="have 32 dimensions but this model takes 16"):
        build_generator(conditioning="clap", conditioning_dim=16).attach_conditioner(parts["clap"])


def test_backbone_alone(saved, parts):
    """A backbone's folder loads as one, as does the backbone of a complete generator."""
    for folder in (parts["backbone"], parts["generator"]):
        model, info = AarModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(model.layers[1].mlp.fc1.weight, saved["clap"].model.model.layers[1].mlp.fc1.weight)


# --- importing ---


def test_import_stays_light():
    """Beyond what transformers itself imports, the package brings in none of its heavier dependencies."""
    heavy = (
        "datasets matplotlib scipy torchaudio soundfile typer tensorboard transformers_aar.hub transformers_aar.data"
    )
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor, PreTrainedModel; before = set(sys.modules); "
        f"import transformers_aar; print([name for name in {heavy.split()} if name in set(sys.modules) - before])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert process.stdout.strip() == "[]", process.stderr
