"""The options of whatever trains, defined once for Python, the command line and study files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlmadapters.data.options import DataOptions, ReadOptions
from vlmadapters.protocols.table import PROTOCOLS
from vlmlayers.options import Seeds, one_of


class RunOptions(ReadOptions):
    """What every run of trainings takes."""

    seeds: Seeds = Field(default=(1, 2, 3), description="Seeds; 1,2,3 where absent.")
    together: int = Field(default=12, ge=1, description="Settings trained side by side.")


class TrainOptions(RunOptions, DataOptions):
    """The options of `train`."""

    protocol: Annotated[str, one_of("protocol", PROTOCOLS)] = Field(
        default="base-to-novel",
        description="base-to-novel, few-shot, cross-dataset or domain-generalization.",
    )
