"""The options of `search` and `validate`, for Python, the command line and study files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vlmadapters.data.options import DataOptions
from vlmadapters.protocols.options import RunOptions
from vlmlayers.options import Cli, Seeds, Several, at_key, one_of
from vlmlayers.placement import Amount, Placement

KINDS: dict[str, str] = {
    "paper": "the method's published placement (of MMA blocks 5–12 of 12 of both towers)",
    "all": "every block of both towers",
    "lower": "lower half of both towers",
    "upper": "upper half of both towers",
    "last": "the last block of both towers",
    "start": "every start block up to the last, both towers at equal relative depth",
    "single": "one block of each tower at equal relative depth",
    "random": "random blocks at the cost of the choice: as many in each tower, as many shared",
    "vision": "the chosen vision blocks only",
    "text": "the chosen text blocks only",
}
DEFAULT_KINDS = ("paper", "all", "lower", "upper", "last", "start", "random", "vision", "text")
Comparison = Literal["tuned", "given"]
Criterion = Literal["log_likelihood", "base_log_likelihood", "accuracy"]


def _amount(text: str) -> str:
    Amount.parse(text)
    return text


def _placements(given: Any) -> Any:
    """Return placements, of text, values or choices; one of them may stand alone."""
    several = given if isinstance(given, list | tuple) else [given]
    return None if given is None else tuple(map(_placement, several))


def _placement(place: Any) -> Placement:
    if isinstance(place, str):
        return Placement.parse(place)
    if isinstance(place, Placement):
        return place
    if not (hasattr(place, "vision") and hasattr(place, "text")):
        raise ValueError("a placement such as '5-12' or 'v5-12,t7-12', or a choice, is needed")
    placed = getattr(place, "placement", None)  # a choice's, with the amount of a search
    return placed if isinstance(placed, Placement) else Placement(place.vision, place.text)


Amounts = Several[Annotated[str, AfterValidator(at_key(_amount))]] | None
Kind = Annotated[str, one_of("kind of placement", KINDS)]


class FoldOptions(RunOptions):
    """What `search` and `validate` share."""

    shots: int | None = Field(
        default=None, ge=1, description="Items per class; the recipe's where absent."
    )
    amounts: Annotated[Amounts, Cli(repeated="AMOUNT")] = Field(
        default=None,
        description="Amount to try beside the recipe's, as in scale=0.3,epochs=15; multiples of it "
        "where absent.",
    )

    @property
    def given_amounts(self) -> list[Amount] | None:
        """The amounts to try, None where none were given."""
        return None if self.amounts is None else list(map(Amount.parse, self.amounts))


class SearchOptions(FoldOptions):
    """The options of `search`."""

    budget: float | None = Field(
        default=None,
        gt=0,
        description="Largest cost, in multiples of one full training; all where absent.",
    )
    placement: Annotated[
        Annotated[tuple[Any, ...], BeforeValidator(at_key(_placements))] | None,
        Cli(repeated="PLACE"),
    ] = Field(
        default=None,
        description="Blocks to try beside the default, as in 9-12; the usual ones where absent.",
    )
    criterion: Criterion = Field(
        default="log_likelihood",
        description="log_likelihood, base_log_likelihood or accuracy, held out.",
    )
    folds: int = Field(
        default=8, ge=2, description="Folds of each draw; more tell smaller differences."
    )
    novel: bool = Field(
        default=True, description="Hold out half of the base classes whole as well."
    )
    seeds: Seeds = Field(default=(1,), description="Seeds; 1 where absent.")


class ValidateOptions(FoldOptions, DataOptions):
    """The options of `validate`."""

    kinds: Several[Kind] = Field(
        default=DEFAULT_KINDS,
        min_length=1,
        description=f"Competitors: {', '.join(KINDS)}; all but single where absent.",
    )
    amount: Comparison = Field(
        default="tuned",
        description="tuned: each placement at its own amount, found on training shots, and at the "
        "recipe's beside it; given: at the recipe's alone, several times as fast.",
    )
    folds: int = Field(default=4, ge=2, description="Folds that amounts are tuned on.")
    reference: Annotated[str, one_of("reference", KINDS)] = Field(
        default="paper", description="Kind that the verdict compares with."
    )
    random_count: int = Field(default=3, ge=0, description="Random placements of equal size.")

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield what is of amounts that are not tuned, and of placements that are not drawn."""
        yield from super().idle()
        if self.amount == "given":
            for name in ("folds", "amounts"):
                yield name, "is of amounts that are tuned; amount given takes the recipe's"
        if "random" not in (*self.kinds, self.reference):
            yield "random_count", "is of the kind random, which is not among the kinds"
