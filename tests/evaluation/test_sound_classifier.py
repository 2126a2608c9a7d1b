"""The classifier of single events: it learns, comes back from disk as it was, and hears no levels."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from transformers_aar.evaluation.sound_classifier import SAMPLING_RATE, SoundClassifier, distort

LABELS = ["Hum", "Whistle", "Hiss"]


def toy_sounds(count: int, seed: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Low tones, high tones and noise of half a second, each with a pitch and a level of its own, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(LABELS)
    times = torch.arange(SAMPLING_RATE // 2) / SAMPLING_RATE
    pitch = (1 + torch.rand(count, generator=generator)) * torch.tensor([150.0, 2000.0, 0.0])[labels]
    tones = torch.sin(2 * torch.pi * pitch[:, None] * times)
    noise = torch.randn(count, len(times), generator=generator)
    sounds = torch.where(labels[:, None] == 2, noise, tones + 0.05 * noise)
    return sounds * (0.01 + torch.rand(count, 1, generator=generator)), labels


@pytest.fixture(scope="module")
def classifier() -> SoundClassifier:
    """Trained for some steps."""
    torch.manual_seed(0)
    classifier = SoundClassifier.new(LABELS).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for step in range(25):
        waveforms, labels = toy_sounds(12, seed=step)
        classifier(waveforms, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier.eval()


def test_it_learns_to_tell_sounds_apart(classifier):
    waveforms, labels = toy_sounds(60, seed=1000)
    assert (classifier.predict(waveforms) == labels).float().mean() >= 0.95
    assert classifier.labels == LABELS


def test_it_hears_no_levels(classifier):
    waveforms, _ = toy_sounds(6, seed=1001)
    torch.testing.assert_close(
        classifier(waveforms)["logits"], classifier(0.1 * waveforms)["logits"], atol=1e-2, rtol=0
    )


def test_a_batch_gives_what_its_sounds_give(classifier):
    waveforms, _ = toy_sounds(4, seed=1002)
    alone = torch.cat([classifier(waveform[None])["logits"] for waveform in waveforms])
    torch.testing.assert_close(classifier(waveforms)["logits"], alone, atol=1e-4, rtol=1e-4)


def test_silence_is_finite(classifier):
    assert classifier(torch.zeros(1, SAMPLING_RATE))["logits"].isfinite().all()


def test_saved_and_loaded_it_is_the_same(classifier, tmp_path):
    classifier.save(tmp_path)
    loaded = SoundClassifier.load(tmp_path)
    waveforms, _ = toy_sounds(9, seed=1003)
    assert not loaded.training and loaded.labels == LABELS
    assert torch.equal(loaded(waveforms)["logits"], classifier(waveforms)["logits"])
    assert torch.equal(loaded.features(waveforms), classifier.features(waveforms))


def test_features_are_what_the_last_layer_decides_by(classifier):
    waveforms, _ = toy_sounds(3, seed=1004)
    features = classifier.features(waveforms)
    assert features.shape == (3, classifier.num_features)
    logits = classifier.network.classifier(features[:, :, None, None])
    torch.testing.assert_close(logits, classifier(waveforms)["logits"])


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no classifier of sounds: name one of train_classifier.py's"):
        SoundClassifier.load(tmp_path)
    with pytest.raises(ValueError, match="holds no classifier of sounds"):
        SoundClassifier.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no classifier of sounds"):
        SoundClassifier.load(tmp_path)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "pictures")
    with pytest.raises(ValueError, match="holds a classifier of pictures"):
        SoundClassifier.load(tmp_path / "pictures")


def test_distortions_keep_the_shape_and_differ_by_sound():
    torch.manual_seed(0)
    power = torch.rand(8, 64, 20)
    distorted = distort(power)
    assert distorted.shape == power.shape and distorted.isfinite().all() and (distorted > 0).all()
    gains = (distorted / power).log().mean(-1)  # a band's, of each sound
    assert gains.std(0).min() > 0
    # tilts are of up to 6 dB, but half of the sounds lose up to 30 dB from a band on
    assert gains.exp().log10().mul(10).min() < -6 < gains.exp().log10().mul(10).max()


def test_it_distorts_in_training_only(classifier):
    waveforms, _ = toy_sounds(4, seed=1005)
    assert torch.equal(classifier._pictures(waveforms), classifier._pictures(waveforms))
    classifier.train()
    try:
        pictures = [classifier._pictures(waveforms) for _ in range(2)]
    finally:
        classifier.eval()
    assert pictures[0].shape == classifier._pictures(waveforms).shape
    assert not torch.equal(*pictures)
