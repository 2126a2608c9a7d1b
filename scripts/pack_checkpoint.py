"""
Makes a trained generator ready for the package: the transformer's weights in fp16, no training statistics, no copy of
the code, the sampling defaults that suit it, and a card with the figures and pictures of its evaluation.

    python scripts/pack_checkpoint.py --generator runs/aar/final --output_dir runs/packed
    python scripts/evaluate_sat.py --model runs/packed --output_dir reports/sat …
    python scripts/evaluate_aar.py --model runs/packed --output_dir reports/aar …
    python scripts/pack_checkpoint.py --generator … --output_dir runs/carded --reports reports/sat reports/aar

Options may also stand in a YAML file, named first.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import logging

from transformers_aar import AarProcessor
from transformers_aar.configuration_sat import POSITIVE_NUMBER, check_fields, number_between
from transformers_aar.evaluation.held_out import TEXTS
from transformers_aar.hub.loading import load_model
from transformers_aar.hub.model_cards import write_model_card
from transformers_aar.hub.packing import slim_down
from transformers_aar.training.arguments import COUNT, NUMBER_FROM_ZERO, TEXT, option, optional
from transformers_aar.training.runs import run_script

RULES = {
    **dict.fromkeys(("generator", "output_dir"), TEXT),
    **dict.fromkeys(("training_data", "limits"), optional(TEXT)),
    **dict.fromkeys(("reports", "pictures"), TEXTS),
    "guidance_scale": NUMBER_FROM_ZERO,
    "temperature": POSITIVE_NUMBER,
    "top_k": COUNT,
    "top_p": number_between(0, 1),
}
# what the card says of a report's figures, in this order
FIGURES = {
    "mel_distance": "mel distance of held-out sounds' reconstructions",
    "stft_distance": "multi-resolution STFT distance of the same",
    "si_sdr_db": "SI-SDR of the same, in dB",
    "named_rightly/original": "held-out sounds that an independent classifier names rightly",
    "named_rightly/reconstruction": "their reconstructions that it names rightly",
    "named_rightly/generated": "generated sounds that it names rightly",
    "frechet_distance/log_mel/to_held_out": "Fréchet distance of generated to held-out sounds, log-mel statistics",
    "loss": "cross-entropy of held-out codes, in nats per token",
}


@dataclass
class PackArguments:
    """What is packed, with which sampling defaults, and what its card says."""

    generator: str = option("Folder of the generator, as its training left it.")
    output_dir: str = option("Folder of the packed checkpoint.")
    guidance_scale: float = option("Saved as the model's default.", 4.0)
    temperature: float = option("The same.", 1.0)
    top_k: int = option("The same.", 900)
    top_p: float = option("The same.", 0.95)
    reports: list[str] = option("Folders of evaluations of what was packed, for the card.", [])
    pictures: list[str] = option("PNG files for the end of the card, which are named for what they show.", [])
    training_data: str | None = option("For the card: what the model was trained on.", None)
    limits: str | None = option("For the card: what the model can't do.", None)

    def __post_init__(self):
        check_fields(self, RULES)


def main(args: PackArguments) -> None:
    logging.set_verbosity_error()
    folder, figures = Path(args.output_dir), read_figures(args.reports)
    for picture in args.pictures:
        if Path(picture).suffix != ".png" or not Path(picture).is_file():
            raise ValueError(f"{picture} is no PNG file: name pictures that exist.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files already: name a new or an empty folder.")
    model = load_model(args.generator).float()
    if model.config.model_type != "aar":
        raise ValueError(f"{args.generator} is a codec: name the folder of a generator, which has its codec inside.")
    model.model.half()  # the codec stays: what a vocoder's decoder adds up cancels out, and rounding would be heard
    sampling = {name: getattr(args, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    model.generation_config = GenerationConfig(do_sample=True, num_windows=1, **sampling)
    folder.mkdir(parents=True, exist_ok=True)
    write_model_card(model, folder, training_data=args.training_data, evaluation=figures or None, limits=args.limits)
    add_pictures(folder, [Path(picture) for picture in args.pictures])
    model.save_pretrained(folder)
    AarProcessor.from_pretrained(args.generator).save_pretrained(folder)
    slim_down(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def add_pictures(folder: Path, pictures: list[Path]) -> None:
    """Copies pictures beside the card, and shows them at its end."""
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        for picture in pictures:
            shutil.copyfile(picture, folder / picture.name)
            caption = picture.stem.replace("_", " ").capitalize()
            card.write(f"\n\n## {caption}\n\n![{caption}]({picture.name})")


def read_figures(reports: list[str]) -> dict[str, str]:
    """The figures of some evaluations that belong in a card, with their intervals."""
    found = {}
    for file in (Path(report) / "report.json" for report in reports):
        if not file.is_file():
            raise ValueError(f"{file} doesn't exist: name folders of reports by evaluate_sat.py and evaluate_aar.py.")
        found = json.loads(file.read_text())["figures"] | found
    return {words: in_words(found[name]) for name, words in FIGURES.items() if name in found}


def in_words(entry: dict[str, float]) -> str:
    return f"{entry['value']:.4g}" + (f" ({entry['low']:.4g} to {entry['high']:.4g})" if "low" in entry else "")


if __name__ == "__main__":
    run_script(main, PackArguments)
