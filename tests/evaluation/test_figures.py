"""Figures of codecs, generators and systems, from rows and stubs whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from transformers_aar import AarProcessor, SatFeatureExtractor
from transformers_aar.evaluation import claims_measurements, codec_evaluation, generator_evaluation
from transformers_aar.evaluation.bootstrap import bootstrap_interval
from transformers_aar.evaluation.claims_measurements import TIMED_ROUNDS, measure_system, take_turns
from transformers_aar.evaluation.codebook_usage import CodebookUsage
from transformers_aar.evaluation.codec_evaluation import CodecMeasurements, measure_batch, scale_table
from transformers_aar.evaluation.embeddings import AstEmbedding, ClapEmbedding, EmbeddingInfo
from transformers_aar.evaluation.frechet import FrechetStatistics, frechet_interval
from transformers_aar.evaluation.generator_evaluation import (
    GeneratorEvaluation,
    Order,
    SamplingArguments,
    generator_report,
    guess_figures,
    guess_table,
    heard_figures,
    naming_table,
    real_sounds,
)
from transformers_aar.evaluation.held_out import gather_rows
from transformers_aar.evaluation.listeners import Listeners
from transformers_aar.hub.label_tokenizer import label_tokenizer
from transformers_aar.training.losses import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:A set has")

LABELS = ["Dog", "Siren", "Rain"]
CLIPS = torch.tensor([3, 3, 8, 9])


def guesses(*rows: list[list[float]]) -> torch.Tensor:
    """Loss, right guesses and tokens of each sound's two scales, which have one token and three."""
    return torch.tensor(rows, dtype=torch.float64)


ROWS = {
    "clip": CLIPS,
    "guesses": guesses(
        *([[1.0, 1, 1], [3.0, 0, 3]], [[2.0, 0, 1], [6.0, 3, 3]]),
        *([[3.0, 0, 1], [9.0, 1, 3]], [[0.0, 1, 1], [8.0, 2, 3]]),
    ),
    # the last sound was by itself
    "neighbours_guesses": guesses(
        *([[2.0, 1, 1], [6.0, 0, 3]], [[4.0, 0, 1], [8.0, 3, 3]]),
        *([[6.0, 0, 1], [18.0, 1, 3]], [[math.nan] * 3] * 2),
    ),
}


def test_guesses_are_means_over_tokens():
    figures = guess_figures(ROWS)
    assert figures == {
        "loss": bootstrap_interval(torch.tensor([1.0, 2.0, 3.0, 2.0]), clips=CLIPS),
        "accuracy": bootstrap_interval(torch.tensor([0.25, 0.75, 0.25, 0.75]), clips=CLIPS),
        "loss_with_neighbours_conditioning": bootstrap_interval(torch.tensor([2.0, 3.0, 6.0]), clips=CLIPS[:3]),
    }
    table = guess_table([1, 3], ROWS)
    assert [(row["scale"], row["tokens"]) for row in table] == [(1, 1), (2, 3)]
    assert [row["loss"].value for row in table] == pytest.approx([6 / 4, 26 / 12])
    assert [row["accuracy"].value for row in table] == pytest.approx([2 / 4, 6 / 12])
    assert [row["loss with neighbours' conditioning"].value for row in table] == pytest.approx([12 / 3, 32 / 9])


@pytest.mark.parametrize("alone", [[0, 1, 2, 3], [2, 3]], ids=["all", "but for one clip's"])
def test_without_neighbours_there_is_no_figure_of_theirs(alone):
    neighbours = ROWS["neighbours_guesses"].clone()
    neighbours[alone] = math.nan
    assert guess_figures(ROWS | {"neighbours_guesses": neighbours}).keys() == {"loss", "accuracy"}
    assert "loss" in guess_table([1, 3], ROWS | {"neighbours_guesses": neighbours})[0]


class Ast(AstEmbedding):
    """Hears in a sound the logarithms of what its row says."""

    def __init__(self):
        pass

    def classify(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.log()


class Clap(ClapEmbedding):
    def __init__(self):
        pass

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if text == "a dog" else [0.0, 1.0] for text in texts])


def orders_of_crops(count: int) -> list[Order]:
    return [Order(number, None, number % 3, crop=10 + number, clip=number // 2) for number in range(count)]


def listening(**embeddings) -> SimpleNamespace:
    return SimpleNamespace(listeners=SimpleNamespace(embeddings=embeddings))


def test_what_ast_hears():
    """The divergence of generated classes from a held-out sound's own, and how many classes there are."""
    real = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    made = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]])
    generated, held_out = {"generated/ast": made, "clip": torch.tensor([0, 0, 1])}, {"held_out/ast": real}
    figures = heard_figures(listening(ast=Ast()), held_out, orders_of_crops(3), generated)
    divergences = (
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
        0.0,
        0.9 * math.log(1.8) + 0.1 * math.log(0.2),
    )
    assert figures["kl_divergence"].value == pytest.approx(sum(divergences) / 3, rel=1e-6)
    entropy = -sum(share * math.log(share) for share in (1.9 / 3, 1.1 / 3))
    mean_entropy = (2 * math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)) / 3
    assert figures["inception_score"].value == pytest.approx(math.exp(entropy - mean_entropy), rel=1e-6)
    interval = bootstrap_interval(torch.tensor(divergences), clips=generated["clip"])
    assert figures["kl_divergence"].low == pytest.approx(interval.low, rel=1e-5)


def test_what_clap_hears():
    """Each sound beside its own text."""
    orders = [Order(number, text, -1, None, clip=number) for number, text in enumerate(["a dog", "rain", "rain"])]
    heard = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    figures = heard_figures(listening(clap=Clap()), {}, orders, {"generated/clap": heard, "clip": torch.arange(3)})
    assert figures["clap_score"].value == pytest.approx((1 + 1 + 0.8) / 3)
    assert (
        list(heard_figures(listening(clap=Clap()), {}, orders_of_crops(3), {"generated/clap": heard, "clip": 0})) == []
    )


# --- reports ---------------------------------------------------------------------------------------------------------


class Ears:
    """An embedding that nothing is heard with."""

    info = EmbeddingInfo("ears", "1", 2, 24_000)


@pytest.fixture
def listeners() -> Listeners:
    listeners = Listeners([], None, LABELS, 24_000, torch.device("cpu"))
    listeners.embeddings["ears"] = Ears()
    listeners.classifier = "somebody"
    return listeners


def apart(distance: float) -> torch.Tensor:
    """Embeddings of four sounds; those of two distances have the square of the difference for Fréchet distance."""
    return torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 0.0], [-2.0, 0.0]]) + torch.tensor([distance, 0.0])


def heard_rows(source: str, distance: float, heard: list[int]) -> dict[str, torch.Tensor]:
    return {f"{source}/ears": apart(distance), f"{source}/heard": torch.tensor(heard)}


@pytest.fixture
def held_out() -> dict[str, torch.Tensor]:
    rows = ROWS | {"index": torch.arange(4), "label": torch.tensor([0, 0, 2, -1])}
    return rows | heard_rows("held_out", 0.0, [0, 0, 2, 1]) | heard_rows("reconstruction", 1.0, [0, 1, 2, 1])


@pytest.fixture
def generated() -> dict[str, torch.Tensor]:
    rows = {"index": torch.arange(4), "label": torch.tensor([0, 0, 2, -1]), "clip": CLIPS}
    return rows | {"seconds": torch.tensor([0.1, 0.1, 0.3, 0.3])} | heard_rows("generated", 5.0, [1, 1, 2, 1])


def test_generator_report(listeners, held_out, generated):
    """Each figure is of what its name says."""
    usage = CodebookUsage([1, 3], 4)
    usage.update(torch.tensor([[0, 0, 1, 2], [0, 3, 0, 1], [0, 2, 3, 0], [0, 1, 2, 3]]))
    codec_config = SimpleNamespace(scales=[1, 3])
    evaluation = SimpleNamespace(
        **{"listeners": listeners, "usage": usage, "scales": [1, 3], "seconds_alone": lambda order: 0.1 * order.crop},
        model=SimpleNamespace(config=SimpleNamespace(codec_config=codec_config)),
    )
    report = generator_report(evaluation, held_out, orders_of_crops(4), generated, "Title")
    values = {name: getattr(figure, "value", figure) for name, figure in report.figures.items()}
    assert values == {
        "frechet_distance/ears/to_held_out": pytest.approx(25.0),
        "frechet_distance/ears/to_reconstruction": pytest.approx(16.0),
        "frechet_distance/ears/reconstruction_to_held_out": pytest.approx(1.0),
        "named_rightly/held_out": pytest.approx(1.0),
        "named_rightly/reconstruction": pytest.approx(2 / 3),
        "named_rightly/generated": pytest.approx(1 / 3),
        **{"loss": 2.0, "accuracy": 0.5, "loss_with_neighbours_conditioning": pytest.approx(11 / 3)},
        # one code in the scale of one token, four as often as each other in that of three
        "entropy_of_single_codes": pytest.approx(0.75 * math.log(4)),
        **{"forward_passes": 2, "seconds_per_clip": pytest.approx(0.2), "seconds_per_clip_alone": 1.0},
    }
    assert report.figures["named_rightly/generated"] == bootstrap_interval(torch.tensor([0.0, 0, 1]), clips=CLIPS[:3])
    references = FrechetStatistics(Ears.info)
    references.update(apart(0.0))
    to_held_out = report.figures["frechet_distance/ears/to_held_out"]
    assert to_held_out == frechet_interval(apart(5.0), references, CLIPS)
    assert report.settings == {"held-out sounds": 4, "generated sounds": 4}
    assert report.tables["Sounds named rightly"] == naming_table(listeners, held_out, generated)


def test_naming_table(listeners, held_out, generated):
    table = naming_table(listeners, held_out, generated)
    assert table == [
        {"label": "Dog", "held out": 1.0, "reconstruction": 0.5, "generated": 0.0},
        {"label": "Rain", "held out": 1.0, "reconstruction": 1.0, "generated": 1.0},
    ]


# --- codecs ----------------------------------------------------------------------------------------------------------


class Deaf(Listeners):
    def __init__(self):
        super().__init__([], None, LABELS, 24_000, torch.device("cpu"))


@pytest.fixture
def codec(build_codec):
    return build_codec(window_length_s=0.16, scales=[1, 3, 6, 12])


@torch.no_grad()
def test_rows_of_a_codec(codec, sounds, monkeypatch):
    """Errors of each sound, and seconds per second of audio."""
    seconds = iter([6.0, 3.0])
    monkeypatch.setattr(codec_evaluation, "timed", lambda function: (function(), next(seconds)))
    waveforms = sounds(3, codec.config.window_length)[:, None]
    rows, codes = measure_batch(codec, waveforms, Deaf())
    decoded = codec.decode(codes).audio_values
    assert rows["encode_seconds"].tolist() == pytest.approx([6.0 / (3 * 0.16)] * 3)
    assert rows["decode_seconds"].tolist() == pytest.approx([3.0 / (3 * 0.16)] * 3)
    errors = [relative_error(fake[None], real[None]) for fake, real in zip(decoded, waveforms)]
    torch.testing.assert_close(rows["relative_error"], torch.stack(errors))


@torch.no_grad()
def test_scales_of_a_codec(codec, sounds):
    """Latent errors are shares of all latents' variance."""
    batches = []
    for number in range(2):
        rows, codes = measure_batch(codec, sounds(3, codec.config.window_length, seed=number)[:, None], Deaf())
        batches.append(rows | {"index": torch.arange(3) + 3 * number, "clip": torch.tensor([0, 0, 1]) + number})
    rows = gather_rows(batches)
    usage = CodebookUsage(codec.config.scales, codec.config.codebook_size)
    usage.update(codes)
    waveforms = torch.cat([sounds(3, codec.config.window_length, seed=number) for number in range(2)])[:, None]
    hidden = codec.encoder(waveforms)
    latents = codec.quantizer.project_in(hidden.mT).double()
    variance = latents.flatten(0, 1).var(0, correction=0).mean()
    table = scale_table(codec, CodecMeasurements(rows, usage))
    for scale, row in enumerate(table):
        residuals = codec.quantizer(hidden).commitment_losses / 2
        assert row["latent error"].value == pytest.approx(float(residuals[scale] / variance), rel=1e-5)
        assert row["mel distance"] == bootstrap_interval(rows["mel_distance"][:, scale], clips=rows["clip"])
        assert row["perplexity"] == usage.perplexity[scale].item()


# --- generators ------------------------------------------------------------------------------------------------------

NUM_CROPS = 5


class Crops:
    """Crops whose labels and sounds tell their number, in batches of two."""

    def __init__(self, sounds: torch.Tensor):
        self.sounds = sounds
        self.label_names = LABELS

    def read(self, index: int) -> dict:
        example = {"index": index, "labels": [index % 3], "name": f"clip {index // 2}", "skipped": []}
        return example | {"waveforms": [self.sounds[index][None]], "draws": torch.zeros(1)}

    def title(self, example: dict) -> str:
        return LABELS[example["labels"][0]]

    def measure(self, function, description: str) -> dict[str, torch.Tensor]:
        batches = [range(2), range(2, 4), range(4, 5)]
        rows = [
            {"index": torch.tensor(batch), "clip": torch.tensor(batch) // 2, "label": torch.tensor(batch) % 3}
            | function([self.read(index) for index in batch])
            for batch in batches
        ]
        return gather_rows(rows)


@pytest.fixture
def evaluation(build_generator, sounds) -> GeneratorEvaluation:
    """Of a model that gives silence and remembers what it was asked for."""
    model = build_generator(conditioning="label", labels=LABELS)
    processor = AarProcessor(SatFeatureExtractor(), label_tokenizer(LABELS), labels=LABELS)
    accelerator = SimpleNamespace(
        **{"device": torch.device("cpu"), "process_index": 0, "num_processes": 1, "is_main_process": True},
        reduce=lambda counts: counts,
    )
    args = SimpleNamespace(seed=100, batch_size=2)
    sampling = SamplingArguments(temperature=0.5)
    crops = Crops(sounds(NUM_CROPS, model.config.codec_config.window_length))
    return GeneratorEvaluation(model, processor, crops, Deaf(), sampling, args, accelerator)


def remember_calls(evaluation: GeneratorEvaluation, monkeypatch) -> list[dict]:
    calls = []

    def generate(**kwargs) -> SimpleNamespace:
        calls.append(kwargs)
        return SimpleNamespace(audio=torch.zeros(len(kwargs["input_ids"]), 1, 1920), audio_codes="codes")

    monkeypatch.setattr(evaluation.model, "generate", generate)
    return calls


def test_orders_follow_the_held_out_crops(evaluation):
    held_out = {"index": torch.tensor([2, 4]), "label": torch.tensor([2, -1]), "clip": torch.tensor([7, 8])}
    assert evaluation.orders(held_out) == [Order(0, None, 2, 2, 7), Order(1, None, -1, 4, 8)]
    evaluation.sampling = SamplingArguments(prompts=["Rain", "Siren, Dog"], num_per_label=2)
    orders = evaluation.orders(held_out)
    assert [order.text for order in orders] == ["Rain"] * 2 + ["Siren, Dog"] * 2
    assert [order.label for order in orders] == [2, 2, -1, -1]
    assert [order.index for order in orders] == [order.clip for order in orders] == [0, 1, 2, 3]


def test_every_sound_has_its_own_conditioning_and_seed(evaluation, monkeypatch):
    """And its share of the seconds that its batch took."""
    calls = remember_calls(evaluation, monkeypatch)
    seconds = iter([6.0, 5.0])
    monkeypatch.setattr(generator_evaluation, "timed", lambda function: (function(), next(seconds)))
    orders = [Order(number, None, 0, crop, clip=crop) for number, crop in enumerate([3, 1, 2])]
    rows = evaluation.measure_generated(orders)
    assert rows["seconds"].tolist() == [6.0, 2.5, 2.5]
    assert rows["clip"].tolist() == [3, 1, 2]
    # after a first one that isn't timed
    assert [call["input_ids"].flatten().tolist() for call in calls] == [[0], [0], [1, 2]]
    seeds = [[generator.initial_seed() for generator in call["generator"]] for call in calls]
    assert seeds == [[100], [100], [101, 102]]
    assert all(call["temperature"] == 0.5 and call["num_windows"] == 1 for call in calls)


def test_prompts_are_the_conditioning(evaluation):
    orders = [Order(number, text, -1, None, clip=number) for number, text in enumerate(["Rain", "Siren"])]
    assert evaluation.inputs_of(orders)["input_ids"].tolist() == [[2], [1]]


@torch.no_grad()
def test_guesses_of_held_out_sounds(evaluation):
    """Given their own labels, and the other one's of their batch; the last one is by itself."""
    rows = evaluation.measure_held_out()
    model, codes = evaluation.model, evaluation.model.codec_model.encode(evaluation.crops.sounds[:, None]).audio_codes
    labels = torch.arange(NUM_CROPS) % 3
    for name, conditioning in (("guesses", labels), ("neighbours_guesses", labels[[1, 0, 3, 2]])):
        logits = model(input_ids=conditioning[:, None], audio_codes=codes[: len(conditioning), 0]).logits
        own_codes = codes[: len(conditioning), 0]
        losses = torch.nn.functional.cross_entropy(logits.mT, own_codes, reduction="none").sum(1)
        sums = rows[name][: len(conditioning)].sum(1)
        torch.testing.assert_close(sums[:, 0], losses.double(), rtol=1e-5, atol=1e-5)
        assert torch.equal(sums[:, 1], (logits.argmax(-1) == own_codes).sum(1).double())
    assert rows["neighbours_guesses"][4].isnan().all() and rows["neighbours_guesses"][:4].isfinite().all()


@torch.no_grad()
def test_real_sounds_beside_generated_ones(evaluation):
    """The crop itself, and what the codec makes of it."""
    held_out = {"index": torch.tensor([1, 2]), "label": torch.tensor([1, 2])}
    codec, sound = evaluation.model.codec_model, evaluation.crops.sounds[2]
    title, sounds = real_sounds(evaluation, held_out, Order(0, "Rain", 2, None, clip=0))
    assert title == "Rain" and torch.equal(sounds["real"], sound)
    decoded = codec.decode(codec.encode(sound[None, None]).audio_codes).audio_values[0, 0]
    torch.testing.assert_close(sounds["reconstruction"], decoded)
    assert real_sounds(evaluation, held_out, Order(0, "Cat", 0, None, clip=0)) == ("Cat", {})


# --- systems ---------------------------------------------------------------------------------------------------------


def test_measurements_of_a_system(listeners, held_out, generated, build_codec, monkeypatch):
    """Distances are those of generated sounds, and shares by what they are of."""
    reconstructed = {"label": held_out["label"], "clip": CLIPS} | heard_rows("reconstruction", 1.0, [0, 1, 2, 1])
    reconstructed |= {name: torch.rand(4) for name in ("mel_distance", "stft_distance", "si_sdr_db")}
    monkeypatch.setattr(claims_measurements, "measure_reconstructions", lambda *_: reconstructed)
    codec = build_codec()
    evaluation = SimpleNamespace(
        **{"listeners": listeners, "crops": None, "measure_generated": lambda orders: generated},
        model=SimpleNamespace(config=SimpleNamespace(codec_config=codec.config), codec_model=codec),
    )
    figures = measure_system("small", evaluation, held_out, orders_of_crops(4))
    assert figures.frechet["ears"].value == pytest.approx(25.0)
    shares = {source: share.value for source, share in figures.named_rightly.items()}
    assert shares == {"generated": pytest.approx(1 / 3), "reconstruction": pytest.approx(2 / 3)}
    assert all(torch.equal(figures.codec[name], reconstructed[name]) for name in figures.codec)
    assert torch.equal(figures.clips, CLIPS)
    assert (figures.forward_passes, figures.tokens_per_second, figures.is_next_token) == (4, 13 / 0.08, False)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_systems_take_turns(monkeypatch, batch_size):
    """The first round doesn't count, and seconds are per sound."""
    made, elapsed = [], iter(range(100))
    monkeypatch.setattr(claims_measurements, "timed", lambda function: (function(), 8.0 * next(elapsed)))

    def system(name: str, seed: int) -> SimpleNamespace:
        return SimpleNamespace(
            seed=seed,
            inputs_of=lambda batch: [order.crop for order in batch],
            generate=lambda crops, seeds: made.append((name, crops, seeds)),
        )

    seconds = take_turns([system("first", 0), system("second", 50)], orders_of_crops(3), batch_size)
    assert [name for name, *_ in made] == (TIMED_ROUNDS + 1) * ["first", "second"]
    crops, places = [10, 11, 12, 10, 11, 12, 10, 11][:batch_size], [0, 1, 2, 0, 1, 2, 0, 1][:batch_size]
    assert made[0][1:] == (crops, places) and made[1][1:] == (crops, [50 + place for place in places])
    assert seconds == [[8.0 * number / batch_size for number in range(first, 12, 2)] for first in (2, 3)]
