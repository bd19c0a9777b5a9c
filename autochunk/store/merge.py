"""Which profiles travel, and what becomes of them in a store that may have its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autochunk.errors import ArgumentError, WorkloadError
from autochunk.functions import FunctionCall, is_function
from autochunk.store.bundle import Bundle, refuse_twice
from autochunk.store.profile import EFFORTS, Profile
from autochunk.store.profiles import Changed, ProfileStore
from autochunk.workload import LATER_DEFAULTS, Workload, key_items

# --- Choosing what travels ------------------------------------------------------------------------

_OF_FUNCTIONS = ("name", "lengths", "mode")


def select(
    profiles: Iterable[Profile],
    *,
    device: str | None = None,
    shapes: Iterable[str] = (),
    dtype: str | None = None,
    mode: str | None = None,
) -> list[Profile]:
    """The profiles that pass every filter, in their order.

    Args:
      profiles: from which to choose.
      device: a part of the device's key, in any case.
      shapes: any of these; each is items such as ``t=4096,h=8``, or of functions that are not
        attention ``name=transition,lengths=768``, of which all that are given must be equal.
      dtype: as a workload has it; of functions the first array's.
      mode: "forward" or "training".

    Raises:
      WorkloadError: a shape has an item that no workload has.
    """
    also = {name: value for name, value in (("dtype", dtype), ("mode", mode)) if value is not None}
    wanted = [{**_shape_items(shape), **also} for shape in shapes] or [also]
    return [
        profile
        for profile in profiles
        if (device or "").lower() in profile.device.key.lower()
        and any(items.items() <= _all_items(profile.workload).items() for items in wanted)
    ]


def _all_items(key: str) -> dict[str, str]:
    if is_function(key):
        call = FunctionCall.parse(key)
        return {**{item: getattr(call, item) for item in _OF_FUNCTIONS}, "dtype": call.dtype}
    return LATER_DEFAULTS | key_items(key)


def _shape_items(shape: str) -> dict[str, str]:
    items, known = key_items(shape), _all_items(Workload.make(query_length=1, key_size=1).key)
    if {"name", "lengths"} & items.keys() and items.keys() <= {*_OF_FUNCTIONS, "dtype"}:
        return items
    if not items.keys() <= known.keys() or not all(items.values()):
        raise WorkloadError(
            f"{shape!r}: a filter of shapes is NAME=VALUE items between commas, NAME one of "
            f"{', '.join(known)}, or of functions {', '.join(_OF_FUNCTIONS)}; for example "
            "t=4096,h=8"
        )
    # Read and written again, so that it is spelt as keys are. Sizes left out are no ones, which a
    # pattern would take for broadcast.
    others: dict[str, int] = dict.fromkeys(("batch", "query_length", "key_length", "key_size"), 2)
    others["num_heads"] = int(items["kv_heads"]) if items.get("kv_heads", "").isdecimal() else 2
    spelt = _all_items(
        Workload.parse(",".join("=".join(item) for item in items.items()), **others).key
    )
    return {name: spelt[name] for name in items}


# --- Import ---------------------------------------------------------------------------------------

Preference = Literal["newest", "best-effort", "theirs", "ours"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)

Relation = Literal["new", "same", "newer", "older", "conflicting"]

_MOST_TRIES = 100  # each that fails means that another process stored what it had
# What is compared in turn; more is better.
_CRITERIA: dict[Preference, tuple[str, ...]] = {
    "newest": ("created",),
    "best-effort": ("complete", "effort", "created"),
}


@dataclass(frozen=True)
class ImportEntry:
    """What an import does with one profile of a bundle.

    Attributes:
      profile: the bundle's.
      stored: the store's of the same device and workload; None if it has none.
      relation: "new" to the store, the "same" as the store's, created "newer" or "older", or
        "conflicting": created at the same time and yet different.
      taken: whether it is stored; if not, what is stored stays.
      reason: what decided, in words.
    """

    profile: Profile
    stored: Profile | None
    relation: Relation
    taken: bool
    reason: str


@dataclass(frozen=True)
class ImportPlan:
    """What an import does, profile by profile in the bundle's order."""

    entries: tuple[ImportEntry, ...]

    @property
    def taken(self) -> list[Profile]:
        """The profiles to store."""
        return [entry.profile for entry in self.entries if entry.taken]

    def count(self, relation: Relation) -> int:
        """How many have this relation to what is stored."""
        return sum(entry.relation == relation for entry in self.entries)


def plan_import(
    stored: Iterable[Profile],
    bundle: Bundle,
    prefer: Preference = "best-effort",
    *,
    reserved: Collection[tuple[str, str]] = (),
) -> ImportPlan:
    """What importing a bundle would do to a store with these profiles.

    Args:
      stored: the store's profiles.
      bundle: what is to be imported.
      prefer: which of two different profiles of one device and workload stays: "newest", the one
        created later; "best-effort", a complete one before one that was cut short, then the one of
        higher effort, then the one created later; "theirs", the bundle's; "ours", the store's. Of
        two that this does not tell apart the store's stays.
      reserved: (device key, workload key) of what the store has from a newer autochunk, which stays
        whatever is preferred.

    Raises:
      ArgumentError: ``prefer`` is none of these.
      BundleError: the bundle has two profiles of one device and workload.
    """
    _check(bundle, prefer)
    return _plan(stored, bundle, prefer, reserved)


def merge(
    store: ProfileStore, bundle: Bundle, prefer: Preference = "best-effort", dry_run: bool = False
) -> ImportPlan:
    """Adds a bundle's profiles to a store, all that the plan takes or, on an error, none.

    With ``dry_run`` only says what it would do. See ``plan_import``. Where another process changes
    the same profiles meanwhile, it is planned anew by what is there then.

    Raises:
      ArgumentError: ``prefer`` is no preference.
      BundleError: the bundle has two profiles of one device and workload.
      StoreError: the store cannot be read or written, or others changed the same profiles again
        and again.
    """
    _check(bundle, prefer)  # before anything is mended for it
    if not dry_run and bundle.profiles:
        store.check_writable()  # which mends a damaged store, for it to be read
    for _ in range(_MOST_TRIES):
        plan = _plan(store.profiles(), bundle, prefer, store.newer())
        if dry_run or not plan.taken:
            return plan
        expected = {entry.profile.key: entry.stored for entry in plan.entries if entry.taken}
        try:
            store.put_all(plan.taken, expected=expected)
            return plan
        except Changed as error:
            changed = error
    raise changed


def _check(bundle: Bundle, prefer: Preference) -> None:
    if prefer not in PREFERENCES:
        raise ArgumentError(f"prefer must be one of {', '.join(PREFERENCES)}; got {prefer!r}")
    refuse_twice(bundle.profiles, "bundle")


def _plan(
    stored: Iterable[Profile],
    bundle: Bundle,
    prefer: Preference,
    reserved: Collection[tuple[str, str]],
) -> ImportPlan:
    mine = {profile.key: profile for profile in stored}

    def entry(profile: Profile) -> ImportEntry:
        if profile.key in reserved:
            reason = "the store's is of a newer autochunk, which this one cannot read"
            return ImportEntry(profile, None, "older", False, reason)
        return _import_entry(profile, mine.get(profile.key), prefer)

    return ImportPlan(tuple(map(entry, bundle.profiles)))


def _import_entry(profile: Profile, mine: Profile | None, prefer: Preference) -> ImportEntry:
    if mine is None:
        reason = "the store has none of this device and workload"
        return ImportEntry(profile, None, "new", True, reason)
    if profile == mine:
        return ImportEntry(profile, mine, "same", False, "the store has the very same")
    taken, reason = _decide(profile, mine, prefer)
    return ImportEntry(profile, mine, _relation(profile, mine), taken, reason)


def _relation(profile: Profile, mine: Profile) -> Relation:
    if profile.created == mine.created:
        return "conflicting"
    return "newer" if profile.created > mine.created else "older"


def _decide(theirs: Profile, ours: Profile, prefer: Preference) -> tuple[bool, str]:
    """Whether the bundle's profile is stored in place of ours, and why."""
    if prefer in ("theirs", "ours"):
        return prefer == "theirs", f"prefer is {prefer!r}"
    for criterion in _CRITERIA[prefer]:
        if _rank(theirs, criterion) != _rank(ours, criterion):
            reason = (
                f"{criterion} is {getattr(theirs, criterion)} in the bundle and "
                f"{getattr(ours, criterion)} in the store"
            )
            return _rank(theirs, criterion) > _rank(ours, criterion), reason
    equal = ", ".join(_CRITERIA[prefer])
    return False, f"different, but equal in {equal}; choose with prefer='theirs' or 'ours'"


def rank(profile: Profile, prefer: Preference) -> tuple[Any, ...]:
    """Of two profiles of one key, greater for the one that "newest" or "best-effort" prefers."""
    return tuple(_rank(profile, criterion) for criterion in _CRITERIA[prefer])


def _rank(profile: Profile, criterion: str) -> Any:
    return EFFORTS.index(profile.effort) if criterion == "effort" else getattr(profile, criterion)
