"""A race: it picks what its folds bear out, and never costs more than its budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.validation.judge import SEARCH_COLUMNS, difference
from vlmadapters.validation.race import Race
from vlmadapters.validation.search import _answer
from vlmadapters.validation.tuning import tune
from vlmlayers.placement import Amount


@dataclass(frozen=True)
class Setting:
    """What a race asks of a setting."""

    label: str


@dataclass
class Planted:
    """A track on which the log-likelihood and cost of each setting are given.

    Attributes:
        gains: Of each setting in each fold.
        costs: Of one fold of each setting.
        rounds: Number of folds.
        wild: Settings that diverge, and in which fold.
        novel: Accuracy on novel classes; that on base classes is the gain turned round.
    """

    gains: dict[str, list[float]]
    costs: dict[str, float]
    rounds: int
    wild: dict[str, int] = field(default_factory=dict)
    novel: float = np.nan
    ran: dict[tuple[str, int], str] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)

    def price(self, setting: Any, number: int) -> float:
        return 0.0 if (setting.label, number) in self.ran else self.costs[setting.label]

    logit_scale = 100.0

    def steps(self, setting: Any) -> float:
        return self.costs[setting.label]

    @property
    def cost(self) -> float:
        return sum(self.costs[name] for name, _ in self.ran)

    def run(self, stage: str, needed: Any, rivals: Any, number: int) -> None:
        for one in [*needed, *rivals]:
            if self.wild.get(one.label) == number:
                self.diverged[one.label] = "it diverged"
            elif one.label not in self.diverged:
                self.ran.setdefault((one.label, number), stage)

    @property
    def table(self) -> pd.DataFrame:
        # Accuracies say the opposite, so that what is compared by them shows.
        ran = dict(self.ran)
        if "zero-shot" in self.gains:
            ran |= {("zero-shot", fold): "zero-shot" for _, fold in self.ran}
        rows = [
            (stage, "d", 1, fold, 0.25, name, -gain, self.novel, gain, np.nan, 1, 0.0)
            for (name, fold), stage in ran.items()
            for gain in [self.gains[name][fold - 1]]
        ]
        return pd.DataFrame(rows, columns=list(SEARCH_COLUMNS))


def planted(seed: int, rounds: int, rivals: int = 6) -> tuple[Planted, list[Any]]:
    generator, noise = np.random.default_rng(seed), (0.01, 0.3)[seed % 2]
    names = ["default", *(f"rival {one}" for one in range(rivals))]
    gains = {
        name: list(generator.normal(shift, noise, rounds))
        for name, shift in zip(names, generator.normal(0, 0.7, rivals + 1))
    }
    costs = dict(zip(names, generator.choice([0.25, 0.5, 1.0, 4.0], rivals + 1)))
    return Planted(gains, costs, rounds), [Setting(name) for name in names]


def by_hand(track: Planted, names: list[str], rounds: int) -> dict[str, int]:
    """Return how many folds each rival runs in: the better half of those alive goes on."""
    folds = dict.fromkeys(names, 1)
    for done in range(1, rounds):
        alive = [one for one in names if folds[one] == done]
        alive.sort(key=lambda one: np.mean(track.gains[one][:done]), reverse=True)
        for one in alive[: -(-len(alive) // 2)]:
            folds[one] += 1
    return folds


@pytest.mark.parametrize("rivals", [1, 5, 6])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_the_better_half_goes_on_and_the_best_wins_where_it_is_better_beyond_doubt(
    rounds: int, rivals: int
) -> None:
    picked = set()
    for seed in range(20):
        track, (default, *others) = planted(seed, rounds, rivals)
        race = Race(track, "log_likelihood")  # type: ignore[arg-type]
        pick = race.run("amount", default, [default, *others])
        names = [one.label for one in others]
        expected = by_hand(track, names, rounds)
        ran = track.table["setting"].value_counts().to_dict()
        assert ran == {"default": rounds, **expected}
        last = [one for one in names if expected[one] == rounds]
        best = max(last, key=lambda one: np.mean(track.gains[one]))
        (heat,) = race.heats
        assert (heat.stage, heat.default, heat.rivals, heat.best) == (
            "amount", "default", tuple(names), best,
        )  # fmt: skip
        assert heat.difference == difference(track.table, best, "default", "log_likelihood")
        surely = heat.difference.low > 0
        assert pick.label == heat.pick == (best if surely else "default")
        said = heat.to_dict()
        assert (said["rivals"], said["best"], said["pick"]) == (names, best, heat.pick)
        assert not race.skipped
        picked.add(pick is default)
    assert picked == {True, False}


@pytest.mark.parametrize("rounds", [2, 4])
def test_two_heats_never_cost_more_than_their_budget_and_need_not_leave_more_out(
    rounds: int,
) -> None:
    fitting = 0
    for seed in range(40):
        track, (default, *others) = planted(seed, rounds)
        limit = float(np.random.default_rng(seed).uniform(2, 30))
        race = Race(track, "log_likelihood")  # type: ignore[arg-type]
        race.run("amount", default, others[:4], limit / 2)
        assert track.cost <= limit / 2 + 1e-9
        left = limit - track.cost
        race.run("placement", default, others[2:], left)
        assert track.cost <= limit + 1e-9
        # The whole of a heat is left out for its budget only where no rival fits it alone.
        cheapest = rounds * (track.costs["default"] + min(track.costs[o.label] for o in others[:4]))
        assert ("amount" in {heat.stage for heat in race.heats}) == (cheapest <= limit / 2 + 1e-9)
        for one in race.skipped:
            assert one["why"] == "budget"
        fitting += len(race.heats)
    assert 20 < fitting < 80


def test_left_out_is_what_ran_in_no_heat_or_diverged_each_setting_once() -> None:
    """A placement that the amount heat had no budget for ran in the next, and was "left out"."""
    gains = {"a": 0.0, "b": 1.0, "again": 2.0, "dear": 0.5, "wild": 0.7}
    track = Planted(
        {name: [gain, 1.01 * gain] for name, gain in gains.items()},
        {"a": 0.25, "b": 0.25, "again": 1.0, "dear": 9.0, "wild": 0.25},
        2,
        {"wild": 1},
    )
    a, b, again, dear, wild = map(Setting, gains)
    race = Race(track, "log_likelihood")  # type: ignore[arg-type]
    assert race.run("amount", a, [b, wild, again, dear], 1.5) is b
    assert [one["setting"] for one in race.left_out] == ["again", "dear", "wild"]
    # What has diverged takes none of the budget, which is that of `again` alone.
    assert race.run("placement", b, [wild, again, dear], 2.0) is again
    assert {one["setting"]: one["why"] for one in race.left_out} == {
        "dear": "budget", "wild": "it diverged",
    }  # fmt: skip
    assert len(race.left_out) == 2


def test_folds_of_few_items_that_end_alike_decide_nothing() -> None:
    """One more right answer of 8 in both folds was an advantage of 12.5 [12.5, 12.5]."""
    track = Planted({"a": [-50.0, -75.0], "b": [-62.5, -87.5]}, {"a": 0.25, "b": 0.25}, 2)
    a, b = map(Setting, track.gains)
    race = Race(track, "accuracy")  # type: ignore[arg-type]
    assert race.run("amount", a, [b]) is a
    found = race.heats[0].difference
    assert (found.mean, found.low, found.decided) == (12.5, 0.0, False)
    assert found.among(3)[0] < 0


def test_what_dropped_out_of_one_heat_is_dear_in_the_next() -> None:
    """A heat priced at 0.5 full trainings took 4.25: the rival that won had run in one fold."""
    gains = {"a": 0.0, "b": 2.0, "dear": 1.0, "c": 0.5}
    track = Planted(
        {name: [gain, gain + 0.01] for name, gain in gains.items()},
        {"a": 0.25, "b": 0.25, "dear": 4.0, "c": 0.25},
        2,
    )
    a, b, dear, c = map(Setting, gains)
    race = Race(track, "log_likelihood")  # type: ignore[arg-type]
    race.run("amount", a, [b, dear])
    assert ("dear", 2) not in track.ran
    before = track.cost
    assert race.price(b, [dear, c]) == 0.25 + 4
    race.run("placement", b, [dear, c], 1.0)
    assert track.cost - before <= 1.0


def test_a_rival_that_is_too_dear_does_not_take_those_behind_it_out() -> None:
    """A budget of 3 was said to allow no comparison, though one with the second rival takes 1."""
    track = Planted(
        {"a": [0, 0], "dear": [9, 9], "b": [1, 1.1], "c": [2, 2.1], "d": [3, 3]},
        {"a": 0.25, "dear": 4.0, "b": 0.25, "c": 0.25, "d": 0.25},
        2,
    )
    default, *rivals = map(Setting, track.costs)
    race = Race(track, "log_likelihood")  # type: ignore[arg-type]
    assert race.run("placement", default, rivals, 1.25).label == "c"
    assert track.cost == 1.25 and race.heats[0].rivals == ("b", "c")
    assert [tuple(one.values()) for one in race.skipped] == [
        ("placement", "dear", "budget"), ("placement", "d", "budget"),
    ]  # fmt: skip


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_what_diverges_is_out_of_the_race_from_then_on(fold: int) -> None:
    track = Planted(
        {"a": [0] * 3, "b": [3, 3.1, 3], "c": [2, 2, 2.1], "d": [1] * 3},
        dict.fromkeys("abcd", 1.0),
        3,
        {"b": fold},
    )
    default, *rivals = map(Setting, "abcd")
    race = Race(track, "log_likelihood")  # type: ignore[arg-type]
    # Of three rivals two reach the second fold and one the third, where nothing but b is left.
    pick = race.run("amount", default, rivals)
    assert pick.label == ("a" if fold == 3 else "c")
    assert race.skipped == [{"stage": "amount", "setting": "b", "why": "it diverged"}]
    assert [heat.rivals for heat in race.heats] == ([] if fold == 3 else [("c", "d")])
    # It is no rival of a later heat either, where all others have run already.
    before = len(track.ran)
    assert race.run("placement", default, rivals[:1]) is default and len(track.ran) == before


def interval(gains: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over folds that hold out a quarter, and its interval by hand."""
    n, mean = len(gains), gains.mean()
    half = stats.t.ppf(0.975, n - 1) * gains.std(ddof=1) * np.sqrt(1 / n + 1 / 3)
    return mean, mean - half, mean + half


def test_the_answer_of_two_heats_by_hand() -> None:
    """Amount first, then place at the amount found; what is said is of the last pick."""
    kinds = set()
    for seed in range(36):
        track, (default, *others) = planted(seed, 4)
        shift = (0.0, -1.5, 1.5)[seed % 3]
        noise = np.random.default_rng(seed + 1000).normal(shift, 0.2, 4)
        track.gains["zero-shot"] = list(noise)
        race = Race(track, "log_likelihood")  # type: ignore[arg-type]
        tuned = race.run("amount", default, others[:3])
        pick = race.run("placement", tuned, others[2:]).label
        gains = {name: np.array(values) for name, values in track.gains.items()}
        recipe: Any = SimpleNamespace(label="default", method=SimpleNamespace(own_scale=0.0))
        said = _answer(race, recipe)

        mean, low, high = interval(gains[pick] - gains["zero-shot"])
        adapt = "yes" if low > 0 else "no" if high < 0 else "unknown"
        plain = said["to_zero_shot"]
        assert (plain["setting"], plain["adapt"]) == (pick, adapt)
        assert (plain["mean"], plain["low"], plain["high"]) == pytest.approx((mean, low, high))
        assert said["pick"] == ("zero-shot" if adapt == "no" else pick)
        assert said["decided"] is (adapt == "no" or pick != "default")
        assert [heat["stage"] for heat in said["heats"]] == ["amount", "placement"]
        assert [heat["pick"] for heat in said["heats"]] == [tuned.label, pick]

        whole = [name for name in gains if all((name, fold) in track.ran for fold in range(1, 5))]
        left = {name: gains[name].mean() for name in whole if name != pick}
        assert said["runner_up"] == max(left, key=lambda name: left[name])
        for key, name in (("difference", pick), ("runner_up_difference", said["runner_up"])):
            if name == "default":
                assert said[key] is None
            else:
                expected = interval(gains[name] - gains["default"])
                found = tuple(said[key][one] for one in ("mean", "low", "high"))
                assert found == pytest.approx(expected)
        if pick != "default":
            # Six were tried, one of them in both heats.
            among = said["difference"]["among"]
            assert among["rivals"] == 6 and among["low"] < said["difference"]["low"]
            assert among["low"] + among["high"] == pytest.approx(2 * said["difference"]["mean"])

        statement = said["statement"]
        numbers = f"{mean:+z.3f} [{low:z.3f}, {high:z.3f}] against zero-shot CLIP."
        ends = {"yes": "Training pays: ", "unknown": "Whether training pays cannot be told: "}
        if adapt == "no":
            assert statement == f"Do not train: {pick} is worse than zero-shot CLIP, {numbers}"
        else:
            assert statement.endswith(f" {ends[adapt]}{numbers}")
            trained = f"Train {pick}: " if pick != "default" else "Keep the default default: "
            assert statement.startswith(trained)
        kinds.add((pick == "default", adapt))
    assert len(kinds) == 6


def test_every_rival_is_called_worse_only_where_each_heats_best_is() -> None:
    """The best of the amounts was worse for sure, and that of the placements might be better."""
    flat = [0.0] * 4
    track = Planted(
        {"a": flat, "b": [-0.1, -0.11, -0.1, -0.11], "c": [-0.9, 0.4, -0.8, 0.6],
         "d": [-0.2, -0.21, -0.2, -0.21], "zero-shot": [0.1, -0.1, 0.1, -0.1]},
        dict.fromkeys("abcd", 1.0), 4,
    )  # fmt: skip
    a, b, c, d = map(Setting, "abcd")
    recipe: Any = SimpleNamespace(label="a", method=SimpleNamespace(own_scale=0.0))
    for last, words in (
        (c, "the best rival, c, cannot be told from it (-0.175 ["),
        (d, "every rival that was followed is worse, the best by 0.105 ["),
    ):
        race = Race(track, "log_likelihood")  # type: ignore[arg-type]
        race.run("amount", a, [b])
        race.run("placement", a, [last])
        assert words in _answer(race, recipe)["statement"]


OWN = Recipe("tiny", TrainConfig(lr=0.05, epochs=1), MMAConfig.span(2, 3, dim=4, scale=0.5))


@pytest.mark.parametrize("rounds", [2, 4])
def test_each_placement_is_tuned_by_itself(rounds: int) -> None:
    """The best mean is taken, though none is proved; halves survive within a placement."""
    amounts = [Amount(scale=5), Amount(scale=2), Amount(epochs=2), Amount(scale=5)]
    kept = set()
    for seed in range(12):
        generator = np.random.default_rng(seed)
        settings = [OWN, OWN.at("1-3")]
        rivals = {
            one.label: [
                f"{one.label}@{more}" for more in ("scale=5", "scale=2", "epochs=2", "lr=1")
            ]
            for one in settings
        }
        every = [name for own, others in rivals.items() for name in (own, *others)]
        track = Planted(
            {name: list(generator.normal(0, 0.3, rounds)) for name in every},
            {name: 1.0 + name.endswith("epochs=2") for name in every},
            rounds,
        )
        # One diverges in its second fold: it is out, whatever it promised.
        wild = "v1-3,t1-3@lr=1"
        track.wild = {wild: 2} if seed % 2 else {}
        track.novel = 40.0
        found = tune(track, settings, amounts, Amount(lr=1))  # type: ignore[arg-type]
        for own, picked in zip(settings, found.settings):
            names = rivals[own.label]
            folds = by_hand(track, names, rounds)
            if wild in track.diverged and wild in names:
                assert folds[wild] > 1 and picked.label != wild
                continue  # those that go on in its place are another half
            last = [own.label, *(name for name in names if folds[name] == rounds)]
            assert picked.label == max(last, key=lambda name: np.mean(track.gains[name]))
            rows = found.table[found.table["placement"] == own.label].set_index("amount")
            for name in names:
                row = rows.loc[name.partition("@")[2]]
                assert row["n"] == folds[name]
                # The planted accuracy is the gain turned round.
                base = -np.array(track.gains[name][: folds[name]])
                assert row["base"] == pytest.approx(base.mean())
                assert row["hm"] == pytest.approx((2 / (1 / base + 1 / 40)).mean())
            assert rows["times"].to_dict() == {
                "recipe": 1.0, "scale=5": 10.0, "scale=2": 4.0, "epochs=2": 2.0, "lr=1": 20.0,
            }  # fmt: skip
            kept.add(picked is own)
        assert found.trainings == track.cost
    assert kept == {True, False}


def test_where_amounts_tie_the_recipes_own_is_kept() -> None:
    names = [OWN.label, *(f"{OWN.label}@scale={scale}" for scale in (5, 2))]
    track = Planted({name: [0.0, 0.0] for name in names}, dict.fromkeys(names, 1.0), 2, novel=0.0)
    found = tune(track, [OWN], [Amount(scale=5), Amount(scale=2)])  # type: ignore[arg-type]
    assert found.settings == (OWN,)
    assert found.table["hm"].tolist() == [0.0, 0.0, 0.0], (
        "of 0 and 0, which have no mean by formula"
    )
