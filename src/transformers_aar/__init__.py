"""
Next-scale audio generation for Transformers: SAT, a scale-level audio tokenizer, and AAR, a transformer that predicts
a whole scale at a time (arXiv 2408.09027). Importing the package registers both with the Auto classes.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from .configuration_aar import AarConfig
from .configuration_sat import SatConfig
from .feature_extraction_sat import SatFeatureExtractor
from .generation_aar import AarGenerateOutput, AarPreviewStreamer
from .modeling_aar import AarForConditionalGeneration, AarModel
from .modeling_sat import SatModel, SharingMixin
from .processing_aar import AarProcessor

__version__ = "0.1.0"

# folder of the small trained generator that needs no download
BUNDLED_CHECKPOINT = str(Path(__file__).parent / "pretrained")


def _register() -> None:
    """Makes the Auto classes and the pipelines know the models. That their code travels is said in their modules."""
    for config, models in (
        (SatConfig, {SatModel: (AutoModel, AutoModelForAudioTokenization)}),
        (AarConfig, {AarForConditionalGeneration: (AutoModel, AutoModelForTextToWaveform)}),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoFeatureExtractor.register(config, SatFeatureExtractor, exist_ok=True)
        for model, auto_classes in models.items():
            for auto_class in auto_classes:
                auto_class.register(config, model, exist_ok=True)
    AutoProcessor.register(AarConfig, AarProcessor, exist_ok=True)


def _write_model_card(model, folder) -> None:
    from .hub.model_cards import write_model_card

    write_model_card(model, folder)


_register()
SharingMixin.model_card_writer = _write_model_card

__all__ = [
    "AarConfig",
    "AarForConditionalGeneration",
    "AarGenerateOutput",
    "AarModel",
    "AarPreviewStreamer",
    "AarProcessor",
    "BUNDLED_CHECKPOINT",
    "SatConfig",
    "SatFeatureExtractor",
    "SatModel",
]
