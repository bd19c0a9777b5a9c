"""The doctor: what is found, and that each finding which asks for something says what."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from factories import (
    make_call,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
)

from autochunk import doctor
from autochunk.device import detect
from autochunk.doctor import Finding, examine
from autochunk.errors import ProbeError
from autochunk.plan import Plan
from autochunk.store import bundle, files
from autochunk.store.choice import DENSE
from autochunk.store.interval import Interval
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner import page_faults
from autochunk.tuner.verify import Verification, verify
from autochunk.workload import Workload

SMALL = Workload.parse("b=2,t=64,h=2,k=8")


def problems(**options: Any) -> list[Finding]:
    findings = list(examine(**options))
    assert all(finding.cure for finding in findings if finding.level != "ok")
    return [finding for finding in findings if finding.level == "problem"]


def measured_here(workload: Workload = SMALL, ratio: float = 0.5, **fields: object) -> Profile:
    """A profile of this machine whose choice, "xla, 0.01 MB", took ``ratio`` of dense's time."""
    curve = (make_measurement("dense", None, 1.0, 400), make_measurement("xla", 0.01, ratio, 4))
    return make_profile(workload, detect(), curve, **fields)


def test_a_new_set_up_has_no_problems_and_is_told_to_tune() -> None:
    """Nothing tuned is a note; looking changes nothing."""
    assert problems() == []
    assert any(finding.cure == "autochunk tune" for finding in examine())
    assert not ProfileStore().path.exists()


def test_what_is_wrong_with_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writable for others; no database; each with the file's name in it."""
    store = ProfileStore()
    store.put(measured_here())
    assert problems() == []
    store.path.chmod(0o622)
    (found,) = problems()
    assert found.cure == f"chmod 600 {store.path}"
    store.path.chmod(0o600)
    store.path.write_bytes(b"no database" * 1000)
    (found,) = problems()
    assert str(store.path) in found.detail


def test_a_damaged_layer_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is mended it answers nothing."""
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(tmp_path))
    (found,) = problems()
    assert "bad.json" in found.detail


def test_damaged_profiles_of_a_bundle_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle can be read, and has them listed; their content is not what was written."""
    file = tmp_path / "b.json"
    profiles = [make_profile(make_workload(f"t={t},k=2"), detect()) for t in (8, 16, 24)]
    text = bundle.dump(profiles)
    files.write(file, text.replace('"effort": "standard"', '"effort": "quick"', 2))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(file))
    (finding,) = [found for found in examine() if str(file) in found.subject]
    assert finding.level == "problem"
    assert "and 1 more" in finding.detail


@pytest.mark.parametrize("above", ["/proc", "/dev/null"])
def test_a_store_that_cannot_be_made(above: str) -> None:
    """Where no file can be, whatever the permissions say, or below what is no folder."""
    (found,) = problems(store=Path(above, "none", "store.sqlite"))
    assert f"{above} " in found.detail
    assert "cannot be made" in found.detail


def test_where_everybody_may_write_is_a_problem(tmp_path: Path) -> None:
    """A site's folder, its files, and what it is in: whoever writes there decides what runs."""
    site = tmp_path / "site" / "autochunk"  # by XDG_DATA_DIRS
    site.mkdir(parents=True)
    files.write(site / "b.json", bundle.dump([make_profile()]))

    def open_to_all() -> list[str]:
        return [found.cure.removeprefix("chmod o-w ") for found in problems()]

    assert open_to_all() == []
    for mode, place in ((0o777, site), (0o1777, site), (0o777, site.parent), (0o777, tmp_path)):
        before = place.stat().st_mode
        place.chmod(mode)
        assert set(open_to_all()) == {str(place)}  # the shipped profiles' folder is in it, too
        place.chmod(before)
    site.parent.chmod(0o1777)  # nobody may replace the folder that is there
    assert open_to_all() == []
    (site / "b.json").chmod(0o666)
    assert open_to_all() == [str(site / "b.json")]
    (site / "b.json").unlink()
    site.rmdir()  # now everybody may make one
    assert open_to_all() == [str(site.parent)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_store_of_another_user_is_a_problem() -> None:
    """As where it was put into /tmp before its owner could."""
    store = ProfileStore()
    store.put(make_profile())
    os.chown(store.path, 12345, -1)
    (found,) = problems()
    assert "another user's (12345)" in found.detail


def test_notes_about_profiles() -> None:
    """Stale, cut short, missed: counted, with the command that cures it."""
    store, here = ProfileStore(), detect()
    store.put(measured_here(complete=False))
    stale = measured_here(make_workload("t=128,k=8"))
    store.put(stale.model_copy(update={"device": here.model_copy(update={"jaxlib": "0.1.0"})}))
    store.record_miss(here, make_workload("t=256,k=8"))
    cures = [finding.cure for finding in examine() if finding.level == "note"]
    of_stale = "autochunk show --stale; autochunk tune --stale"
    assert cures == [of_stale, SMALL.tune_command, "autochunk tune --missed"]


def test_misses_are_told_by_families() -> None:
    """With what was asked for most."""
    store, here = ProfileStore(), detect()
    for shape in ("t=100,k=8", "t=200,k=8", "t=300,k=8", "t=200,k=8", "t=100,k=8,causal=yes"):
        store.record_miss(here, make_workload(shape))
    (detail,) = (one.detail for one in examine() if "found nothing" in one.detail)
    assert "4 workloads of 2 families, which differ only in sizes" in detail
    assert "t=200,s=200,h=1,k=8 was asked for most, by 2 processes" in detail


def test_a_gpu_that_jax_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what keeps jax from it, where that can be told."""
    monkeypatch.setattr(doctor, "_nvidia_gpu_here", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value, words in (
        ("JAX_PLATFORMS", "cpu", "JAX_PLATFORMS is 'cpu'"),
        ("CUDA_VISIBLE_DEVICES", "", "CUDA_VISIBLE_DEVICES is empty"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert words in problems()[0].cure
    assert problems()[0].cure == 'pip install "jax[cuda13]"'


def test_the_oldest_profiles_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many as were asked for, the user's own before others.

    Slower than when tuned is a problem, as fast is not, and neither is faster.
    """
    store = ProfileStore()
    long, longest = make_workload("t=128,k=8"), make_workload("t=256,k=8")
    for year, workload in ((2021, make_workload("t=64,k=8")), (2020, SMALL), (2022, long)):
        store.put(measured_here(workload, created=f"{year}-01-01T00:00:00Z"))
    seen: list[str] = []

    def slower(profile: Profile) -> Verification:
        seen.append(profile.created[:4])
        now = -0.3 if len(seen) == 1 else -0.6
        return verification(about(-0.5), about(now, 0.02), profile)

    file = tmp_path / "older.json"
    files.write(file, bundle.dump([measured_here(longest, created="2019-01-01T00:00:00Z")]))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(file))
    (found,) = problems(verify_count=2, verifier=slower)
    assert seen == ["2020", "2021"]
    assert "+40%" in found.detail
    assert found.cure == f"{SMALL.tune_command} --force"


@pytest.mark.parametrize(
    ("found", "level"),
    [(Interval(0.5, 0.9, 1.2), "note"), (Interval(0.02, 0.2, 0.5), "ok"), (None, "note")],
)
def test_page_faults_that_cost_much_have_a_cure(found: Interval | None, level: str) -> None:
    """From a tenth on, surely; the cure is settings of glibc. Not to be told is no problem."""
    if not detect().allocator.startswith("glibc"):
        pytest.skip("another C library")

    def measure() -> Interval:
        if found is None:
            raise ProbeError("no worker")
        return found

    (finding,) = [one for one in examine(page_faults=measure) if one.subject == "page faults"]
    assert finding.level == level
    assert ("MALLOC_TRIM_THRESHOLD_=" in finding.cure) == bool(found and found.low > 0.1)


def test_page_faults_are_measured_in_processes_of_their_own() -> None:
    """One of them keeps its heap; this process stays as it was started."""
    low, middle, high = page_faults.cost(SMALL, rounds=3)
    assert -1 < low <= middle <= high
    assert not page_faults.HEAP_KEPT.keys() & os.environ.keys()


def about(middle: float, reach: float = 0.0) -> Interval:
    """An interval about a fraction, which reaches so much of the whole to either side."""
    return Interval(*((1 + middle) * (1 + side * reach) - 1 for side in (-1, 0, 1)))


def verification(then: Interval, now: Interval, profile: Profile | None = None) -> Verification:
    """Of the plan "xla, 0.01 MB" beside dense."""
    return Verification(profile or measured_here(), Plan("xla", 0.01), DENSE, then, now)


@pytest.mark.parametrize(
    ("then", "now", "drifted", "clear"),
    [
        (about(-0.5), about(-0.5), False, True),
        (about(-0.5), about(-0.49), False, True),  # too little to matter
        (about(-0.5), about(-0.47), True, True),
        (about(-0.5), about(-0.47, 0.05), False, False),  # it may be noise now,
        (about(-0.5, 0.05), about(-0.47), False, False),  # or have been then
        (about(-0.5, 0.05), about(-0.4, 0.05), True, True),
        (about(-0.5), about(-0.7, 0.1), False, True),  # faster is no drift
    ],
)
def test_drift_is_more_than_noise(
    then: Interval, now: Interval, drifted: bool, clear: bool
) -> None:
    """Surely slower by more than 3%, by the intervals of then and now; else it may be unclear."""
    found = verification(then, now)
    assert (found.drifted, found.clear) == (drifted, clear)


def test_verify_times_the_choice_beside_a_baseline() -> None:
    """By a real worker."""
    found = verify(measured_here())
    assert (found.plan, found.baseline, found.failure) == (Plan("xla", 0.01), DENSE, "")
    assert found.then.middle == pytest.approx(-0.5)
    assert -1 < found.now.low <= found.now.middle <= found.now.high


def test_verify_of_a_plan_that_no_longer_runs() -> None:
    """A worker that cannot start is a finding, not an error."""
    found = verify(measured_here(), worker_command=("false",))
    assert found.failure


def test_functions_that_may_no_longer_hold_are_told() -> None:
    """Nobody but the program that calls one can have it measured again."""
    here = detect()
    older = here.model_copy(update={"jaxlib": "0.1.0"})
    store = ProfileStore()
    store.put(make_function_profile(make_call(name="sound"), device=here))
    store.put(make_function_profile(make_call(name="old"), device=older))
    store.put(make_function_profile(make_call(name="cut"), device=here, complete=False))
    store.record_miss(here, make_call(name="missed"))
    told = [one for one in examine() if "functions" in one.detail]
    assert [one.cure.endswith("autochunk tune --missed") for one in told] == [True, True]
    assert told[0].detail.endswith("cut 64, old 64")
    assert told[1].detail.endswith("functions: missed")
