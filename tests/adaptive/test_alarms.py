"""Alarms: each is raised by what it is about, by nothing else, and once."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive.observe.alarms import AlarmLimits, Alarms

HEALTHY = {
    "tokens": 10_000.0,
    "executed": 2_500.0,
    "executed_share": 0.25,
    "planned_share": 0.25,
    "entropy": 0.5,
    "entropy_share": 0.72,
    "weight_mean": 0.4,
    "weight_std": 0.2,
    "predictor_accuracy": 0.93,
    "units": 8.0,
    "dead_units": 0.0,
    "load_over_mean": 1.4,
    "dropped": 0.01,
}
LATE = 1_000


def raised(step: int = LATE, **changes: float) -> list[str]:
    return [a.kind for a in Alarms().check_routing(step, {"layers.1": {**HEALTHY, **changes}})]


def test_healthy_routing_raises_nothing() -> None:
    assert raised() == []
    bare = {"tokens": 10.0, "executed": 10.0, "executed_share": 1.0}
    assert Alarms().check_routing(LATE, {"layers.1": bare}) == []


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("dead_units", {"dead_units": 1.0}, {"dead_units": 0.0}),
        ("load", {"load_over_mean": 4.1}, {"load_over_mean": 4.0}),
        ("entropy", {"entropy_share": 0.019}, {"entropy_share": 0.021}),
        ("predictor", {"predictor_accuracy": 0.754}, {"predictor_accuracy": 0.756}),
        ("drift", {"executed_share": 0.36}, {"executed_share": 0.34}),
        ("drift", {"executed_share": 0.14}, {"executed_share": 0.16}),
        ("dropped", {"dropped": 0.21}, {"dropped": 0.19}),
        ("non_finite", {"weight_mean": float("nan")}, {"weight_mean": 1e30}),
        ("non_finite", {"entropy": float("inf")}, {"entropy": 0.0}),
    ],
)
def test_each_alarm_has_its_limit(
    kind: str, wrong: dict[str, float], right: dict[str, float]
) -> None:
    assert raised(**wrong) == [kind]
    assert raised(**right) == []


@pytest.mark.parametrize(("said", "chance"), [(0.0, 0.75), (0.25, 0.625), (0.5, 0.5), (1.0, 0.25)])
def test_a_predictor_must_beat_one_that_says_yes_as_often(said: float, chance: float) -> None:
    """Of a quarter chosen, two independent draws agree in `said/4 + (1 - said) 3/4`."""
    assert raised(predicted_share=said, predictor_accuracy=chance) == ["predictor"]
    assert raised(predicted_share=said, predictor_accuracy=chance + 0.01) == []


def test_where_everything_executes_there_is_nothing_to_predict() -> None:
    assert raised(executed_share=1.0, planned_share=1.0, predictor_accuracy=1.0) == []


def test_routers_are_judged_only_when_they_had_time_but_numbers_at_once() -> None:
    assert raised(step=99, dead_units=3.0, predictor_accuracy=0.1) == []
    assert raised(step=99, weight_mean=float("nan")) == ["non_finite"]


def test_few_tokens_leave_experts_without_any_by_chance() -> None:
    assert raised(executed=64 * 8 - 1, dead_units=1.0) == []
    assert raised(executed=64 * 8, dead_units=1.0) == ["dead_units"]


def test_an_alarm_is_raised_when_it_begins_and_again_after_it_ended() -> None:
    alarms = Alarms()
    wrong, right = {**HEALTHY, "dead_units": 2.0}, HEALTHY

    def check(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
        return [a.layer for a in alarms.check_routing(LATE, {"a": first, "b": second})]

    assert check(wrong, right) == ["a"]
    assert check(wrong, right) == []
    assert check(wrong, wrong) == ["b"]
    assert check(right, wrong) == []
    assert check(wrong, wrong) == ["a"]


def test_a_scalar_that_stays_wrong_is_told_once_and_hides_no_other() -> None:
    alarms, nan = Alarms(), float("nan")

    def check(**scalars: float) -> list[str]:
        return [alarm.message for alarm in alarms.check_run(LATE, scalars)]

    # A validation loss is known at evaluations only; the steps in between say nothing of it.
    assert check(validation=nan) == ["validation is nan"]
    assert check(train=2.0) == []
    assert check(validation=nan) == []
    assert check(train=2.0, norm=float("inf")) == ["norm is inf"]
    assert check(train=nan, norm=float("inf")) == ["train is nan"]
    assert check(validation=2.0) == []
    assert check(validation=nan) == ["validation is nan"]


def test_training_and_evaluation_are_remembered_apart() -> None:
    alarms = Alarms()
    wrong = {"a": {**HEALTHY, "dead_units": 2.0}}
    assert alarms.check_routing(LATE, wrong)
    assert alarms.check_routing(LATE, wrong, of="evaluation")
    assert not alarms.check_routing(LATE, wrong)


def test_the_line_names_step_layer_and_number() -> None:
    limits = AlarmLimits(patience=0)
    (alarm,) = Alarms(limits).check_routing(7, {"layers.3": {**HEALTHY, "dead_units": 2.0}})
    assert str(alarm) == "alarm at step 7: layers.3: 2 of 8 experts got no token (dead)"
    (alarm,) = Alarms().check_run(7, {"loss/train": float("nan"), "learning_rate": 0.1})
    assert str(alarm) == "alarm at step 7: loss/train is nan"
    nan = {**HEALTHY, "entropy": float("nan"), "weight_std": float("inf")}
    (alarm,) = Alarms().check_routing(7, {"layers.1": HEALTHY, "layers.3": nan, "layers.5": nan})
    assert str(alarm) == (
        "alarm at step 7: layers.3: entropy, weight_std not finite (nor in 1 more)"
    )
