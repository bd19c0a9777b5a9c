"""``bench --plans``: the chosen plan beside each other one, two at a time, here and now.

What it finds may contradict the profile, whose figures it is compared with: alone, as the tuner
measures, or within the step of a Transformer layer, where a model's other work stands between.

A process favours some plan in all its rounds: the same two plans were seen to take 1.05, 1.07,
1.08, 1.08, 1.11, 1.14 and 1.37 in seven. So there may be several processes, of which the one in the
middle counts.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import scipy.stats

from autochunk.errors import ArgumentError, ProbeError
from autochunk.plan import Plan
from autochunk.store.choice import compare
from autochunk.store.interval import Interval, paired
from autochunk.store.profile import Profile
from autochunk.tuner.bench import Contender, prepare
from autochunk.tuner.inputs import WorkloadInputs
from autochunk.tuner.layer import Layer

# Slower than the chosen plan by this in the first rounds, a plan gets no more of them.
_HOPELESS = 1.25
_FIRST_ROUNDS = 3

_EQUAL = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Rival:
    """A plan beside the chosen one.

    Attributes:
      plan: which.
      seconds: median time of a call, or of a layer's step; None if it was not timed.
      stored: by what fraction it was slower than the chosen plan when the profile was measured;
        None of a plan that the profile has no times of.
      slower: by what fraction of the attention's time it is slower now.
      temp_bytes: working memory of what was timed.
      detail: why it was not timed; empty if it was.
    """

    plan: Plan
    seconds: float | None = None
    stored: Interval | None = None
    slower: Interval | None = None
    temp_bytes: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Agreement:
    """How well a profile's figures order the plans by what they take now.

    Attributes:
      rank_correlation: Spearman's; None of fewer than three plans, or where there is no order.
      contradiction: of two plans of which one was faster then and the other is faster now, the
        smaller one of these fractions, where that is largest; 0 if there are no such two.
      sure_contradiction: the same of two whose intervals do not overlap, neither then nor now.
    """

    rank_correlation: float | None
    contradiction: float
    sure_contradiction: float


def rivals(
    profile: Profile,
    plans: Iterable[Plan],
    *,
    rounds: int = 10,
    in_layer: bool = False,
    on_plan: Callable[[Plan], None] = lambda _: None,
) -> list[Rival]:
    """Times plans beside the one that a profile chooses.

    Args:
      profile: of a workload on this machine.
      plans: the others; see ``timed_plans``.
      rounds: how often each pair is timed, the first one left to chance; of a plan that is far
        slower a few are enough.
      in_layer: in a Transformer layer's step (see ``Layer``) instead of alone.
      on_plan: told of each plan as it is prepared.

    Returns:
      The chosen plan, then the others.

    Raises:
      ArgumentError: the profile chooses no plan, or that one does not run here.
    """
    choice = profile.choose()
    if choice is None:
        raise ArgumentError(f"the profile of {profile.workload} chooses no plan to compare with")
    measured = {m.plan: m for m in profile.measurements if m.timed}
    others = [plan for plan in dict.fromkeys(plans) if plan != choice.plan]
    # Without it jax computes in float32, with a warning at most.
    with jax.enable_x64(profile.parsed_workload().dtype == "float64"):
        inputs = WorkloadInputs(profile.parsed_workload())
        around = Layer(inputs) if in_layer else inputs
        on_plan(choice.plan)
        chosen = _program(around, choice.plan)
        if chosen.run is None:
            raise ArgumentError(f"{choice.plan} of {profile.workload}: {chosen.detail}")
        programs = {}
        for plan in others:
            on_plan(plan)
            programs[plan] = _program(around, plan)
        # Of a step's time a difference of the attention is a smaller part.
        alone = _program(inputs, choice.plan).run if in_layer else None
        of_step = chosen.run() / alone() if alone is not None else 1.0
        pairs = _alternating(chosen, programs, rounds)
        whole = [second for pair in pairs.values() for second in pair.chosen] or [chosen.run()]
        found = [Rival(choice.plan, statistics.median(whole), _EQUAL, _EQUAL, chosen.temp_bytes)]
        for plan, program in programs.items():
            stored = compare(measured[plan], choice.measurement) if plan in measured else None
            seconds = slower = None
            if plan in pairs:
                seconds = statistics.median(pairs[plan].own)
                slower = Interval(*(of_step * part for part in pairs[plan].slower))
            found.append(Rival(plan, seconds, stored, slower, program.temp_bytes, program.detail))
    return found


def rivals_of_several(
    profile: Profile, plans: Iterable[Plan], *, processes: int, rounds: int, in_layer: bool = False
) -> list[Rival]:
    """``rivals`` in so many processes, one after the other: of each plan what is in the middle.

    Raises:
      ArgumentError: as ``rivals``.
      ProbeError: a process was ended, for want of memory perhaps.
    """
    runs = []
    for _ in range(processes):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as one:
            found = one.submit(rivals, profile, list(plans), rounds=rounds, in_layer=in_layer)
            try:
                runs.append(found.result())
            except concurrent.futures.BrokenExecutor as error:
                raise ProbeError(
                    f"the process that timed {profile.workload} was ended; if it was out of "
                    "memory, name fewer plans or a smaller --shape"
                ) from error
    return [in_the_middle(one) for one in zip(*runs, strict=True)]


def in_the_middle(found: Sequence[Rival]) -> Rival:
    """Of a plan in several processes the one in the middle, of two the faster one."""
    timed = [one for one in found if one.slower is not None and one.seconds is not None]
    timed.sort(key=lambda one: (one.slower or _EQUAL).middle)
    return timed[(len(timed) - 1) // 2] if timed else found[0]


def timed_plans(profile: Profile) -> list[Plan]:
    """Those that a profile has times of."""
    return [measurement.plan for measurement in profile.measurements if measurement.timed]


def _program(around: WorkloadInputs | Layer, plan: Plan) -> Contender:
    return prepare(str(plan), around.function(plan), around.passed)


class _Pair(NamedTuple):
    """Seconds of a plan, and of the chosen one in the same rounds."""

    own: list[float]
    chosen: list[float]

    @property
    def slower(self) -> Interval:
        """By what fraction the plan is slower."""
        return paired(self.own, self.chosen)


def _alternating(
    chosen: Contender, programs: Mapping[Plan, Contender], rounds: int
) -> dict[Plan, _Pair]:
    """Times of those that run, two at a time, all of them in each round.

    What disturbs a machine for seconds so hits a few rounds of each pair, not all of one.
    """
    pairs = {plan: _Pair([], []) for plan, program in programs.items() if program.run}
    playing = list(pairs)
    for number in range(rounds):
        for plan in random.sample(playing, len(playing)):
            times = zip((programs[plan], chosen), pairs[plan], strict=True)
            for contender, seconds in random.sample(list(times), 2):
                assert contender.run is not None
                seconds.append(contender.run())
        if number + 1 == _FIRST_ROUNDS:
            playing = [plan for plan in playing if pairs[plan].slower.middle <= _HOPELESS - 1]
    return pairs


def agreement(found: Sequence[Rival]) -> Agreement:
    """How well the stored figures agree with those of now."""
    both = [
        (rival.stored, rival.slower)
        for rival in found
        if rival.stored is not None and rival.slower is not None
    ]
    then, now = ([interval.middle for interval in those] for those in zip(*both, strict=True))
    ordered = len(both) > 2 and len(set(then)) > 1 and len(set(now)) > 1
    pairs = list(itertools.combinations(both, 2))
    apart = [pair for pair in pairs if all(map(_are_apart, *pair))]
    return Agreement(
        rank_correlation=float(scipy.stats.spearmanr(then, now).statistic) if ordered else None,
        contradiction=max(map(_contradiction, pairs), default=0.0),
        sure_contradiction=max(map(_contradiction, apart), default=0.0),
    )


_ThenAndNow = tuple[Interval, Interval]


def _contradiction(pair: tuple[_ThenAndNow, _ThenAndNow]) -> float:
    then, now = (one.middle - other.middle for one, other in zip(*pair, strict=True))
    return min(abs(then), abs(now)) if then * now < 0 else 0.0


def _are_apart(one: Interval, other: Interval) -> bool:
    return one.high < other.low or other.high < one.low
