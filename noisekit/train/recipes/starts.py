"""Arms that start from other arms: in which order they run, and what may be wrong."""

from collections.abc import Iterator, Mapping

from noisekit.train.recipes.design import ArmSeedsSpec, ArmSpec, SeedsSpec, StartSpec
from noisekit.train.recipes.parsing import ParsedSections
from noisekit.train.recipes.recipe_errors import Fault, not_one_of
from noisekit.train.recipes.run_spec import RunSections


def origins(arms: Mapping[str, RunSections]) -> dict[str, str]:
    """Return, for each arm that starts from another, the other's name."""
    return {name: run.start.arm for name, run in arms.items() if run.start is not None}


def chain(arm: str, origin_of: Mapping[str, str]) -> list[str]:
    """Return the arms that an arm starts from, one from the other.

    A cycle ends with the arm that closes it.
    """
    names = [arm]
    while (origin := origin_of.get(names[-1])) is not None:
        names.append(origin)
        if origin in names[:-1]:
            break
    return names[1:]


def with_seeds_of_origins(
    arms: tuple[ArmSpec, ...], origin_of: Mapping[str, str], seeds: SeedsSpec
) -> tuple[ArmSpec, ...]:
    """Return the arms; one without seeds of its own has those of its origin.

    What an arm has differently from the recipe is stated in full.
    """
    own = {arm.name: arm.seeds for arm in arms}

    def seeds_of(arm: ArmSpec) -> ArmSeedsSpec | None:
        behind = (arm.name, *chain(arm.name, origin_of))
        stated = next((own[name] for name in behind if own.get(name)), None)
        if stated is None:
            return None
        found = seeds.of_arm(stated)
        return ArmSeedsSpec(first=found.start, count=len(found))

    return tuple(arm.model_copy(update={"seeds": seeds_of(arm)}) for arm in arms)


def kept_optimizers(arms: Mapping[str, RunSections]) -> dict[str, tuple[str, ...]]:
    """Return, by arm, the snapshots at which others take the optimizer's state over."""
    kept: dict[str, list[str]] = {}
    for run in arms.values():
        if run.start is not None and run.start.optimizer == "keep":
            kept.setdefault(run.start.arm, []).append(run.start.snapshot)
    return {arm: tuple(dict.fromkeys(names)) for arm, names in kept.items()}


def start_faults(
    arms: tuple[ArmSpec, ...],
    sections: Mapping[str, ParsedSections],
    seeds: SeedsSpec | None,
) -> Iterator[Fault]:
    """Yield what is wrong with where arms start.

    Args:
        arms: The arms.
        sections: Their sections, as far as they could be parsed.
        seeds: Seeds of the recipe, if they could be parsed.
    """
    runs = {name: parsed.assembled() for name, parsed in sections.items()}
    origin_of = origins(runs)
    by_name = {}
    if seeds is not None:
        resolved = with_seeds_of_origins(arms, origin_of, seeds)
        by_name = {arm.name: arm for arm in resolved}
    for name, origin in origin_of.items():
        key = f"arms.{name}.start"
        start = runs[name].start
        assert start is not None
        behind = chain(name, origin_of)
        if origin not in runs:
            yield Fault(f"{key}.arm", not_one_of("an arm", origin, runs))
        elif name in behind:
            words = ", which starts from ".join(map(repr, behind))
            yield Fault(f"{key}.arm", f"{name!r} starts from {words}: a cycle")
        else:
            yield from _faults_at_origin(key, start, sections[name], sections[origin])
            if seeds is not None:
                yield from _seed_faults(name, origin, by_name, seeds)


def _faults_at_origin(
    key: str, start: StartSpec, fork: ParsedSections, origin: ParsedSections
) -> Iterator[Fault]:
    here, there = fork.assembled(), origin.assembled()
    known = there.snapshot_names if origin.having(("snapshots", "training")) else ()
    if known and start.snapshot not in known:
        text = not_one_of(f"a snapshot of arm {start.arm!r}", start.snapshot, known)
        yield Fault(f"{key}.snapshot", text)
    both = (fork, origin)
    if all(arm.having(("model",)) for arm in both) and here.model != there.model:
        yield Fault(
            f"{key}.arm",
            f"needs an arm with the same [model], whose weights fit; {start.arm!r} has "
            "another",
        )
    if start.optimizer == "keep" and all(arm.having(("optimizer",)) for arm in both):
        names = here.optimizer.name, there.optimizer.name
        if names[0] != names[1]:
            yield Fault(
                f"{key}.optimizer",
                f"'keep' needs the optimizer of arm {start.arm!r}, {names[1]!r}, got "
                f"{names[0]!r}; use 'reset'",
            )


def _seed_faults(
    name: str, origin: str, arms: Mapping[str, ArmSpec], seeds: SeedsSpec
) -> Iterator[Fault]:
    wanted, there = (seeds.of_arm(arms[arm].seeds) for arm in (name, origin))
    missing = sorted(set(wanted) - set(there))
    if missing:
        yield Fault(
            f"arms.{name}.seeds",
            f"needs seeds of arm {origin!r}, from whose runs it starts "
            f"({there.start} to {there.stop - 1}), got {missing[0]} as well; give "
            f"{origin!r} more, or this arm fewer",
        )
