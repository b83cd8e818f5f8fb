"""Methods: policies in turn, where each begins, and what the scales are."""

import pytest

from mlora_jax.core import METHODS, POLICIES, Method, Phase, RankHierarchy, get_method
from mlora_jax.core.methods import FIELD

HIERARCHY = RankHierarchy((1, 2, 6), "sqrt", (1.0, 2.0, 3.0))
RENEST = METHODS["renest"]


def test_every_policy_is_a_method_of_one_phase_with_its_scales():
    assert METHODS.keys() == POLICIES.keys() | FIELD.keys() | {"renest", "renest_30_rotated", "renest_sandwich"}
    for name, policy in POLICIES.items():
        method = METHODS[name]
        assert method.policies == (policy,)
        assert method.starts(1) == (0,)
        assert method.hierarchy(HIERARCHY) == method.hierarchy(HIERARCHY, 0) == HIERARCHY
        assert method.cost(HIERARCHY) == policy.count(HIERARCHY)
        assert method.uses_weights == policy.uses_weights
        assert (method.trained_profile(HIERARCHY) == policy.trained_profile(HIERARCHY)).all()


def test_renest_is_lora_and_then_a_prefix_for_each_example_at_the_cost_of_lora():
    assert [(phase.policy, phase.fraction) for phase in RENEST.phases] == [("lora", 0.7), ("per_example", 0.3)]
    assert [phase.start for phase in RENEST.phases] == ["", "squeeze"]
    assert RENEST.cost(HIERARCHY) == pytest.approx(1.0)
    assert RENEST.uses_weights
    sandwich = METHODS["renest_sandwich"]
    assert [(phase.policy, phase.fraction) for phase in sandwich.phases] == [("lora", 0.5), ("sandwich", 0.5)]
    assert sandwich.cost(HIERARCHY) == pytest.approx(2.0)
    assert not sandwich.uses_weights


def test_the_scale_is_in_the_factors_after_the_first_phase():
    assert RENEST.hierarchy(HIERARCHY, 0) == HIERARCHY
    assert RENEST.hierarchy(HIERARCHY, 1) == RENEST.hierarchy(HIERARCHY)
    assert RENEST.hierarchy(HIERARCHY) == RankHierarchy((1, 2, 6), "none", (1.0, 2.0, 3.0))
    assert RENEST.trained_profile(RENEST.hierarchy(HIERARCHY)).tolist() == [1.0] * 6


@pytest.mark.parametrize(("steps", "starts"), [(10, (0, 7)), (463, (0, 324)), (2, (0, 1))])
def test_where_phases_begin(steps, starts):
    assert RENEST.starts(steps) == starts


def test_three_phases():
    method = Method(phases=(Phase("lora", 0.5), Phase("lora", 0.25), Phase("sandwich", 0.25)), summary="")
    assert method.starts(100) == (0, 50, 75)
    assert method.cost(HIERARCHY) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        ((), {}, "at least one phase"),
        ((Phase("lora", 0.7),), {}, r"sum to 1, got \[0.7\]"),
        ((Phase("lora", 1.0), Phase("lora", 0.0)), {}, "above 0"),
        ((Phase("lroa", 1.0),), {}, "unknown policy 'lroa'; did you mean 'lora'"),
        ((Phase("lora", 1.0),), {"schedule": "turn"}, "unknown schedule 'turn'; known: run, phase"),
        ((Phase("lora", 1.0, "squeze"),), {}, "unknown action 'squeze'; did you mean 'squeeze'"),
        ((Phase("lora", 1.0, "squeeze"),), {}, "'squeeze' cannot stand in the place 'first'; .*: none, fan_rank"),
        ((Phase("lora", 0.5), Phase("lora", 0.5, "fan_in")), {}, "'fan_in' cannot stand in the place 'later'"),
        ((Phase("lora", 0.5), Phase("lora", 0.5, "calibrated")), {}, "'calibrated' cannot stand in the place 'later'"),
        (
            (Phase("lora", 1.0, "", "soft_treshold"),),
            {},
            "unknown update 'soft_treshold'; did you mean 'soft_threshold'",
        ),
        ((Phase("lora", 1.0),), {"optimizer": "lora_rita"}, "unknown optimizer 'lora_rita'; did you mean 'lora_rite'"),
        ((Phase("lora", 1.0),), {"optimizer": "lora_rite", "gate": True}, "'lora_rite' trains no gates, and"),
        (
            (Phase("lora", 0.5), Phase("lora", 0.5, "squeeze_rotated")),
            {"optimizer": "scaled_adam"},
            "the moments of the optimizer 'scaled_adam' cannot follow the action 'squeeze_rotated'",
        ),
        (
            (Phase("lora", 1.0, "", "budget"),),
            {"gate": True},
            "reads the state of the optimizer 'adalora', and .* 'adam'",
        ),
        ((Phase("lora", 1.0, "svfit"),), {}, "the action 'svfit' makes gates, and the method has none"),
        ((Phase("lora", 1.0),), {"gate": "twos"}, "unknown gate 'twos'; known: ones, normal, uniform, zeros"),
        ((Phase("lora", 1.0, "", "soft_threshold"),), {}, "'soft_threshold' acts on gates, .*: set gate=True"),
    ],
)
def test_a_method_that_cannot_be_is_refused(phases, options, message):
    with pytest.raises(ValueError, match=message):
        Method(phases=phases, summary="", **options)


def test_a_change_of_policy_needs_no_squeeze():
    method = Method(phases=(Phase("dylora", 0.5), Phase("matryoshka", 0.5)), summary="")
    assert method.hierarchy(HIERARCHY) == HIERARCHY


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=r"1 optimizer steps are too few for the phases .* begin after \[0, 1\]"):
        RENEST.starts(1)


def test_methods_are_found_by_name_among_the_further_ones_too():
    mine = Method(phases=(Phase("lora", 1.0),), summary="")
    assert get_method("renest") is RENEST
    assert get_method("mine", {"mine": mine}) is mine
    with pytest.raises(ValueError, match=r"unknown method 'mino'; did you mean 'mine'\? Known methods: lora, .*, mine"):
        get_method("mino", {"mine": mine})
    with pytest.raises(ValueError, match="unknown method 'matroyshka'; did you mean 'matryoshka'"):
        get_method("matroyshka")
