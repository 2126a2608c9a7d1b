"""Model cards: metadata that the Hub accepts, examples that run, and cards that people have edited."""

import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard, ModelCardData

from transformers_aar import AarConfig, SatConfig, SatFeatureExtractor, SatModel
from transformers_aar.hub.model_cards import render_model_card, write_model_card

SMALL_SAT = {"num_filters": 2, "hidden_size": 16, "codebook_dim": 8, "codebook_size": 32, "num_lstm_layers": 1}


def small_configs() -> dict:
    codec = SatConfig(**SMALL_SAT)
    sizes = {"codec_config": codec, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {
        "sat": codec,
        "label": AarConfig(conditioning="label", labels=["Dog", 'Bird\'s "song"'], **sizes),
        "clap": AarConfig(conditioning="clap", **sizes),
        "none": AarConfig(conditioning="none", **sizes),
    }


@pytest.mark.parametrize("name", ["sat", "label", "clap", "none"])
def test_card_is_complete(name):
    """Metadata parses into what the Hub knows, every part is there, and no field of the template is left."""
    config = small_configs()[name]
    text = render_model_card(config, evaluation={"mel distance": 0.5}, training_data="Barks.", tags=["barks"])
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == ("audio-to-audio" if name == "sat" else "text-to-audio")
    assert card.data.license == "apache-2.0"
    assert {"transformers-aar", "next-scale", "barks"} <= set(card.data.tags)
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["Usage", "Training data", "Evaluation", "Limits", "Citation"]
    assert "| mel distance | 0.5 |" in text and "Barks." in text
    assert str(getattr(config, "codec_config", config).tokens_per_window) in text
    assert not re.search(r"{{|{%|None|\n\n\n", text)
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(example, "example", "exec")


def test_card_names_labels():
    """A label model's card lists its labels and calls the first one."""
    text = render_model_card(small_configs()["label"])
    assert 'It knows these labels: Dog; Bird\'s "song".' in text
    assert 'generate("Dog")' in text


def test_edited_card_stays(tmp_path):
    """Only a card that nobody wrote is replaced, and no unfinished file stays behind."""
    model = SatModel(SatConfig(**SMALL_SAT))
    write_model_card(model, tmp_path, training_data="Barks.")
    card = tmp_path / "README.md"
    assert "Barks." in card.read_text()
    card.write_text("my own words")
    write_model_card(model, tmp_path)
    assert card.read_text() == "my own words"
    stock = ModelCard.from_template(
        ModelCardData(tags=["mine"], library_name="transformers"),
        model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub.",
    )
    stock.save(card)
    write_model_card(model, tmp_path)
    assert "scale-level audio tokenizer" in card.read_text()
    assert "mine" in ModelCard.load(card).data.tags
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_saving_writes_the_card_and_its_example_runs(tmp_path):
    """`save_pretrained` fills in the card, whose example works on the folder as it is."""
    config = SatConfig(**SMALL_SAT)
    SatModel(config).save_pretrained(tmp_path / "sat")
    SatFeatureExtractor().save_pretrained(tmp_path / "sat")
    soundfile.write(tmp_path / "sound.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 30_000), 24_000)
    text = (tmp_path / "sat" / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("this/repository", str(tmp_path / "sat"))
    process = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    audio, sampling_rate = soundfile.read(tmp_path / "reconstruction.wav")
    assert (len(audio), sampling_rate) == (30_000, 24_000)
