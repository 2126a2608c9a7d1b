"""The metrics as `evaluate` loads them, against the functions that they are."""

import pytest
import torch

from transformers_aar import SatConfig
from transformers_aar.evaluation import classification, reconstruction
from transformers_aar.evaluation.codebook_usage import CodebookUsage
from transformers_aar.evaluation.embeddings import LogMelEmbedding
from transformers_aar.evaluation.frechet import FrechetStatistics, frechet_distance

pytest.importorskip("evaluate")
from transformers_aar.evaluation.metrics import load_metric  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)


@pytest.mark.filterwarnings("ignore:A set has")
def test_frechet_audio_distance(sounds):
    embedding = LogMelEmbedding()
    generated, real = FrechetStatistics(embedding.info), FrechetStatistics(embedding.info)
    generated.update(embedding(sounds(12, 4800)))
    real.update(embedding(sounds(15, 4800, seed=1)))
    metric = load_metric("frechet_audio_distance")
    for batch in sounds(12, 4800).split(5):
        metric.add_batch(predictions=batch)
    result = metric.compute(statistics=real, embedding=embedding)
    assert result.pop("frechet_audio_distance") == pytest.approx(frechet_distance(generated, real))
    assert result == {"num_sounds": 12, "embedding": "log_mel", "embedding_version": "1"}


def test_kl_divergence_and_inception_score(ast, sounds):
    predictions, references = sounds(6, 4800), sounds(6, 4800, seed=1)
    logits, reference_logits = ast.classify(ast(predictions)), ast.classify(ast(references))
    pairs = load_metric("kl_divergence")
    result = pairs.compute(predictions=predictions, references=references, classifier=ast)
    expected = float(classification.kl_divergence(logits, reference_logits).mean())
    assert result["kl_divergence"] == pytest.approx(expected, rel=1e-4)
    assert (result["classifier"], result["classifier_version"]) == ("ast", ast.info.version)
    result = load_metric("inception_score").compute(predictions=predictions, classifier=ast, num_splits=2)
    scores = classification.inception_score(logits, 2)
    assert result["inception_score"] == pytest.approx(float(scores.mean()), rel=1e-6)
    assert result["inception_score_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-2)


def test_clap_score(clap, sounds):
    predictions, texts = sounds(3, 12_000), ["dog", "siren", "rain"]
    result = load_metric("clap_score").compute(predictions=predictions, references=texts, embedding=clap)
    expected = float(classification.clap_score(clap(predictions), clap.embed_texts(texts)).mean())
    assert result["clap_score"] == pytest.approx(expected, abs=1e-5)
    assert result["embedding_version"] == clap.info.version


def test_reconstruction_distance_of_sounds_of_several_lengths(sounds):
    pairs = [(sounds(1, length), sounds(1, length, seed=1)) for length in (4800, 7200)]
    predictions, references = ([sound[0].tolist() for sound in side] for side in zip(*pairs))
    metric = load_metric("reconstruction_distance")
    result = metric.compute(predictions=predictions, references=references, sampling_rate=24_000)
    expected = {
        "mel_distance": sum(float(reconstruction.mel_distance(*pair, 24_000)) for pair in pairs) / 2,
        "multi_resolution_stft_distance": sum(
            float(reconstruction.multi_resolution_stft_distance(*pair)) for pair in pairs
        )
        / 2,
        "si_sdr": sum(float(reconstruction.si_sdr(*pair)) for pair in pairs) / 2,
    }
    assert result == pytest.approx(expected, rel=1e-5)


def test_codec_usage():
    config = SatConfig(codebook_size=16)
    codes = torch.randint(16, (3, config.tokens_per_window), generator=torch.Generator().manual_seed(0))
    usage = CodebookUsage(config.scales, 16)
    usage.update(codes)
    result = load_metric("codec_usage").compute(predictions=codes, config=config)
    assert result == {
        "used": usage.used.tolist(),
        "perplexity": usage.perplexity.tolist(),
        "tokens_per_second": 455.0,
        "bandwidth_kbps": config.bandwidth,
    }


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="no metric 'fad'; there are clap_score, codec_usage, frechet_audio_distance"):
        load_metric("fad")
