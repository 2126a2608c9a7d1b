"""AarProcessor: labels, free text and reference sounds in, waveforms out, and every variant's way to disk and back."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, ClapFeatureExtractor

from transformers_aar import AarProcessor, SatFeatureExtractor
from transformers_aar.hub.label_tokenizer import label_tokenizer

LABELS = ["Siren", "Dog", "Rain", "Church bell", "Bee, wasp, etc."]


@pytest.fixture
def label_processor() -> AarProcessor:
    return AarProcessor(SatFeatureExtractor(), label_tokenizer(LABELS), labels=LABELS)


@pytest.fixture
def plain_processor() -> AarProcessor:
    """Of a model without conditioning."""
    return AarProcessor(SatFeatureExtractor(), label_tokenizer())


@pytest.fixture
def clap_processor(build_clap_processor) -> AarProcessor:
    clap = build_clap_processor()
    return AarProcessor(SatFeatureExtractor(), clap.tokenizer, clap.feature_extractor)


@pytest.fixture
def processors(label_processor, plain_processor, clap_processor) -> dict[str, AarProcessor]:
    text_only = AarProcessor(SatFeatureExtractor(), clap_processor.tokenizer)
    return {"label": label_processor, "plain": plain_processor, "clap": clap_processor, "text only": text_only}


# --- labels ---


@pytest.mark.parametrize(
    "text, ids",
    [
        ("Dog", [1]),
        ("dog", [1]),
        ("CHURCH BELL", [3]),
        ("  Rain ", [2]),
        ("Dog; Rain", [1, 2]),
        ("rain;church bell ;Siren", [2, 3, 0]),
        ("; Dog ;; ", [1]),
    ],
)
def test_label_ids(label_processor, text, ids):
    """Ids are the labels' indices; case and spaces don't matter, semicolons separate."""
    inputs = label_processor(text)
    assert inputs["input_ids"].tolist() == [ids]
    assert inputs["attention_mask"].tolist() == [[1] * len(ids)]


def test_batch_of_labels(label_processor):
    """Sounds with fewer labels are padded, and the mask says where."""
    inputs = label_processor(["Dog; Rain", "Siren"])
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert inputs["input_ids"][0].tolist() == [1, 2]
    assert inputs["input_ids"][1, 0] == 0
    assert inputs["input_ids"][1, 1] >= len(LABELS)


def test_labels_are_averaged_by_the_model(label_processor, build_generator):
    """The padding of a batch has no weight in the mean, and the order of the labels none either."""
    model = build_generator(conditioning="label", labels=LABELS)
    table = model.model.label_embeddings.weight
    with torch.no_grad():
        embeds = model.encode_conditioning(**label_processor(["Dog; Rain", "Siren", "rain; dog"]))
    torch.testing.assert_close(embeds[0], (table[1] + table[2]) / 2)
    torch.testing.assert_close(embeds[1], table[0])
    torch.testing.assert_close(embeds[2], embeds[0])


@pytest.mark.parametrize(
    "text, nearest",
    [("sirene", "Siren"), ("Dogs", "Dog"), ("Dog; bell", "Church bell"), ("a wasp in a garden", "Bee, wasp, etc.")],
)
def test_unknown_label_names_the_nearest(label_processor, text, nearest):
    with pytest.raises(ValueError, match="doesn't know the label") as caught:
        label_processor(text)
    wrong = text.split("; ")[-1]
    assert repr(wrong) in str(caught.value)
    assert f"the nearest it knows are {nearest!r}; " in str(caught.value)
    assert "transformers-aar info" in str(caught.value)


@pytest.mark.parametrize("text", ["", " ; ", ["Dog", ""]])
def test_empty_prompt_lists_the_labels(label_processor, text):
    with pytest.raises(ValueError, match="Siren; Dog; Rain; Church bell; Bee, wasp, etc."):
        label_processor(text)


@pytest.mark.parametrize("name", ["label", "plain", "clap"])
def test_no_prompts(processors, name):
    with pytest.raises(ValueError, match="`text` is an empty list"):
        processors[name]([])


def test_text_without_conditioning(plain_processor, build_generator):
    """A model without conditioning takes any text, and counts the prompts."""
    inputs = plain_processor(["anything at all", "and more"])
    sounds = build_generator(conditioning="none").generate(**inputs)
    assert len(sounds) == 2


# --- CLAP ---


def test_free_text(clap_processor, build_clap_processor):
    """Text becomes what CLAP's own processor makes of it."""
    texts = ["a dog barks", "rain"]
    inputs = clap_processor(texts)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    expected = build_clap_processor()(text=texts, return_tensors="pt", padding=True)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert inputs["attention_mask"].sum(-1).unique().numel() == 2


def test_long_text_is_truncated(clap_processor):
    clap_processor.tokenizer.model_max_length = 10
    assert clap_processor("a dog barks at the rain")["input_ids"].shape == (1, 10)


def test_reference_sound(clap_processor, build_clap_processor, build_generator, clap_config):
    """A sound at CLAP's rate becomes what CLAP's own processor makes of it, and conditions a model."""
    sounds = [np.sin(np.arange(48_000) * 0.05).astype(np.float32), np.zeros(20_000, np.float32)]
    inputs = clap_processor(audio=sounds, sampling_rate=48_000)
    assert inputs.keys() == {"input_features", "is_longer"}
    expected = build_clap_processor()(audio=sounds, sampling_rate=48_000, return_tensors="pt")
    assert torch.equal(inputs["input_features"], expected["input_features"])
    model = build_generator(conditioning="clap", conditioner_config=clap_config)
    assert model.generate(**inputs).shape == (2, 1, 1920)
    with torch.no_grad():
        expected = model.conditioner.get_audio_features(**inputs).pooler_output
    assert torch.equal(model.encode_conditioning(**inputs), expected)


def test_text_and_sound_give_different_sounds(clap_processor, build_generator, clap_config):
    model = build_generator(conditioning="clap", conditioner_config=clap_config)
    by_text = model.encode_conditioning(**clap_processor("a dog barks"))
    sound = np.sin(np.arange(48_000) * 0.05)
    by_sound = model.encode_conditioning(**clap_processor(audio=sound, sampling_rate=48_000))
    assert by_text.shape == by_sound.shape == (1, 32)
    assert not torch.allclose(by_text, by_sound)


@pytest.mark.parametrize("shape", [(48_000,), (1, 48_000)])
def test_reference_sound_as_a_tensor(clap_processor, shape):
    sound = torch.sin(torch.arange(48_000) * 0.05)
    expected = clap_processor(audio=sound.numpy(), sampling_rate=48_000)["input_features"]
    given = clap_processor(audio=sound.view(shape), sampling_rate=48_000)["input_features"]
    assert torch.equal(given, expected)
    assert torch.equal(clap_processor(audio=[sound.view(shape)], sampling_rate=48_000)["input_features"], expected)


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros((2, 1000)), r"shape \(2, 1000\).*mix it down"),
        ([], "no sound"),
        (np.zeros(0), "is empty"),
        (np.full(1000, np.nan), "NaN"),
        (np.zeros(1000, np.int16), "whole numbers"),
    ],
)
def test_bad_reference_sounds_are_refused(clap_processor, audio, message):
    with pytest.raises(ValueError, match=message):
        clap_processor(audio=audio, sampling_rate=48_000)


@pytest.mark.parametrize("rate", [24_000, 44_100, None])
def test_reference_sound_of_another_rate(clap_processor, rate):
    with pytest.raises(ValueError, match=f"48000 Hz, got {rate}; resample them"):
        clap_processor(audio=np.zeros(1000), sampling_rate=rate)


@pytest.mark.parametrize("name", ["label", "plain", "text only"])
def test_reference_sound_without_clap(processors, name):
    with pytest.raises(ValueError, match="Only a model that is conditioned on CLAP"):
        processors[name](audio=np.zeros(1000), sampling_rate=48_000)


@pytest.mark.parametrize("name", ["label", "plain", "clap"])
def test_exactly_one_of_text_and_audio(processors, name):
    for arguments in ({}, {"text": "Dog", "audio": np.zeros(1000), "sampling_rate": 48_000}):
        with pytest.raises(ValueError, match="exactly one of `text` and `audio`"):
            processors[name](**arguments)


# --- waveforms ---


def test_batch_decode(plain_processor):
    """Arrays in fp32, cut to their lengths where a mask tells them."""
    audio = torch.randn(2, 1, 10, dtype=torch.bfloat16, requires_grad=True)
    sounds = plain_processor.batch_decode(audio)
    assert [sound.shape for sound in sounds] == [(1, 10), (1, 10)]
    assert all(sound.dtype == np.float32 for sound in sounds)
    np.testing.assert_array_equal(sounds[1], audio[1].detach().float().numpy())
    mask = torch.tensor([[1] * 10, [1] * 4 + [0] * 6])
    sounds = plain_processor.batch_decode(audio, padding_mask=mask)
    assert [sound.shape for sound in sounds] == [(1, 10), (1, 4)]
    np.testing.assert_array_equal(sounds[1], audio[1, :, :4].detach().float().numpy())


# --- to disk and back ---


@pytest.mark.parametrize("name", ["label", "plain", "clap", "text only"])
def test_round_trip(processors, name, tmp_path):
    """Every part comes back as what it was, not as a dictionary, and gives the same inputs."""
    processor = processors[name]
    processor.save_pretrained(tmp_path)
    for loaded in (AarProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is AarProcessor
        assert type(loaded.feature_extractor) is SatFeatureExtractor
        assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
        assert type(loaded.tokenizer) is type(processor.tokenizer)
        assert loaded.labels == processor.labels
        for texts in ("siren", ["dog", "rain; siren"]):
            expected = processor(texts)
            assert torch.equal(loaded(texts)["input_ids"], expected["input_ids"])
            assert torch.equal(loaded(texts)["attention_mask"], expected["attention_mask"])
        if name == "clap":
            assert type(loaded.conditioner_feature_extractor) is ClapFeatureExtractor
            sound = np.sin(np.arange(30_000) * 0.05)
            expected = processor(audio=sound, sampling_rate=48_000)["input_features"]
            assert torch.equal(loaded(audio=sound, sampling_rate=48_000)["input_features"], expected)
        else:
            assert loaded.conditioner_feature_extractor is None


@pytest.mark.parametrize("name", ["label", "plain", "clap", "text only"])
def test_saving_again_gives_identical_files(processors, name, tmp_path):
    processors[name].save_pretrained(tmp_path / "first")
    AarProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "processing_aar.py"} <= first.keys()


def test_folder_names_each_class_once(clap_processor, tmp_path):
    """The processor's class is noted for the processor, the extractor's for the extractor."""
    clap_processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_aar.AarProcessor"}
    assert config["feature_extractor"]["auto_map"] == {
        "AutoFeatureExtractor": "feature_extraction_sat.SatFeatureExtractor"
    }
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is SatFeatureExtractor
