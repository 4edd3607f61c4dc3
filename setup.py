"""Which packages are installed, and where they must not be; all else is in pyproject.toml."""

import sys
import sysconfig
from importlib.metadata import distributions

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
    # Recipes lie at the top of a checkout; installed, in a package that nobody else has.
    packages=[*find_packages(include=[f"{n}*" for n in IMPORT_NAMES]), "launch.recipes"],
    package_dir={"launch.recipes": "recipes"},
    package_data={
        **{name: ["py.typed"] for name in IMPORT_NAMES},
        "launch.recipes": ["*.yaml", "deepspeed/*.json"],
    },
    include_package_data=False,
)
