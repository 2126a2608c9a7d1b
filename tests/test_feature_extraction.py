"""SatFeatureExtractor: shapes, padding, and the sentences that bad audio gets."""

import numpy as np
import pytest
import torch

from transformers_aar import AarProcessor, SatFeatureExtractor
from transformers_aar.hub.label_tokenizer import label_tokenizer


@pytest.fixture
def extract():
    """Calls an extractor for mono audio at 24 kHz."""

    def call(raw_audio, **kwargs):
        return SatFeatureExtractor()(raw_audio, **{"sampling_rate": 24_000, "return_tensors": "pt"} | kwargs)

    return call


RAMP = np.linspace(-1, 1, 7, dtype=np.float32)
ONE_SOUND = {
    "array": RAMP,
    "array with channel": RAMP[None],
    "doubles": RAMP.astype(np.float64),
    "list": RAMP.tolist(),
    "tensor": torch.from_numpy(RAMP),
    "tensor with channel": torch.from_numpy(RAMP)[None],
    "batch of one": [RAMP],
    "tensor of a batch": torch.from_numpy(RAMP)[None, None],
    "list of a list": [RAMP.tolist()],
    "nested with channel": [[RAMP.tolist()]],
}


@pytest.mark.parametrize("form", ONE_SOUND)
def test_one_sound(extract, form):
    """In whatever form it comes, it is fp32 of shape (1, 1, samples), with a mask of ones."""
    features = extract(ONE_SOUND[form])
    assert features.keys() == {"input_values", "padding_mask"}
    assert features["input_values"].dtype == torch.float32
    assert torch.equal(features["input_values"], torch.from_numpy(RAMP)[None, None])
    assert torch.equal(features["padding_mask"], torch.ones(1, 7, dtype=torch.long))


def test_tensors_by_default():
    features = SatFeatureExtractor()([RAMP, RAMP[:2]], sampling_rate=24_000)
    assert features["input_values"].shape == (2, 1, 7) and features["padding_mask"].shape == (2, 7)
    assert all(isinstance(values, torch.Tensor) for values in features.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_of_a_model(extract, dtype):
    """What a model returns goes straight in, gradient and all."""
    sound = torch.from_numpy(RAMP).to(dtype).requires_grad_()
    assert torch.equal(extract(sound)["input_values"][0, 0], sound.detach().float())


def test_padding(extract):
    """Shorter sounds are padded at their ends with zeros, which the mask marks."""
    features = extract([RAMP[:3], torch.from_numpy(RAMP), RAMP[None, :1]])
    assert features["input_values"].shape == (3, 1, 7)
    assert features["padding_mask"].sum(-1).tolist() == [3, 7, 1]
    for index, length in enumerate((3, 7, 1)):
        assert features["padding_mask"][index].tolist() == [1] * length + [0] * (7 - length)
        assert torch.equal(features["input_values"][index, 0, :length], torch.from_numpy(RAMP[:length]))
        assert not features["input_values"][index, 0, length:].any()


def test_without_padding(extract):
    """Each sound keeps its length."""
    features = extract([RAMP[:3], RAMP], padding=False, return_tensors=None)
    assert [values.shape for values in features["input_values"]] == [(1, 3), (1, 7)]
    assert [mask.tolist() for mask in features["padding_mask"]] == [[1] * 3, [1] * 7]
    assert extract([RAMP, RAMP], padding=False)["input_values"].shape == (2, 1, 7)


def test_numpy(extract):
    features = extract([RAMP, RAMP[:2]], return_tensors="np")
    assert features["input_values"].dtype == np.float32 and features["input_values"].shape == (2, 1, 7)
    assert features["padding_mask"].dtype == np.int64 and features["padding_mask"].shape == (2, 7)


def test_stereo_codec():
    """A codec of two channels takes two."""
    extractor = SatFeatureExtractor(feature_size=2, sampling_rate=16_000)
    sound = np.stack([RAMP, -RAMP])
    features = extractor([sound, sound[:, :4]], sampling_rate=16_000, return_tensors="pt")
    assert features["input_values"].shape == (2, 2, 7)
    assert torch.equal(features["input_values"][0], torch.from_numpy(sound))
    assert features["padding_mask"].shape == (2, 7)
    with pytest.raises(ValueError, match=r"2 channel\(s\) are expected"):
        extractor(RAMP, sampling_rate=16_000)


BAD = {
    "no rate": (RAMP, {"sampling_rate": None}, "Pass `sampling_rate`.*24000 Hz"),
    "wrong rate": (RAMP, {"sampling_rate": 44_100}, r"44100 Hz.*24000 Hz; resample it.*\(audio\), 44100, 24000\)"),
    "stereo": (np.stack([RAMP, RAMP]), {}, r"Sound 0 has the shape \(2, 7\).*mix it down"),
    "stereo in a batch": ([RAMP, np.stack([RAMP, RAMP])], {}, "Sound 1 .*mix it down"),
    "samples first": (RAMP[:, None], {}, r"shape \(7, 1\)"),
    "channels last": (np.zeros((48_000, 2)), {}, r"shape \(48000, 2\), with its channels last.*audio.mean\(1\)"),
    "empty": (np.zeros(0), {}, "Sound 0 is empty"),
    "empty in a batch": ([RAMP, np.zeros(0)], {}, "Sound 1 is empty"),
    "empty list": ([], {}, "There is no sound"),
    "NaN": (np.array([0.0, np.nan]), {}, "Sound 0 holds NaN or infinite"),
    "infinite": ([RAMP, torch.tensor([0.0, -torch.inf])], {}, "Sound 1 holds NaN or infinite"),
    "a number": (0.5, {}, "Sound 0 is no array of numbers"),
    "a tensor of no dimension": (torch.tensor(0.5), {}, "Sound 0 is no array of numbers"),
    "numbers and nothing": ([0.5, None], {}, "Sound 0 is no array of numbers"),
    "complex": (np.zeros(3, dtype=complex), {}, "Sound 0 is no array of numbers"),
    "a dictionary": ({"array": RAMP}, {}, "Sound 0 is no array of numbers"),
    "16 bit": (np.array([0, 20_000], dtype=np.int16), {}, r"Sound 0 holds whole numbers \(int16\).*audio / 32768"),
    "16 bit, quiet": ([RAMP, torch.tensor([0, 1], dtype=torch.int16)], {}, "Sound 1 holds whole numbers"),
    "list of whole numbers": ([0, 1, -1], {}, "Sound 0 holds whole numbers"),
    "ragged without padding": ([RAMP, RAMP[:3]], {"padding": False}, "differ in length; pass `padding=True`"),
    "text": ("dog.wav", {}, "Sound 0 is no array of numbers"),
    "ragged": ([[[0.0, 1.0], [0.0]]], {}, "Sound 0 is no array of numbers"),
    "nothing": (None, {}, "Sound 0 is no array of numbers"),
    "a list of nothing": ([None], {}, "Sound 0 is no array of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_audio_gets_one_sentence(extract, name):
    """Which sound is wrong, in what, and what to do."""
    raw_audio, arguments, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        extract(raw_audio, **arguments)
    assert "\n" not in str(caught.value)


def test_round_trip(tmp_path):
    extractor = SatFeatureExtractor(feature_size=2, sampling_rate=16_000, padding_value=-1.0)
    extractor.save_pretrained(tmp_path / "first")
    loaded = SatFeatureExtractor.from_pretrained(tmp_path / "first")
    assert loaded.to_dict() == extractor.to_dict()
    loaded.save_pretrained(tmp_path / "second")
    for file in ("preprocessor_config.json", "feature_extraction_sat.py"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_processor_leaves_no_trace(tmp_path):
    """An extractor that was saved inside a processor is saved in a codec's folder as one that never was."""
    extractor = SatFeatureExtractor()
    extractor.save_pretrained(tmp_path / "before")
    processor = AarProcessor(extractor, label_tokenizer())
    processor.save_pretrained(tmp_path / "processor")
    extractor.save_pretrained(tmp_path / "after")
    AarProcessor.from_pretrained(tmp_path / "processor").feature_extractor.save_pretrained(tmp_path / "loaded")
    configs = [tmp_path / name / "preprocessor_config.json" for name in ("before", "after", "loaded")]
    assert configs[0].read_text() == configs[1].read_text() == configs[2].read_text()
    assert '"AutoFeatureExtractor"' in configs[0].read_text()
    assert "AutoProcessor" not in configs[0].read_text()
