"""Installation of adaptive-transformers: `pip install .` needs torch alone."""

import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import find_packages, setup

NAME = "adaptive-transformers"
IMPORT_NAMES = ("adaptive", "parallel", "launch")


def refuse_to_overwrite() -> None:
    """Stop where another distribution already owns one of our import names.

    Looks into the environment that is installed into: pip's isolated build does not see it on
    `sys.path`.
    """
    places = {*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for owner in distributions(path=[place for place in places if place]):
        if owner.metadata["Name"] == NAME:
            continue
        taken = {file.parts[0] for file in owner.files or []} & set(IMPORT_NAMES)
        if taken:
            raise SystemExit(
                f"{taken.pop()}: already installed by {owner.metadata['Name']}; "
                f"{NAME} brings a package of that name: use another environment"
            )


refuse_to_overwrite()

setup(
    name=NAME,
    version="0.1.0",
    description="Distributed training of sparse and adaptive-compute transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[f"{n}*" for n in IMPORT_NAMES]),
    install_requires=["torch>=2.11"],
    extras_require={
        "train": [
            "deepspeed>=0.19",
            "megatron-core>=0.16",
            "tensorboard>=2.20",
            "ninja",
            "pydantic>=2.11",
            "omegaconf>=2.3",
            "rich>=14",
            "safetensors>=0.5",
            "matplotlib>=3.10",
            "scikit-learn>=1.6",
            "pillow>=11",
        ],
        "gpu": ["triton>=3.6", "flash-attn>=2.7"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6",
            "liger-kernel>=0.8",
            "transformers>=5",
            "ruff>=0.14",
            "mypy>=1.18",
            "pre-commit>=4",
        ],
    },
)
