"""What is extracted with which weights: options of Python, the command line and study files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vlmlayers.arguments import Precision
from vlmlayers.errors import UserError
from vlmlayers.options import ImageOptions, Options, Several, at_key, one_of
from vlmlayers.positions import POOLINGS, SPACES, TOKENS, TOWERS, check_space

Tower = Annotated[str, one_of("tower", TOWERS)]
BOTH_TOWERS = "streaming sums both towers; extract the features of one, and score them"


def _of_each_tower(given: Any) -> Any:
    """Return the pooling of each tower, of words such as `mean` or `vision=cls`, or of a table."""
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        return {} if given is None else given  # a table, or what is none
    pairs = [word.partition("=")[::2] if "=" in word else ("", word) for word in words]
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("names two poolings of one tower; name one, or vision=cls and text=mean")
    both = {tower: name for key, name in pairs if not key for tower in TOWERS}
    return both | {tower: name for tower, name in pairs if tower}


class RecordOptions(ImageOptions):
    """How features are recorded."""

    text: Literal["prompts", "captions"] = Field(
        default="prompts", description="prompts or captions."
    )
    tower: Tower | None = Field(default=None, description="vision or text; both where absent.")
    spaces: Several[Annotated[str, AfterValidator(at_key(check_space))]] = Field(
        default=("native", "joint"),
        min_length=1,
        description="native, normed, joint, attention_entropy, attention_distance; native and "
        "joint where absent.",
    )
    pooling: Annotated[
        dict[Tower, Annotated[str, one_of("pooling", (*POOLINGS, TOKENS))]],
        BeforeValidator(_of_each_tower),
    ] = Field(
        default={},
        description="cls, eot, mean, or tokens for every token of a few items; vision=mean for one "
        "tower; each tower's own where absent.",
    )
    precision: Precision = Field(default="fp32", description="auto, fp32, tf32, bf16 or fp16.")
    decoding: Literal["full", "reduced", "nvjpeg"] = Field(
        default="full",
        description="full; reduced: large JPEGs at 1/2, 1/4 or 1/8; nvjpeg: on the GPU.",
    )
    batch_size: int = Field(default=64, ge=1, description="Items per forward pass.")
    workers: int | None = Field(
        default=None, ge=0, description="Decoding processes; what the machine has where absent."
    )

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield what is of the tower that is not recorded."""
        if self.tower == "vision":
            yield "text", "says what texts are; tower='vision' records none"
        if self.tower == "text":
            yield "decoding", "is of images; tower='text' records none"
            yield "skip_unreadable", "is of images; tower='text' records none"
            yield "workers", "decode images; tower='text' records none"
        if self.tower is not None and self.tower not in self.pooling:
            yield "pooling", f"is of another tower; tower={self.tower!r} alone is recorded"


def check_streamable(options: RecordOptions) -> None:
    """Refuse what sums cannot hold.

    Raises:
        UserError: One tower alone, tokens, or a space of attention is recorded.
    """
    if not {*options.spaces} <= {*SPACES} or TOKENS in options.pooling.values():
        raise UserError(
            "streaming sums one vector per item: without pooling='tokens' and attention spaces; "
            "store those with extract(…, out=)"
        )
    if options.tower is not None:
        raise UserError(BOTH_TOWERS)


def _numbers(given: Any) -> Any:
    """Return the numbers of a text such as 0.5,0.5,0.5; anything else as it is."""
    try:
        return tuple(map(float, given.split(","))) if isinstance(given, str) else given
    except ValueError:
        raise ValueError(f"{given!r} is not three numbers such as 0.5,0.5,0.5") from None


Channels = Annotated[float | tuple[float, ...], BeforeValidator(_numbers)]


def _sides(given: Any) -> Any:
    """Return the parts of a text such as 224,160; anything else as it is."""
    return tuple(given.split(",")) if isinstance(given, str) and "," in given else given


Sides = Annotated[int | tuple[int, int], BeforeValidator(_sides)]


class WeightsOptions(Options):
    """Which weights a model gets, how images are prepared for them, and at what size."""

    pretrained: str | None = Field(default=None, description="Tag, or a file of weights.")
    random_weights: bool = Field(
        default=False, description="An untrained model; every output says so."
    )
    like: str | None = Field(default=None, description="Tag that a file was trained like.")
    mean: Channels | None = Field(
        default=None, description="Mean of the channels, as in 0.5,0.5,0.5, for a file."
    )
    std: Channels | None = Field(default=None, description="Their standard deviation, likewise.")
    interpolation: str | None = Field(default=None, description="bicubic or bilinear.")
    resize_mode: str | None = Field(default=None, description="shortest, longest or squash.")
    image_size: Sides | None = Field(
        default=None,
        description="Side of the images, or height and width as in 224,160, where it is not the "
        "model's own.",
    )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `load_model` that were given."""
        # `load_model` refuses what does not apply to a model, so what was not given stays out.
        return self.model_dump(exclude_defaults=True)
