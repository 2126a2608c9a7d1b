"""The package: a src layout, plus the model cards' folder as the resource package `transformers_aar.model_cards`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "train": ["pyyaml", "tensorboard"],
    "eval": ["evaluate", "torchmetrics"],
}
EXTRAS["dev"] = [*EXTRAS["train"], *EXTRAS["eval"], "peft", "pytest", "pytest-xdist", "ruff"]

setup(
    name="transformers-aar",
    version="0.1.0",
    description="Text-to-audio by next-scale prediction (SAT and AAR) for transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The transformers-aar authors",
    license="Apache-2.0",
    keywords="audio generation codec tokenizer autoregressive next-scale transformers pytorch",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    package_dir={"": "src", "transformers_aar.model_cards": "model_cards"},
    packages=[*find_packages("src"), "transformers_aar.model_cards"],
    package_data={
        "transformers_aar": ["pretrained/**"],
        "transformers_aar.data": ["audioset_classes.csv"],
        "transformers_aar.evaluation": ["pretrained_classifier/*"],
        # what `evaluate` loads: folders of one file each, no packages
        "transformers_aar.evaluation.metrics": ["*/*.py"],
        "transformers_aar.model_cards": ["*.md"],
    },
    install_requires=[
        "accelerate",
        "datasets>=4",
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "safetensors",
        "scipy",
        "soundfile",
        "tokenizers",
        "torch>=2.11",
        "torchaudio>=2.11",
        "tqdm",
        "transformers>=5.17",
        "typer>=0.29",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["transformers-aar = transformers_aar.cli:main"]},
)
