"""Training steps and validations beside the same written out by hand, in float64."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformers_aar.training.aar_training import AarStage, collate_generation_examples, num_draws
from transformers_aar.training.arguments import AarArguments, LoopArguments, SatArguments
from transformers_aar.training.discriminators import AudioDiscriminator
from transformers_aar.training.loop import make_accelerator
from transformers_aar.training.losses import MelLoss, relative_error
from transformers_aar.training.sampling import ExampleStream, ValidationSet
from transformers_aar.training.sat_training import SatStage, collate_crops

MAX_STEPS = 6
# the cosine schedule's share of the peak rate: halfway up the warm-up, at the peak, and a third of the way down
FACTORS = {1: 0.005 + 0.995 / 2, 2: 1.0, 3: 0.01 + 0.99 * 0.75}
LOOP = {
    **{"learning_rate": 1e-2, "lr_schedule": "cosine", "warmup_share": 2 / MAX_STEPS, "max_grad_norm": 1e-3},
    **{"per_device_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": "unused", "use_cpu": True},
}
BATCH_SIZE = 4


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Examples(list):
    """A dataset by `(epoch, index)`."""

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return super().__getitem__(key[1])


def make_data(examples: list[dict], collate: Callable) -> tuple:
    """What a stage takes besides settings and models; the validation has batches of different sizes."""
    loop = LoopArguments(**LOOP)
    accelerator = make_accelerator(loop)
    stream = ExampleStream(Examples(examples), collate, loop, accelerator, num_workers=0)
    return accelerator, loop, (stream, ValidationSet(Examples(examples[:3]), collate, 3, 2, accelerator), MAX_STEPS)


def take_steps(stage) -> None:
    loader = iter(stage.stream.loader(range(min(FACTORS), max(FACTORS) + 1)))
    for step in FACTORS:
        stage.step([next(loader), next(loader)], step)


class Adam:
    """Kingma and Ba 2015 (arXiv 1412.6980, algorithm 1), of clipped gradients and with decoupled weight decay."""

    def __init__(self, module: nn.Module, betas: list[float]):
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.betas = betas
        self.means = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.squares = copy.deepcopy(self.means)
        self.num_steps = 0

    def step(self, loss: torch.Tensor, factor: float, rate: float, decay: Callable[[str], float] = lambda _: 0.0):
        gradients = torch.autograd.grad(loss, [*self.parameters.values()], materialize_grads=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 2 * LOOP["max_grad_norm"]  # else clipping would make no difference
        self.num_steps += 1
        first, second = self.betas
        for (name, parameter), gradient in zip(self.parameters.items(), gradients):
            clipped = gradient * LOOP["max_grad_norm"] / (norm + 1e-6)  # as PyTorch clips
            mean = self.means[name] = first * self.means[name] + (1 - first) * clipped
            square = self.squares[name] = second * self.squares[name] + (1 - second) * clipped**2
            root = (square / (1 - second**self.num_steps)).sqrt()
            change = mean / (1 - first**self.num_steps) / (root + 1e-8) + decay(name) * parameter.data
            parameter.data -= factor * rate * change


def assert_same_weights(module: nn.Module, expected: nn.Module) -> None:
    weights, expected_weights = module.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")  # noqa: B023


# --- SAT -------------------------------------------------------------------------------------------------------------

WEIGHTS = {"adversarial": 3.0, "feature": 2.0, "wave": 0.1, "mel": 0.7, "commitment": 1.5}
START_EXAMPLES = 12


@pytest.fixture
def sat_stage(build_codec) -> SatStage:
    codec = build_codec(dead_code_threshold=0.0).double()
    codec.quantizer.initialized.fill_(False)
    discriminators = {"stft": {"n_ffts": [256, 128], "num_filters": 2}}
    args = SatArguments(
        loss_weights=WEIGHTS,
        discriminators=discriminators,
        discriminator_learning_rate=4e-3,
        discriminator_skip_interval=3,
        codebook_start_examples=START_EXAMPLES,
    )
    noise = torch.randn(16, 1, codec.config.window_length, generator=torch.Generator().manual_seed(1))
    examples = [{"waveforms": [0.3 * sound], "name": "noise", "skipped": []} for sound in noise]
    accelerator, loop, data = make_data(examples, collate_crops)
    torch.manual_seed(0)
    return SatStage(accelerator, args, loop, codec, AudioDiscriminator(discriminators), *data)


def test_steps_of_sat(sat_stage):
    """A warm-up step whose codebooks start from more than a batch, one at the peak, and one without adversary's."""
    codec, discriminator = copy.deepcopy(sat_stage.codec), copy.deepcopy(sat_stage.discriminator)
    stream, mel_loss = sat_stage.stream, MelLoss(codec.config.sampling_rate)
    own_optimizer, other_optimizer = Adam(codec, [0.5, 0.9]), Adam(discriminator, [0.5, 0.9])
    take_steps(sat_stage)

    codec.start_codebooks(stream.read(range(BATCH_SIZE, BATCH_SIZE + START_EXAMPLES))["input_values"])
    codec.quantizer.cluster_size *= BATCH_SIZE / START_EXAMPLES
    codec.quantizer.codebook_sum *= BATCH_SIZE / START_EXAMPLES
    for step, factor in FACTORS.items():
        real = stream.read(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))["input_values"]
        output = codec(real, return_dict=True)
        fake = output.audio_values
        judged, expected = discriminator(fake), discriminator(real)
        distances = [
            (ours - theirs.detach()).abs().mean() / theirs.detach().abs().mean()
            for ours, theirs in zip(sum(judged.features, []), sum(expected.features, []))
        ]
        losses = {
            "adversarial": sum((1 - logits).relu().mean() for logits in judged.logits) / 2,
            "feature": sum(distances) / len(distances),
            "wave": (fake - real).abs().mean(),
            "mel": mel_loss(fake, real),
            "commitment": output.commitment_loss,
        }
        own_optimizer.step(sum(WEIGHTS[name] * loss for name, loss in losses.items()), factor, rate=1e-2)
        if step != 3:
            pairs = zip(discriminator(real).logits, discriminator(fake.detach()).logits)
            loss = sum((1 - right).relu().mean() + (1 + wrong).relu().mean() for right, wrong in pairs) / 2
            other_optimizer.step(loss, factor, rate=4e-3)
    assert_same_weights(sat_stage.codec, codec)
    assert_same_weights(sat_stage.discriminator, discriminator)


@torch.no_grad()
def test_validation_of_sat(sat_stage):
    """Means over the sounds, not over batches."""
    codec, sounds = sat_stage.codec, [example["waveforms"][0][None] for example in sat_stage.stream.dataset][:3]
    figures = sat_stage.validate()
    codec.eval()
    decoded = [codec.decode(codec.encode(sound).audio_codes).audio_values for sound in sounds]
    measures = {"l1": F.l1_loss, "mel": MelLoss(codec.config.sampling_rate), "relative_error": relative_error}
    for name, measure in measures.items():
        values = [measure(fake, real).item() for fake, real in zip(decoded, sounds)]
        assert figures[name] == pytest.approx(sum(values) / 3, rel=1e-6)


# --- AAR -------------------------------------------------------------------------------------------------------------

LABELS = ["Dog", "Siren", "Rain"]
BETAS = [0.8, 0.9]
EMA_DECAY = 0.75


@pytest.fixture
def aar_stage(build_generator) -> AarStage:
    fields = {"conditioning": "label", "labels": LABELS, "conditioning_dropout": 0.3, "drop_path_rate": 0.3}
    generator = build_generator(adaln="shared", **fields).double()
    random = torch.Generator().manual_seed(1)
    examples = [
        {
            "codes": torch.randint(16, (generator.config.num_slots,), generator=random),
            "labels": [number % 3, (number + 1) % 3][: 1 + number % 2],
            "draws": torch.rand(num_draws(generator.config.num_hidden_layers), generator=random),
            **{"name": "codes", "skipped": []},
        }
        for number in range(16)
    ]
    accelerator, loop, data = make_data(examples, partial(collate_generation_examples, conditioning="label"))
    settings = {"adam_betas": BETAS, "weight_decay": 0.5, "final_weight_decay": 0.1, "ema_decay": EMA_DECAY}
    args = AarArguments(codec="unused", model_config={"conditioning": "label"}, **settings)
    return AarStage(accelerator, args, loop, generator, None, *data)


def test_steps_of_aar(aar_stage):
    """And the average of the weights after them."""
    generator, stream = copy.deepcopy(aar_stage.generator), aar_stage.stream
    optimizer = Adam(generator, BETAS)
    average = {name: value.detach().clone() for name, value in optimizer.parameters.items()}
    take_steps(aar_stage)

    for step, factor in FACTORS.items():
        decay = 0.1 + 0.4 * (0.5 + 0.5 * math.cos(math.pi * step / (MAX_STEPS - 1)))
        inputs = stream.read(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))["inputs"]
        loss = F.cross_entropy(generator(**inputs).logits.flatten(0, 1), inputs["audio_codes"].flatten())
        optimizer.step(loss, factor, 1e-2, lambda name: decay * decays(name, optimizer.parameters[name]))  # noqa: B023
        for name, value in optimizer.parameters.items():
            average[name] = EMA_DECAY * average[name] + (1 - EMA_DECAY) * value.detach()
    assert_same_weights(aar_stage.generator, generator)
    assert aar_stage.average.average.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(aar_stage.average.average[name], value, rtol=1e-9, atol=1e-9)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weights of linear layers and embeddings of labels do, not tables that are added to every input."""
    tables = ("positions", "start_position", "levels.weight", "modulation_offset")
    return parameter.ndim > 1 and not name.endswith(tables)


def test_validation_of_aar(aar_stage):
    """Means over all tokens and over those of a scale, of the averaged weights."""
    take_steps(aar_stage)
    figures = aar_stage.validate()
    generator, scales = copy.deepcopy(aar_stage.generator).eval(), aar_stage.generator.config.codec_config.scales
    generator.load_state_dict(aar_stage.average.average, strict=False)
    inputs = aar_stage.stream.collate(list(aar_stage.stream.dataset)[:3])["inputs"]
    codes = inputs["audio_codes"]
    logits = generator(**inputs).logits.detach()
    losses, right = F.cross_entropy(logits.mT, codes, reduction="none"), (logits.argmax(-1) == codes).double()
    expected = {"loss": losses.mean(), "accuracy": right.mean()}
    for scale, parts in enumerate(zip(losses.split(scales, dim=1), right.split(scales, dim=1))):
        expected |= {f"loss/{scale}": parts[0].mean(), f"accuracy/{scale}": parts[1].mean()}
    assert right.any()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value.item(), rel=1e-6)
