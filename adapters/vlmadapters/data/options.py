"""How the images of a dataset are read, and how many are tested: the options of every verb here."""

from __future__ import annotations

from pydantic import Field

from vlmlayers.options import ImageOptions


class ReadOptions(ImageOptions):
    """How images are read."""

    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that decode images, threads for few; by the machine if absent.",
    )


class DataOptions(ReadOptions):
    """How images are read, and how many of them test."""

    items: int = Field(default=0, ge=0, description="Test items per dataset, 0 for all.")
