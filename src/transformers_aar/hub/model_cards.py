"""Model cards: Markdown templates with the metadata that the Hub reads, filled in from a model's configuration."""

import importlib.resources
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PIPELINE_TAGS = {"sat": "audio-to-audio", "aar": "text-to-audio"}
TAGS = {
    "sat": ("transformers-aar", "sat", "audio", "audio-tokenizer", "neural-codec", "next-scale", "arxiv:2408.09027"),
    "aar": ("transformers-aar", "aar", "audio", "sound-effects", "next-scale", "arxiv:2408.09027"),
}
# A sentence of the card that the library writes for any model when it pushes; such a card is nobody's work.
STOCK_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."


def render_model_card(
    config: "PreTrainedConfig",
    *,
    license: str = "apache-2.0",
    training_data: str | None = None,
    evaluation: Mapping[str, float | str] | None = None,
    limits: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The model card of a SAT or an AAR as Markdown with YAML metadata.

    Args:
        config ([`SatConfig`] or [`AarConfig`]): fills in the sizes and the examples.
        license (`str`): one of the Hub's licence identifiers.
        training_data (`str`, *optional*): what the model was trained on, as Markdown.
        evaluation (`Mapping[str, float | str]`, *optional*): names of measures, with their units, and values.
        limits (`str`, *optional*): what this model can't do beyond what holds for all of its kind, as Markdown.
        tags (`Sequence[str]`): tags besides the usual ones.
    """
    from huggingface_hub import ModelCard, ModelCardData

    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[config.model_type],
        license=license,
        tags=list(dict.fromkeys([*TAGS[config.model_type], *tags])),
    )
    codec = config if config.model_type == "sat" else config.codec_config
    card = ModelCard.from_template(
        metadata,
        template_str=read_template(config.model_type),
        config=config,
        codec=codec,
        bits_per_token=f"{math.log2(codec.codebook_size):g}",
        training_data=training_data,
        evaluation=evaluation,
        limits=limits,
    )
    return str(card)


def write_model_card(model: "PreTrainedModel", folder: str | os.PathLike, **fields) -> None:
    """Writes `README.md` into a model's folder, unless there is one already.

    `save_pretrained` calls this, so a card that a person has edited stays, and a training script that knows more than
    the configuration calls it first. Only the card that the library puts there when it pushes is replaced; its tags
    stay.

    Args:
        model ([`SatModel`] or [`AarForConditionalGeneration`]): the model whose configuration fills in the card.
        folder (`str` or `os.PathLike`): the model's folder.
        fields: more arguments of [`render_model_card`].
    """
    card = Path(folder) / "README.md"
    if card.exists():
        present = card.read_text(encoding="utf-8")
        if STOCK_CARD not in present:
            return
        fields = {"tags": tags_of(present), **fields}
    staged = card.with_name(f".{card.name}.{os.getpid()}")
    staged.write_text(render_model_card(model.config, **fields), encoding="utf-8")
    staged.replace(card)


def tags_of(card: str) -> list[str]:
    from huggingface_hub import ModelCard

    return ModelCard(card).data.tags or []


def read_template(model_type: str) -> str:
    try:
        folder = importlib.resources.files("transformers_aar.model_cards")
    except ModuleNotFoundError:
        # A source tree that isn't installed: packaging is what puts the templates inside the package.
        folder = Path(__file__).parents[3] / "model_cards"
    return (folder / f"{model_type}.md").read_text(encoding="utf-8")
