"""Codecs with generators on their tokens, measured side by side: the same sounds, labels, draws and clock."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from ..modeling_aar import AarForConditionalGeneration
from ..modeling_sat import SatModel
from ..processing_aar import AarProcessor
from .bootstrap import Estimate
from .claims_verdicts import BATCH_SIZES, Figures, all_verdicts
from .codec_evaluation import stack_waveforms, timed
from .generator_evaluation import GeneratorEvaluation, Order, SamplingArguments
from .held_out import EvaluationArguments, HeldOutCrops
from .listeners import Listeners, Rows
from .next_token import NextTokenModel
from .reconstruction import mel_distance, multi_resolution_stft_distance, si_sdr, tokens_per_second
from .reports import Cell, Report, noted_warnings

# Rounds in which every system generates once, so that a machine that slows down slows all of them.
TIMED_ROUNDS = 5


@dataclass(frozen=True)
class System:
    """
    A codec and a generator on its tokens.

    Args:
        name (`str`): what the table calls it.
        folder (`Path`): of the trained generator, which has its codec inside.
        model_class (`type`): [`AarForConditionalGeneration`] or [`NextTokenModel`].
    """

    name: str
    folder: Path
    model_class: type[AarForConditionalGeneration]


@dataclass
class ClaimsMeasurements:
    """
    Args:
        figures (`list[Figures]`): of each system, in their order.
        num_held_out (`int`): sounds that the codecs reconstruct and that all distances are to.
        num_generated (`int`): sounds of each generator.
        num_left_out (`int`): crops that were silent or broken.
        settings (`dict`): the listeners and how sounds were drawn, by name.
        held_out_named_rightly (`Estimate`, *optional*): what the classifier makes of the held-out sounds themselves.
        notes (`list[str]`): warnings that a reader must know.
    """

    figures: list[Figures]
    num_held_out: int
    num_generated: int
    num_left_out: int
    settings: dict[str, Cell]
    held_out_named_rightly: Estimate | None
    notes: list[str] = field(default_factory=list)


def measure_claims(
    systems: Sequence[System], args: EvaluationArguments, sampling: SamplingArguments
) -> ClaimsMeasurements:
    """
    Measures all systems.

    Raises:
        ValueError: as [`HeldOutCrops`] and [`Listeners`].
    """
    accelerator = Accelerator(cpu=args.use_cpu)
    models = [each.model_class.from_pretrained(each.folder).eval().to(accelerator.device) for each in systems]
    config = models[0].config
    duration_s, rate = config.codec_config.window_length_s, config.sampling_rate
    crops = HeldOutCrops(args, accelerator, duration_s, [rate], config.labels, needs_labels=True)
    listeners = Listeners(args.embeddings, args.classifier, crops.label_names, rate, accelerator.device)
    evaluations = [
        GeneratorEvaluation(
            model, AarProcessor.from_pretrained(each.folder), crops, listeners, sampling, args, accelerator
        )
        for each, model in zip(systems, models)
    ]
    held_out = crops.measure(lambda examples: hear_crops(listeners, examples), "held-out sounds")
    num_left_out = len(crops.left_out)
    # all models have the same labels, and so the same sounds to make
    orders = evaluations[0].orders(held_out)
    notes: list[str] = []
    with noted_warnings(notes):
        figures = [
            measure_system(each.name, evaluation, held_out, orders) for each, evaluation in zip(systems, evaluations)
        ]
    for batch_size in BATCH_SIZES:
        for own, seconds in zip(figures, take_turns(evaluations, orders, batch_size)):
            own.seconds[batch_size] = seconds
    return ClaimsMeasurements(
        figures,
        num_held_out=len(held_out["index"]),
        num_generated=len(orders),
        num_left_out=num_left_out,
        settings={
            "embeddings": ", ".join(str(embedding.info) for embedding in listeners.embeddings.values()),
            **{"batch size": args.batch_size, "rounds of timing": TIMED_ROUNDS},
        },
        held_out_named_rightly=listeners.named_rightly(held_out, "held_out").get("named_rightly/held_out"),
        notes=list(dict.fromkeys(notes)),
    )


def hear_crops(listeners: Listeners, examples: list[dict]) -> Rows:
    return listeners.hear("held_out", stack_waveforms(examples)[:, 0])


def measure_system(name: str, evaluation: GeneratorEvaluation, held_out: Rows, orders: Sequence[Order]) -> Figures:
    """A system's figures, without its seconds."""
    config, listeners = evaluation.model.config.codec_config, evaluation.listeners
    reconstructed = measure_reconstructions(evaluation.model.codec_model, evaluation.crops, listeners)
    generated = evaluation.measure_generated(orders)
    distances = listeners.frechet_distances(generated, "generated", held_out, "held_out")
    named = listeners.named_rightly(generated, "generated") | listeners.named_rightly(reconstructed, "reconstruction")
    is_next_token = isinstance(evaluation.model, NextTokenModel)
    return Figures(
        name=name,
        is_next_token=is_next_token,
        tokens_per_second=tokens_per_second(config),
        forward_passes=config.tokens_per_window if is_next_token else config.num_scales,
        clips=reconstructed["clip"],
        codec={measure: reconstructed[measure] for measure in ("mel_distance", "stft_distance", "si_sdr_db")},
        frechet={embedding.partition("/")[2]: distance for embedding, distance in distances.items()},
        named_rightly={source.partition("/")[2]: share for source, share in named.items()},
    )


@torch.no_grad()
def measure_reconstructions(codec: SatModel, crops: HeldOutCrops, listeners: Listeners) -> Rows:
    """What a codec loses of every held-out crop, and what is heard in its reconstructions."""

    def measure(examples: list[dict]) -> Rows:
        waveforms = stack_waveforms(examples).to(codec.device, codec.dtype)
        decoded = codec.decode(codec.encode(waveforms).audio_codes).audio_values
        decoded, references = decoded[:, 0, : waveforms.shape[-1]].float(), waveforms[:, 0].float()
        rows = {
            "mel_distance": mel_distance(decoded, references, codec.config.sampling_rate),
            "stft_distance": multi_resolution_stft_distance(decoded, references),
            "si_sdr_db": si_sdr(decoded, references),
        }
        return rows | listeners.hear("reconstruction", decoded)

    return crops.measure(measure, "reconstructions")


def take_turns(
    evaluations: Sequence[GeneratorEvaluation], orders: Sequence[Order], batch_size: int
) -> list[list[float]]:
    """Seconds per sound of each system in every round, in which all of them make the same batch."""
    batch = [orders[number % len(orders)] for number in range(batch_size)]
    seconds = [[] for _ in evaluations]
    for number in range(TIMED_ROUNDS + 1):
        for own, evaluation in zip(seconds, evaluations):
            inputs, seeds = evaluation.inputs_of(batch), [evaluation.seed + order.index for order in batch]
            _, elapsed = timed(lambda: evaluation.generate(inputs, seeds))  # noqa: B023
            if number > 0:  # the first pass takes longer
                own.append(elapsed / batch_size)
    return seconds


def claims_report(measured: ClaimsMeasurements) -> Report:
    """The table of all systems, and the verdicts on the claims."""
    verdicts = all_verdicts(measured.figures)
    figures: dict[str, Cell] = {"claims": len(verdicts), "claims_that_hold": sum(each.holds for each in verdicts)}
    if measured.held_out_named_rightly is not None:
        figures["named_rightly/held_out"] = measured.held_out_named_rightly
    settings = {
        **{"held-out sounds": measured.num_held_out, "crops left out": measured.num_left_out},
        "generated sounds per system": measured.num_generated,
    }
    return Report(
        "The paper's claims in miniature",
        settings | measured.settings,
        figures,
        {"Systems": system_table(measured.figures)},
        notes=measured.notes,
        conclusions=[str(verdict) for verdict in verdicts],
    )


def system_table(figures: Sequence[Figures]) -> list[dict[str, Cell]]:
    """A row for each system; empty cells where too few sounds had just one label."""
    (next_token,) = (each for each in figures if each.is_next_token)
    table = []
    for own in figures:
        row = {
            "system": own.name,
            "predicts": "token by token" if own.is_next_token else "scale by scale",
            "tokens per second": own.tokens_per_second,
            "mel distance": own.estimate("mel_distance"),
            "STFT distance": own.estimate("stft_distance"),
            "SI-SDR (dB)": own.estimate("si_sdr_db"),
        }
        row |= {f"Fréchet distance ({name})": distance for name, distance in own.frechet.items()}
        row |= {
            "generated, named rightly": own.named_rightly.get("generated", ""),
            "reconstructed, named rightly": own.named_rightly.get("reconstruction", ""),
            "forward passes": own.forward_passes,
        }
        for size in BATCH_SIZES:
            row[f"seconds per clip, batch {size}"] = statistics.median(own.seconds[size])
        for size in BATCH_SIZES:
            row[f"times as fast as next-token, batch {size}"] = own.speed_ratio(next_token, size)
        table.append(row)
    return table
