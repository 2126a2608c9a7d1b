"""A generator's figures: how its sounds compare with held-out ones, how well it guesses codes, and how fast it is."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..configuration_sat import POSITIVE_INTEGER, POSITIVE_NUMBER, check_fields, number_between
from ..modeling_aar import AarForConditionalGeneration
from ..processing_aar import AarProcessor
from ..training.aar_training import collate_generation_examples, scale_sums, with_neighbours_conditioning
from ..training.arguments import COUNT, NUMBER_FROM_ZERO, option, optional
from .bootstrap import Estimate, bootstrap_interval
from .classification import clap_score, inception_score, kl_divergence
from .codebook_usage import CodebookUsage
from .codec_evaluation import stack_waveforms, timed, with_reconstruction
from .embeddings import AstEmbedding, ClapEmbedding
from .held_out import TEXTS, EvaluationArguments, HeldOutCrops, gather_rows, own_batches
from .listeners import Listeners, Rows
from .plots import plot_token_pyramid
from .reports import Report, Sample, noted_warnings, write_samples

TIMED_RUNS = 5


@dataclass
class SamplingArguments:
    """What is generated, and how; what isn't given is as the model's generation config says."""

    prompts: list[str] | None = option(
        "Labels, or texts for a CLAP model; with `num_per_label` by default all labels.", None
    )
    num_per_label: int | None = option(
        "Sounds for each prompt; without any prompts each held-out sound's conditioning gives one.", None
    )
    guidance_scale: float | None = option("How closely to follow the conditioning; 0 is freest.", None)
    temperature: float | None = option("Below 1 keeps to what is likely.", None)
    top_k: int | None = option("Most likely codes to choose from; 0: all.", None)
    top_p: float | None = option("Probability of the codes to choose from.", None)
    unguided_scales: int | None = option("So many of the last scales aren't guided.", None)
    max_scales: int | None = option("Stop after so many scales.", None)
    int8: bool = option("Multiply 8-bit integers, on a CPU.", False)

    def __post_init__(self):
        rules = {
            "prompts": TEXTS,
            "num_per_label": POSITIVE_INTEGER,
            "guidance_scale": NUMBER_FROM_ZERO,
            "temperature": POSITIVE_NUMBER,
            "top_k": COUNT,
            "top_p": number_between(0, 1),
            "unguided_scales": COUNT,
            "max_scales": POSITIVE_INTEGER,
        }
        check_fields(self, {name: optional(rule) for name, rule in rules.items()})

    def generation_options(self) -> dict[str, float | int]:
        """What `generate` is given."""
        names = [each.name for each in fields(self) if each.name not in ("prompts", "num_per_label", "int8")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Order:
    """
    A sound to generate.

    Args:
        index (`int`): its number, which added to the seed gives its own.
        text (`str`, *optional*): the prompt, where there is one.
        label (`int`): the one label it should have, −1 for none or several.
        crop (`int`, *optional*): held-out crop whose conditioning it has.
        clip (`int`): the same number for those with the conditioning of one clip's crops.
    """

    index: int
    text: str | None
    label: int
    crop: int | None
    clip: int


class GeneratorEvaluation:
    """
    Measures a generator on held-out sounds.

    Args:
        model ([`AarForConditionalGeneration`]), processor ([`AarProcessor`]): what is evaluated.
        crops ([`HeldOutCrops`]): sounds; for a CLAP model also at its conditioner's rate, the second one.
        listeners ([`Listeners`]): their ears.
        sampling ([`SamplingArguments`]): what is generated.
        args ([`EvaluationArguments`]): batch size and seed; each sound is drawn with the seed plus its number.
        accelerator (`Accelerator`): the processes.

    Raises:
        ValueError: for prompts and settings that don't fit the model, and for `int8` where there are no such products.
    """

    def __init__(
        self,
        model: AarForConditionalGeneration,
        processor: AarProcessor,
        crops: HeldOutCrops,
        listeners: Listeners,
        sampling: SamplingArguments,
        args: EvaluationArguments,
        accelerator: Accelerator,
    ):
        self.model = model
        self.processor = processor
        self.crops = crops
        self.listeners = listeners
        self.sampling = sampling
        self.seed = args.seed
        self.batch_size = args.batch_size
        self.accelerator = accelerator
        codec_config = model.config.codec_config
        self.usage = CodebookUsage(codec_config.scales, codec_config.codebook_size, accelerator.device)
        if sampling.prompts:
            processor(sampling.prompts)  # refuses unknown labels before anything is measured
        # and this what the model can't generate by
        self.generation_config = model._resolve_generation_config(None, sampling.generation_options())
        self.scales = codec_config.scales[: self.generation_config.max_scales]
        if sampling.int8:
            model.to_int8()

    # --- held-out sounds ---------------------------------------------------------------------------------------------

    def measure_held_out(self) -> Rows:
        """What is heard in held-out sounds and in their reconstructions, and how well their codes are guessed."""
        rows = self.crops.measure(self._measure_held_out, "held-out sounds")
        self.usage.counts = self.accelerator.reduce(self.usage.counts)
        return rows

    @torch.no_grad()
    def _measure_held_out(self, examples: list[dict]) -> Rows:
        codec = self.model.codec_model
        waveforms = stack_waveforms(examples).to(codec.device, codec.dtype)
        codes = codec.encode(waveforms).audio_codes
        self.usage.update(codes)
        decoded = codec.decode(codes).audio_values[..., : waveforms.shape[-1]]
        inputs = self.conditioning(examples)
        guesses = self._guesses(inputs, codes)
        # a sound by itself has no neighbour
        is_alone = len(examples) == 1
        neighbours = guesses * torch.nan if is_alone else self._guesses(with_neighbours_conditioning(inputs), codes)
        rows = {"guesses": guesses, "neighbours_guesses": neighbours}
        rows |= self.listeners.hear("held_out", waveforms[:, 0].float())
        return rows | self.listeners.hear("reconstruction", decoded[:, 0].float())

    def _guesses(self, inputs: dict[str, torch.Tensor], codes: torch.LongTensor) -> torch.Tensor:
        """Each sound's [`scale_sums`], `(batch_size, num_scales, 3)`, of its first window, from its own codes."""
        codes, scales = codes[:, 0], self.model.config.codec_config.scales
        logits = self.model(**inputs, audio_codes=codes).logits
        return torch.stack([scale_sums(logits[k : k + 1], codes[k : k + 1], scales) for k in range(len(codes))])

    def conditioning(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """What the model takes of examples besides their sound."""
        kind = self.model.config.conditioning
        if kind == "none":  # tells the number of sounds
            return {"input_ids": torch.zeros(len(examples), 1, dtype=torch.long, device=self.model.device)}
        extractor = self.processor.conditioner_feature_extractor
        inputs = collate_generation_examples(examples, kind, extractor)["inputs"]
        inputs = {name: value for name, value in inputs.items() if name not in ("input_values", "dropout_draws")}
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    # --- generated sounds --------------------------------------------------------------------------------------------

    def orders(self, held_out: Rows) -> list[Order]:
        """The sounds to generate: for each prompt as many as wanted, or one for each held-out sound."""
        labels = held_out["label"].tolist()
        if self.sampling.prompts is None and self.sampling.num_per_label is None:
            places = enumerate(zip(held_out["index"].tolist(), held_out["clip"].tolist(), labels))
            return [Order(number, None, label, crop, clip) for number, (crop, clip, label) in places]
        names = self.listeners.label_names
        prompts = self.sampling.prompts or names
        known = {name.casefold(): label for label, name in enumerate(names)}
        count = self.sampling.num_per_label or 1
        return [
            Order(number * count + copy, text, known.get(text.casefold(), -1), None, clip=number * count + copy)
            for number, text in enumerate(prompts)
            for copy in range(count)
        ]

    def measure_generated(self, orders: Sequence[Order]) -> Rows:
        """What is heard in generated sounds, and the `seconds` that each took; all processes share the work."""
        batches = []
        own = own_batches(orders, self.batch_size, self.accelerator)
        for batch in tqdm(own, "generated sounds", disable=None if self.accelerator.is_main_process else True):
            inputs, seeds = self.inputs_of(batch), [self.seed + order.index for order in batch]
            if not batches:
                self.generate(self.inputs_of(batch[:1]), seeds[:1])  # the first pass takes longer
            (waveforms, _), seconds = timed(lambda: self.generate(inputs, seeds))  # noqa: B023
            rows = {
                "index": torch.tensor([order.index for order in batch]),
                "label": torch.tensor([order.label for order in batch]),
                "clip": torch.tensor([order.clip for order in batch]),
                "seconds": torch.full((len(batch),), seconds / len(batch)),
            }
            batches.append(rows | self.listeners.hear("generated", waveforms))
        return gather_rows(batches)

    def inputs_of(self, orders: Sequence[Order]) -> dict[str, torch.Tensor]:
        """The conditioning of sounds to generate."""
        if orders[0].crop is not None:
            return self.conditioning([self.crops.read(order.crop) for order in orders])
        inputs = self.processor([order.text for order in orders], return_tensors="pt")
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def generate(self, inputs: dict[str, torch.Tensor], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms `(num_sounds, num_samples)` of one window each, and their codes."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = self.sampling.generation_options() | {"num_windows": 1, "num_return_sequences": 1}
        output = self.model.generate(**inputs, **options, generator=generators, return_dict_in_generate=True)
        return output.audio[:, 0].float(), output.audio_codes

    def seconds_alone(self, order: Order) -> float:
        """Median of the seconds that a sound by itself takes."""
        inputs, seeds = self.inputs_of([order]), [self.seed + order.index]
        return statistics.median(timed(lambda: self.generate(inputs, seeds))[1] for _ in range(TIMED_RUNS))


def generator_report(
    evaluation: GeneratorEvaluation, held_out: Rows, orders: Sequence[Order], generated: Rows, title: str
) -> Report:
    """The figures and tables; more settings, pictures and sounds are the caller's to add."""
    listeners, notes = evaluation.listeners, []
    with noted_warnings(notes):
        figures = {
            f"{name}/to_{reference}": value
            for reference in ("held_out", "reconstruction")
            for name, value in listeners.frechet_distances(generated, "generated", held_out, reference).items()
        }
        figures |= {
            f"{name}/reconstruction_to_held_out": value
            for name, value in listeners.frechet_distances(held_out, "reconstruction", held_out, "held_out").items()
        }
    figures |= heard_figures(evaluation, held_out, orders, generated)
    for source, rows in (("held_out", held_out), ("reconstruction", held_out), ("generated", generated)):
        figures |= listeners.named_rightly(rows, source)
    figures |= guess_figures(held_out) | {"entropy_of_single_codes": evaluation.usage.entropy_per_token.item()}
    figures |= {
        "forward_passes": len(evaluation.scales),
        "seconds_per_clip": generated["seconds"].mean().item(),
        "seconds_per_clip_alone": evaluation.seconds_alone(orders[0]),
    }
    tables = {"Scales": guess_table(evaluation.model.config.codec_config.scales, held_out)}
    if listeners.classifier is not None:
        tables["Sounds named rightly"] = naming_table(listeners, held_out, generated)
    settings = {"held-out sounds": len(held_out["index"]), "generated sounds": len(orders)}
    return Report(title, settings, figures, tables, notes=list(dict.fromkeys(notes)))


def heard_figures(
    evaluation: GeneratorEvaluation, held_out: Rows, orders: Sequence[Order], generated: Rows
) -> dict[str, Estimate]:
    """
    With AST the inception score, of all sounds in one part, and where every held-out sound gave its conditioning the
    divergence from it; with CLAP the score of sounds whose prompts are texts.
    """
    figures, clips = {}, generated["clip"]
    for name, embedding in evaluation.listeners.embeddings.items():
        heard = generated[f"generated/{name}"]
        if isinstance(embedding, AstEmbedding):
            logits = embedding.classify(heard).cpu()
            figures["inception_score"] = bootstrap_interval(
                logits, lambda sample: inception_score(sample, 1)[0], clips
            )
            if orders[0].crop is not None:
                references = embedding.classify(held_out[f"held_out/{name}"]).cpu()
                figures["kl_divergence"] = bootstrap_interval(kl_divergence(logits, references), clips=clips)
        elif isinstance(embedding, ClapEmbedding) and orders[0].text is not None:
            texts = embedding.embed_texts([order.text for order in orders]).cpu()
            figures["clap_score"] = bootstrap_interval(clap_score(heard, texts), clips=clips)
    return figures


def guess_figures(held_out: Rows) -> dict[str, Estimate]:
    """Cross-entropy in nats per token and share of tokens guessed rightly, given all coarser scales."""
    estimates = guess_estimates(held_out["guesses"].sum(1), held_out["neighbours_guesses"].sum(1), held_out["clip"])
    return dict(zip(("loss", "accuracy", "loss_with_neighbours_conditioning"), estimates))


def guess_table(scales: Sequence[int], held_out: Rows) -> list[dict]:
    """The same for every scale."""
    table = []
    for scale, length in enumerate(scales):
        guesses = held_out["guesses"][:, scale], held_out["neighbours_guesses"][:, scale]
        estimates = guess_estimates(*guesses, held_out["clip"])
        figures = dict(zip(("loss", "accuracy", "loss with neighbours' conditioning"), estimates))
        table.append({"scale": scale + 1, "tokens": length} | figures)
    return table


def guess_estimates(
    guesses: torch.Tensor, neighbours_guesses: torch.Tensor, clips: torch.LongTensor
) -> list[Estimate]:
    """
    Loss, accuracy and loss with a neighbour's conditioning from sums `(num_sounds, 3)` of [`scale_sums`]; without the
    last where hardly any sound had a neighbour.
    """
    losses, right, count = guesses.unbind(-1)
    estimates = [bootstrap_interval(losses / count, clips=clips), bootstrap_interval(right / count, clips=clips)]
    with_neighbour = neighbours_guesses[:, 0].isfinite()
    if len(clips[with_neighbour].unique()) > 1:
        neighbours_losses = (neighbours_guesses[:, 0] / count)[with_neighbour]
        estimates.append(bootstrap_interval(neighbours_losses, clips=clips[with_neighbour]))
    return estimates


def naming_table(listeners: Listeners, held_out: Rows, generated: Rows) -> list[dict]:
    """Share of the sounds of each label that the classifier names rightly."""
    sources = {"held out": (held_out, "held_out"), "reconstruction": (held_out, "reconstruction")}
    sources["generated"] = generated, "generated"
    shares = {title: listeners.shares_named_rightly(*source) for title, source in sources.items()}
    names = sorted({name for column in shares.values() for name in column})
    return [{"label": name} | {title: column.get(name, "") for title, column in shares.items()} for name in names]


@torch.no_grad()
def illustrate_generator(
    report: Report, evaluation: GeneratorEvaluation, held_out: Rows, orders: Sequence[Order], count: int, folder: Path
) -> None:
    """Adds pictures, and so many generated sounds beside real ones of the same kind."""
    config = evaluation.model.config.codec_config
    samples = []
    for place in range(min(count, len(orders))):
        order = orders[len(orders) * place // count]
        # the second one's seed is nobody else's
        seeds = [evaluation.seed + order.index, evaluation.seed + order.index + len(orders)]
        waveforms, codes = evaluation.generate(evaluation.inputs_of([order, order]), seeds)
        title, sounds = real_sounds(evaluation, held_out, order)
        sounds |= {"generated": waveforms[0].cpu(), "generated again": waveforms[1].cpu()}
        samples.append(Sample(title, sounds))
        if place == 0:
            stride_s = config.window_stride / config.sampling_rate
            caption = f"{title}, generated"
            plot_token_pyramid(
                *(folder / "tokens.png", codes[0], evaluation.scales, config.codebook_size, stride_s, caption)
            )
    report.samples = write_samples(samples, config.sampling_rate, folder, "sounds.png")
    report.pictures = {"sounds.png": "Generated sounds beside real ones", "tokens.png": "Codes of a generated sound"}


def real_sounds(evaluation: GeneratorEvaluation, held_out: Rows, order: Order) -> tuple[str, dict[str, torch.Tensor]]:
    """A title for a sound, and a held-out one like it with its reconstruction, if there is any."""
    crop = order.crop
    if crop is None:
        alike = held_out["index"][held_out["label"] == order.label].tolist() if order.label >= 0 else []
        if not alike:
            return order.text, {}
        crop = alike[0]
    example = evaluation.crops.read(crop)
    title = order.text or evaluation.crops.title(example)
    return title, with_reconstruction(evaluation.model.codec_model, example, "real")
