"""scripts/reproduce_claims.py in its short form, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import SCRIPTS, Finished, Forked

from transformers_aar import SatConfig
from transformers_aar.evaluation.claims import ClaimsArguments
from transformers_aar.evaluation.claims_verdicts import BATCH_SIZES
from transformers_aar.training.arguments import parse_arguments, read_recipe

SHORT, FULL = (SCRIPTS / "configs" / name for name in ("claims_short.yaml", "claims.yaml"))
SYSTEMS = {"quadratic": (455, 16), "fewer_scales_stft": (88, 3), "plain_residual": (150, 150)}
TWO_SYSTEMS = ["quadratic", "plain_residual"]
COLUMNS = [
    *("system", "predicts", "tokens per second", "mel distance", "STFT distance", "SI-SDR (dB)"),
    *("Fréchet distance (log_mel)", "Fréchet distance (classifier)"),
    *("generated, named rightly", "reconstructed, named rightly", "forward passes"),
    *(f"seconds per clip, batch {size}" for size in BATCH_SIZES),
    *(f"times as fast as next-token, batch {size}" for size in BATCH_SIZES),
]


def start_short(folder: Path, run: Path, **options) -> Forked:
    """Starts the short form in a copy of this process; what is already in `run` is reused."""
    recipe = read_recipe(SHORT) | {"output_dir": str(run), "use_cpu": True} | options
    words = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in recipe.items()}
    return Forked("reproduce_claims.py", words, folder)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> tuple[Path, Finished]:
    run = tmp_path_factory.mktemp("claims") / "run"
    command = [sys.executable, SCRIPTS / "reproduce_claims.py", SHORT, "--output_dir", run, "--use_cpu", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return run, Finished(done.returncode, done.stdout, done.stderr)


def trained_files(run: Path) -> dict[Path, int]:
    """Every file but the report and the sounds' lists, with the time of its last change."""
    files = [path for path in run.rglob("*") if path.is_file() and path.parent not in (run, run / "sounds")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_table_and_verdicts(first_run):
    run, finished = first_run
    report = json.loads((run / "report.json").read_text())
    table = report["tables"]["Systems"]
    assert {row["system"]: (row["tokens per second"], row["forward passes"]) for row in table} == SYSTEMS
    assert [row["predicts"] for row in table] == ["scale by scale", "scale by scale", "token by token"]
    for row in table:
        assert list(row) == COLUMNS
        for name in ("mel distance", "STFT distance", "Fréchet distance (log_mel)", "Fréchet distance (classifier)"):
            assert 0 < row[name]["value"] and row[name]["low"] <= row[name]["value"] <= row[name]["high"]
        for name in ("generated, named rightly", "reconstructed, named rightly"):
            assert 0 <= row[name]["value"] <= 1
        assert all(row[name] > 0 for name in COLUMNS if "seconds per clip" in name)
    assert [table[-1][name] for name in COLUMNS[-2:]] == [1.0, 1.0]
    assert [sentence.split(":")[0].split(" ")[0] for sentence in report["conclusions"]] == [
        "Fewer",
        *2 * ["Next-scale"],
    ]
    assert report["figures"]["claims"]["value"] == 3
    assert (
        report["settings"]["embeddings"].startswith("log_mel 1 (")
        and "classifier " in report["settings"]["embeddings"]
    )
    # what is printed is what is written
    markdown = (run / "report.md").read_text()
    printed = [line for line in finished.stdout.splitlines() if line.startswith("| ")]
    assert len(printed) == 2 + len(SYSTEMS) and "\n".join(printed) in markdown
    for sentence in report["conclusions"]:
        assert sentence in finished.stdout and sentence in markdown


@pytest.mark.slow
def test_a_second_run_reuses_everything(first_run, tmp_path):
    """In a folder that has moved, too, and for fewer systems."""
    run = first_run[0].rename(first_run[0].with_name("moved"))
    try:
        before = trained_files(run)
        first = json.loads((run / "report.json").read_text())["tables"]["Systems"]
        systems = read_recipe(SHORT)["systems"]
        finished = start_short(tmp_path, run, systems={name: systems[name] for name in TWO_SYSTEMS}).wait()
        assert finished.status == 0, finished.stderr
        assert trained_files(run) == before
        second = json.loads((run / "report.json").read_text())["tables"]["Systems"]
    finally:
        run.rename(first_run[0])
    assert [row["system"] for row in second] == TWO_SYSTEMS
    untimed = [name for name in COLUMNS if "batch" not in name]
    kept = [row for row in first if row["system"] in TWO_SYSTEMS]
    assert [[row[name] for name in untimed] for row in kept] == [[row[name] for name in untimed] for row in second]


@pytest.mark.slow
def test_other_options_are_refused(first_run, tmp_path):
    """Which would mix trainings of different budgets in one table."""
    run, _ = first_run
    before = trained_files(run)
    generator = read_recipe(SHORT)["generator"] | {"max_steps": 30}
    finished = start_short(tmp_path, run, generator=generator).wait()
    assert finished.status == 1
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("Error: ")]
    assert f"{run / 'quadratic' / 'generator'} was made with another max_steps: " in line
    assert trained_files(run) == before


@pytest.mark.slow
def test_an_interrupted_run_goes_on(first_run, tmp_path):
    """In the middle of a codec's training."""
    sounds, run = first_run[0] / "sounds", tmp_path / "run"
    codec = read_recipe(SHORT)["codec"] | {"max_steps": 60}
    options = {"data_dir": str(sounds), "codec": codec}
    process = start_short(tmp_path, run, **options)
    log = run / "quadratic" / "codec" / "metrics.jsonl"
    while process.is_running() and not (log.is_file() and log.read_text()):
        time.sleep(0.05)
    process.kill(signal.SIGINT)
    finished = process.wait()
    assert finished.status == 1
    assert f"{run / 'quadratic' / 'codec'} isn't finished: the same command goes on" in finished.stderr
    assert list((run / "quadratic" / "codec").glob("checkpoint-*"))
    process = start_short(tmp_path, run, **options)
    while process.is_running() and "Going on after step " not in process.files[0].read_text():
        time.sleep(0.05)
    process.kill()
    assert "Going on after step " in process.wait().stdout


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"data_dir": "nowhere"}, "nowhere isn't a folder in AudioSet's layout"),
        ({"hours": 0}, "`hours` must be a positive number"),
        ({"codec": {"max_step": 3}}, "`max_step` is no option: the nearest is `max_steps`"),
        ({"codec": {"codec_config": {"scales": [1, 2, 4, 8, 16, 74]}}}, "The last of `scales` must be the 75 frames"),
        ({"sampling": {"temperature": -1}}, "`temperature` must be a positive number"),
        ({"systems": {"quadratic": {}}}, "`systems` must have one plain residual codec"),
        ({"systems": {"quadratic": {"max_steps": 9}}}, "`systems` gives quadratic a max_steps of its own"),
        ({"systems": {"../a": {}}}, "`systems` must have names of letters"),
        ({"generator": {"model_config": {"hiden_size": 64}}}, "`hiden_size` is no field of AarConfig"),
        ({"hour": 1}, "`hour` is no option: the nearest is `hours`"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    finished = start_short(tmp_path, tmp_path / "run", **changed).wait()
    assert finished.status in (1, 2)
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("Error: ")]
    assert message in line and "Traceback" not in finished.stderr
    assert not (tmp_path / "run" / "report.json").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    """Seconds are measured, of a process that has the machine to itself."""

    class Processes:
        num_processes = 2

        def __init__(self, **_):
            pass

    monkeypatch.setattr("transformers_aar.evaluation.claims.PartialState", Processes)
    from transformers_aar.evaluation.claims import reproduce_claims

    (args,) = parse_arguments([str(SHORT), "--output_dir", str(tmp_path)], ClaimsArguments)
    with pytest.raises(ValueError, match="in one process, since it measures seconds"):
        reproduce_claims(args)


@pytest.mark.parametrize("recipe", [SHORT, FULL], ids=["short", "full"])
def test_recipes_are_fair(tmp_path, recipe):
    """All systems see as many sounds in as many steps, and differ by their codec alone."""
    (args,) = parse_arguments([str(recipe), "--output_dir", str(tmp_path)], ClaimsArguments)
    budget = ("max_steps", "per_device_batch_size", "learning_rate", "seed")
    budgets = [[args.codec_options(name, "data").get(field) for field in budget] for name in args.systems]
    assert all(each == budgets[0] for each in budgets)
    assert [name for name in args.systems if args.is_next_token(name)] == ["plain_residual"]
    assert args.sampling["guidance_scale"] == 0


def test_schedules_of_the_full_form(tmp_path):
    (args,) = parse_arguments([str(FULL), "--output_dir", str(tmp_path)], ClaimsArguments)
    configs = {name: args.codec_config(name) for name in args.systems}
    tokens = {name: (config.num_scales, config.tokens_per_window) for name, config in configs.items()}
    assert tokens == {
        "quadratic": (16, 455),
        "linear": (16, 608),
        "fewer_scales": (8, 247),
        "stft_discriminator": (16, 455),
        "plain_residual": (10, 750),
    }
    assert configs["quadratic"].scales == SatConfig().scales
    assert configs["linear"].scales == [round(1 + 74 * scale / 15) for scale in range(16)]
    assert configs["fewer_scales"].scales == SatConfig().scales[1::2]
