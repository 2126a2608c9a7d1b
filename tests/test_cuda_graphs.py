"""
Generation through CUDA graphs: later calls do what the recorded one did, with what they were given. There is no GPU
here: what takes a graph's place does the recorded operations again.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import recorded_graphs
import torch
from torch import nn
from transformers import CompileConfig
from transformers.utils import logging

from transformers_aar import AarPreviewStreamer, cuda_graphs_aar
from transformers_aar.compilation_aar import _COMPILED

# by the library's word for CUDA graphs, which is its default
CONFIG = CompileConfig(mode="reduce-overhead")


def random_embeds(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def on_graphs(monkeypatch):
    """As if the CPU had CUDA graphs; and passes that aren't compiled, which takes long."""
    monkeypatch.setattr(torch, "compile", lambda function, **arguments: function)
    monkeypatch.setattr(cuda_graphs_aar, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_graphs_aar, "record_graph", recorded_graphs.record_graph)
    monkeypatch.setattr(cuda_graphs_aar, "default_generator", lambda device: torch.default_generator)


@pytest.fixture
def model(build_generator, on_graphs):
    return build_generator().requires_grad_(False)


def draw(model, embeds: torch.Tensor, seeds: int | list[int] | None = 0, **arguments) -> dict:
    """All that one call returns, and the number that each generator would go on with."""
    if seeds is None:
        torch.manual_seed(5)
        generator = None
    elif isinstance(seeds, int):
        generator = torch.Generator().manual_seed(seeds)
    else:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = model.generate(
        **{"conditioning_embeds": embeds, "generator": generator, "return_dict_in_generate": True, **arguments}
    )
    generators = generator if isinstance(generator, list) else [generator]
    return dict(output) | {"next": torch.stack([torch.rand(1, generator=one) for one in generators])}


def assert_equal(output: dict, expected: dict) -> None:
    assert output.keys() == expected.keys()
    for name, value in expected.items():
        pairs = zip(output[name], value, strict=True) if isinstance(value, tuple) else [(output[name], value)]
        assert all(torch.equal(one, other) for one, other in pairs), name


def recorded(model) -> list:
    """The recorded calls of a model's scales, the oldest use first."""
    calls = _COMPILED[model].recorded._calls
    return [call.graph for key, call in calls.items() if key[0][0] != ("decode",)]


def count_passes(model) -> list[int]:
    """Counts calls of the transformer's passes, which a graph doesn't make."""
    passes, forward_scale = [], model.model.forward_scale

    def counting(*args):
        passes.append(1)
        return forward_scale(*args)

    model.model.forward_scale = counting
    return passes


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"seeds": None},
        {"seeds": [3, 4, 5]},
        {"do_sample": False, "seeds": None},
        {"guidance_scale": 0.0},
        {"output_scores": True, "output_logits": True, "top_k": 7, "top_p": 0.8, "temperature": 1.3},
        {"negative_conditioning_embeds": random_embeds(1, 9)},
        {"gumbel_smoothing": True},
        {"unguided_scales": 2, "max_scales": 3},
        {"audio_codes": torch.tensor([[[3, 1, 4]]])},
        {"num_windows": 5, "max_batch_rows": 4},
        {"num_return_sequences": 2, "seeds": [1, 2, 3, 4, 5, 6], "max_batch_rows": 4},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_later_calls_equal_those_without(model, arguments):
    """Bit for bit, with other conditionings and seeds than the recorded ones; and generators go on from there."""
    passes = count_passes(model)
    seeds = arguments.pop("seeds", 0)
    for shift in (0, 0, 1, 2):
        shifted = [seed + 10 * shift for seed in seeds] if isinstance(seeds, list) else seeds and seeds + shift
        embeds = random_embeds(3, shift)
        expected = draw(model, embeds, shifted, **arguments)
        passes.clear()
        assert_equal(draw(model, embeds, shifted, compile_config=CONFIG, **arguments), expected)
    assert passes == []


def test_given_codes_are_no_constants(model):
    for codes in ([[[3, 1, 4]]], [[[0, 15, 2]]]):
        codes = torch.tensor(codes)
        expected = draw(model, random_embeds(2), audio_codes=codes)
        output = draw(model, random_embeds(2), audio_codes=codes, compile_config=CONFIG)
        assert_equal(output, expected)
        assert torch.equal(output["audio_codes"][..., :3], codes.expand(2, -1, -1))
    assert len(recorded(model)) == 1


def test_what_is_returned_stays(model):
    """The next call writes to the graph's memory, not to what was returned before."""
    first = draw(model, random_embeds(2), output_logits=True, compile_config=CONFIG)
    kept = {name: value for name, value in first.items()}
    copies = {
        name: tuple(part.clone() for part in value) if isinstance(value, tuple) else value.clone()
        for name, value in first.items()
    }
    draw(model, random_embeds(2, 7), seeds=8, output_logits=True, compile_config=CONFIG)
    assert_equal(kept, copies)


def test_settings_and_shapes_have_graphs_of_their_own(model, monkeypatch):
    """And only so many of them are kept: those that were used last."""
    monkeypatch.setattr(cuda_graphs_aar, "_MAX_CALLS", 4)
    several = [
        *({"guidance_scale": 2.0}, {"guidance_scale": 3.0}, {"top_k": 3}, {"embeds": random_embeds(3)}),
        *({"guidance_scale": 0.0}, {"guidance_scale": 2.0}, {"max_scales": 2}),
    ]
    for arguments in several:
        arguments = dict(arguments)
        embeds = arguments.pop("embeds", random_embeds(2))
        expected = draw(model, embeds, **arguments)
        assert_equal(draw(model, embeds, compile_config=CONFIG, **arguments), expected)
        assert len(_COMPILED[model].recorded._calls) <= 4


@pytest.mark.parametrize("change", ["in place", "of codec", "dtype", "data", "replaced", "copied"])
def test_changed_weights_are_recorded_anew(model, change):
    """A graph knows places of weights, and what the codec made of its own once."""
    draw(model, random_embeds(2), compile_config=CONFIG)
    before = recorded(model)
    if change == "in place":
        model.lm_head.weight.neg_()
    elif change == "of codec":
        for parameter in model.codec_model.decoder.parameters():
            parameter.mul_(1.1)
    elif change == "dtype":
        model.to(torch.bfloat16)
    elif change == "data":
        model.lm_head.weight.data = -model.lm_head.weight.data
    elif change == "replaced":
        model.lm_head = nn.Linear(64, 16)
    else:
        model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()})
    expected = draw(model, random_embeds(2))
    for _ in range(2):
        assert_equal(draw(model, random_embeds(2), compile_config=CONFIG), expected)
    assert len(recorded(model)) == 1 and recorded(model) != before


def test_training_between_calls(model):
    """Fused optimizers change weights without a trace, which a graph must read, and not what was made of them once."""
    draw(model, random_embeds(2), compile_config=CONFIG)
    decoder = model.codec_model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        expected = draw(model, random_embeds(2))
        assert_equal(draw(model, random_embeds(2), compile_config=CONFIG), expected)
        model.codec_model.decode(expected["audio_codes"]).audio_values.square().sum().backward()
        optimizer.step()
    assert recorded(model)[0].num_replays == 3


def test_what_is_made_once_is_not_made_in_graphs(model):
    """Folded weights of the codec, in particular, would be lost with the graph's memory."""
    draw(model, random_embeds(2), compile_config=CONFIG)
    operations = {str(step[0]) for call in _COMPILED[model].recorded._calls.values() for step in call.graph.steps}
    assert "aten.convolution.default" in operations
    assert not any("weight_norm" in operation for operation in operations)


def test_calls_with_a_streamer_are_not_recorded(model):
    """And a call inside one disturbs neither it nor what is recorded."""
    sounds = []

    def on_preview(num_scales: int, sound: torch.Tensor) -> None:
        sounds.append(sound)
        draw(model, random_embeds(2, 3), seeds=num_scales, compile_config=CONFIG)

    expected = draw(model, random_embeds(2))
    streamer = AarPreviewStreamer(model.codec_model, on_preview)
    for _ in range(2):
        assert_equal(draw(model, random_embeds(2), streamer=streamer, compile_config=CONFIG), expected)
        assert_equal(draw(model, random_embeds(2), compile_config=CONFIG), expected)
    assert len(sounds) == 8 and torch.equal(sounds[-1], expected["audio"])


def test_threads_take_turns(model):
    def work(seed: int) -> dict:
        return draw(model, random_embeds(2, seed), seeds=seed, compile_config=CONFIG)

    expected = [draw(model, random_embeds(2, seed), seeds=seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for output, other in zip(pool.map(work, range(6)), expected, strict=True):
            assert_equal(output, other)
    assert len(recorded(model)) == 1


def test_inference_mode_and_outside(model):
    expected = draw(model, random_embeds(2))
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert_equal(draw(model, random_embeds(2), compile_config=CONFIG), expected)
    assert recorded(model)[0].num_replays == 3


def test_autocast(model):
    """Its copies of weights are made in the graph, since they are gone when the next call comes."""
    model.model.requires_grad_(True)
    for seed in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = draw(model, random_embeds(2), seeds=seed)
            assert_equal(draw(model, random_embeds(2), seeds=seed, compile_config=CONFIG), expected)
    operations = [str(step[0]) for step in recorded(model)[0].steps]
    weight = model.model.layers[0].modulation.weight
    copied = [step for step in recorded(model)[0].steps if "_to_copy" in str(step[0]) and step[1][0] is weight]
    assert "aten._to_copy.default" in operations and len(copied) > 0


def one_generator_twice(model) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"generator": [generator, generator]}


def generator_elsewhere(model) -> dict:
    cuda_graphs_aar._DEVICE_TYPE = "cuda"  # where the CPU's draws can't be in a graph
    return {}


def adapters(model) -> dict:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    return {}


def weights_of_inference_mode(model) -> dict:
    with torch.inference_mode():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    return {}


@pytest.mark.parametrize(
    "hindrance",
    [one_generator_twice, generator_elsewhere, adapters, weights_of_inference_mode],
    ids=lambda it: it.__name__,
)
def test_what_cannot_be_recorded_runs_without(model, hindrance):
    arguments = [hindrance(model) for _ in range(2)] if hindrance is one_generator_twice else [hindrance(model)] * 2
    expected = draw(model, random_embeds(2), **arguments[0])
    assert_equal(draw(model, random_embeds(2), compile_config=CONFIG, **arguments[1]), expected)
    assert recorded(model) == []


def test_without_the_word_nothing_is_recorded(model):
    draw(model, random_embeds(2), compile_config=CompileConfig(mode="default"))
    assert _COMPILED[model].recorded is None


def test_generation_goes_on_where_recording_fails(model, monkeypatch, caplog):
    """With the same result, and one warning that names the reason."""

    def record_graph(function, *arguments):
        function()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(cuda_graphs_aar, "record_graph", record_graph)
    expected = draw(model, random_embeds(2))
    logging.enable_propagation()
    outputs = [draw(model, random_embeds(2), compile_config=CONFIG) for _ in range(2)]
    logging.disable_propagation()
    for output in outputs:
        assert_equal(output, expected)
    messages = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert messages == [
        "Recording a CUDA graph failed, so generation goes on without it (RuntimeError: CUDA error: operation not "
        "permitted when stream is capturing)."
    ]


def test_nothing_is_read_back_in_a_graph():
    """What stands for a graph refuses what a GPU's would."""
    with pytest.raises(RuntimeError, match="not permitted"), recorded_graphs.RecordedGraph():
        torch.ones(2).sum().item()
