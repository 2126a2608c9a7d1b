"""Embeddings, against the networks' own forward pass and a log-mel spectrogram computed by NumPy."""

import copy

import numpy as np
import pytest
import torch

from transformers_aar.evaluation.embeddings import (
    AstEmbedding,
    ClapEmbedding,
    ClassifierEmbedding,
    LogMelEmbedding,
    embed_sounds,
    load_embedding,
)
from transformers_aar.evaluation.sound_classifier import SoundClassifier


def test_log_mel_statistics_as_defined(sounds):
    waveforms = sounds(2, 6000)
    embedding = LogMelEmbedding()
    frames = np.lib.stride_tricks.sliding_window_view(waveforms.double().numpy(), 1024, axis=1)[:, ::256]
    power = np.abs(np.fft.rfft(frames * np.hanning(1025)[:-1])) ** 2
    # 64 triangles between 66 points equally spaced in mel
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 12_000 / 700), 66) / 2595) - 1)
    bins = np.linspace(0, 12_000, 513)[:, None]
    rising = (bins - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - bins) / np.diff(corners)[1:]
    log_mel = np.log(np.maximum(power @ np.maximum(0, np.minimum(rising, falling)), 1e-5))
    expected = np.concatenate([log_mel.mean(1), log_mel.std(1)], axis=1)
    np.testing.assert_allclose(embedding(waveforms), expected, atol=1e-3)
    assert (embedding.info.name, embedding.info.version, embedding.info.width) == ("log_mel", "1", 128)


def test_clap_embeds_sounds_and_texts_into_one_space(clap, sounds):
    waveforms = sounds(3, 24_000)
    processor, model = clap.processor, clap.model
    inputs = processor(audio=list(waveforms.numpy()), sampling_rate=48_000, return_tensors="pt")
    inputs |= processor.tokenizer(["dog", "rain on a roof", "siren"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    torch.testing.assert_close(clap(waveforms), output.audio_embeds)
    torch.testing.assert_close(clap.embed_texts(["dog", "rain on a roof", "siren"]), output.text_embeds)
    assert clap.info.width == output.audio_embeds.shape[1] == 32
    assert clap.info.sampling_rate == 48_000


def test_clap_hears_the_beginning_of_a_long_sound_each_time(clap, sounds):
    waveforms = sounds(2, 60_000)
    embeddings = clap(waveforms)
    torch.testing.assert_close(clap(waveforms), embeddings, rtol=0, atol=0)
    torch.testing.assert_close(embeddings, clap(waveforms[:, :48_000]))


def test_a_fusing_clap_draws_nothing_at_random(clap_config, build_clap_processor, sounds):
    from transformers import ClapModel

    config = copy.deepcopy(clap_config)
    config.audio_config.enable_fusion = True
    torch.manual_seed(0)
    model = ClapModel(config)
    processor = build_clap_processor()
    processor.feature_extractor.truncation = "fusion"
    embedding = ClapEmbedding(model, processor)
    waveforms = sounds(4, 24_000)
    together = embedding(waveforms)
    assert together.isfinite().all()
    torch.testing.assert_close(together, torch.cat([embedding(waveform[None]) for waveform in waveforms]))


def test_ast_embeds_and_classifies_as_the_model_does(ast, sounds):
    waveforms = sounds(3, 8000)
    inputs = ast.feature_extractor(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        output = ast.model(**inputs, output_hidden_states=True)
    embeddings = ast(waveforms)
    assert embeddings.shape == (3, ast.info.width)
    torch.testing.assert_close(ast.classify(embeddings), output.logits)
    assert embeddings.std(0).min() > 0


def test_versions_tell_networks_apart(ast):
    same = AstEmbedding(copy.deepcopy(ast.model), copy.deepcopy(ast.feature_extractor))
    assert same.info == ast.info
    other_weights = copy.deepcopy(ast.model)
    with torch.no_grad():
        other_weights.classifier.dense.bias[0] += 1e-6
    other_settings = copy.deepcopy(ast.feature_extractor)
    other_settings.mean = 0.0
    changed = [AstEmbedding(other_weights, ast.feature_extractor), AstEmbedding(ast.model, other_settings)]
    assert len({ast.info, *(embedding.info for embedding in changed)}) == 3


def test_loading_from_a_folder(clap, ast, sounds, tmp_path):
    for name, embedding, parts in (
        ("clap", clap, (clap.model, clap.processor)),
        ("ast", ast, (ast.model, ast.feature_extractor)),
    ):
        for part in parts:
            part.save_pretrained(tmp_path / name)
        loaded = load_embedding(name, str(tmp_path / name))
        waveforms = sounds(2, 12_000)
        torch.testing.assert_close(loaded(waveforms), embedding(waveforms))
        again = load_embedding(name, str(tmp_path / name))
        assert again.info == loaded.info
    assert load_embedding("log_mel").info == LogMelEmbedding.info
    with pytest.raises(ValueError, match="take clap, ast or log_mel"):
        load_embedding("vggish")
    with pytest.raises(ValueError, match="take clap, ast or log_mel"):
        load_embedding("log_mel", str(tmp_path))


def test_batches_of_equal_lengths_keep_the_order(sounds):
    embedding = LogMelEmbedding()
    waveforms = [*sounds(5, 3000), *sounds(2, 4000, seed=1), *sounds(1, 3000, seed=2)]
    batches = list(embed_sounds(embedding, iter(waveforms), batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 1]
    torch.testing.assert_close(torch.cat(batches), torch.cat([embedding(waveform[None]) for waveform in waveforms]))


def test_too_short_sounds_are_refused(clap, ast):
    for embedding in (clap, ast, LogMelEmbedding()):
        with pytest.raises(ValueError, match=f"{embedding.info.name} takes waveforms .* at least 0.1 s"):
            embedding(torch.ones(1, embedding.info.sampling_rate // 10 - 1))
        with pytest.raises(ValueError, match="takes waveforms of shape"):
            embedding(torch.ones(1, 1, 48_000))


def test_a_classifiers_features(sounds, tmp_path):
    """They come from a folder only, and another classifier has another version."""
    torch.manual_seed(0)
    classifier, other = SoundClassifier.new(["Dog", "Rain"]), SoundClassifier.new(["Dog", "Rain"])
    classifier.save(tmp_path)
    embedding = load_embedding("classifier", str(tmp_path))
    waveforms = sounds(3, 24_000)
    embeddings = embedding(waveforms)
    assert (embedding.info.name, embedding.info.width, embedding.info.sampling_rate) == ("classifier", 256, 24_000)
    assert embeddings.shape == (3, 256) and embeddings.dtype == torch.float32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, classifier.eval().features(waveforms))
    torch.testing.assert_close(embeddings[:1], embedding(waveforms[:1]))
    assert ClassifierEmbedding(classifier).info == embedding.info != ClassifierEmbedding(other).info
    with pytest.raises(ValueError, match="classifier takes waveforms .* at least 0.1 s"):
        embedding(torch.ones(1, 2000))
    with pytest.raises(ValueError, match="or classifier=FOLDER"):
        load_embedding("classifier")
    with pytest.raises(ValueError, match="holds no classifier of sounds"):
        load_embedding("classifier", str(tmp_path / "nowhere"))
