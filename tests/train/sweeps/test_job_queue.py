"""The order of runs that start one from the other, with runs that fail."""

import random
from pathlib import Path

import pytest

from noisekit.core.errors import RunFailedError
from noisekit.records import RunDirectory, RunStatus
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.sweeps import executors, sweep
from noisekit.train.sweeps.cost import longest_chain
from noisekit.train.sweeps.job_queue import Job, JobOutcome, JobQueue
from noisekit.train.sweeps.run_status import status
from tests.train.run_specs import run_spec

FORKS = Path(__file__).parents[1] / "forks.toml"


def job(name: str, origin: str = "") -> Job:
    start = {"arm": origin, "snapshot": "final"} if origin else None
    spec = run_spec(run_id=f"{name}-seed0", arm=name, start=start)
    return Job(spec, Path(name))


def done(job: Job) -> JobOutcome:
    return JobOutcome(job.spec.run_id, RunStatus.DONE)


def failed(job: Job, reason: str = "broken") -> JobOutcome:
    return JobOutcome(job.spec.run_id, RunStatus.FAILED, reason)


def name_of(job: Job | None) -> str | None:
    return None if job is None else job.spec.arm


def test_jobs_begin_in_order_as_far_as_they_can() -> None:
    """Catches: a fork beside its trunk; a ready job that waits behind another."""
    trunk, other = job("trunk"), job("other")
    queue = JobQueue([job("fork", "trunk"), trunk, other, job("late", "fork")])
    assert [name_of(queue.take()) for _ in range(3)] == ["trunk", "other", None]
    assert queue.num_ready == 0
    assert queue.end(done(other)) == []
    assert queue.take() is None
    queue.end(done(trunk))
    assert queue.num_ready == 1
    fork = queue.take()
    assert name_of(fork) == "fork"
    assert fork is not None
    queue.end(JobOutcome("fork-seed0", RunStatus.SKIPPED))
    assert name_of(queue.take()) == "late"
    assert len(queue) == 0


def test_what_is_not_in_the_queue_counts_as_complete() -> None:
    """Catches: a resume that waits for a trunk which it never executes."""
    queue = JobQueue([job("fork", "trunk")])
    assert name_of(queue.take()) == "fork"


def test_a_failure_takes_along_what_needs_it_and_nothing_else() -> None:
    """All that start from a failed run fail, directly or not, with its reason.

    Catches: runs that wait for ever; a grandchild that runs; a stranger that fails.
    """
    trunk = job("trunk")
    jobs = [trunk, job("fork", "trunk"), job("late", "fork"), job("other")]
    queue = JobQueue(jobs)
    assert queue.take() is trunk
    stuck = queue.end(failed(trunk))
    assert [(item.spec.arm, reason) for item, reason in stuck] == [
        ("fork", "run trunk-seed0, which it starts from, failed: broken"),
        ("late", "run fork-seed0, which it starts from, failed: broken"),
    ]
    assert name_of(queue.take()) == "other"
    assert len(queue) == 0


def test_random_graphs_end_with_every_job_once() -> None:
    """Over random forests and failures, each job ends once, after what it needs.

    Catches: a job that is lost or given twice, which one example does not show.
    """
    draw = random.Random(0)
    for _ in range(60):
        names = [f"arm{i}" for i in range(draw.randint(1, 12))]
        parents = {name: draw.choice(["", *names[:i]]) for i, name in enumerate(names)}
        jobs = [job(name, parents[name]) for name in names]
        draw.shuffle(jobs)
        queue, running, ended = JobQueue(jobs), list[Job](), dict[str, bool]()
        while len(queue) or running:
            while len(running) < 3 and (item := queue.take()) is not None:
                needed = parents[item.spec.arm]
                assert not needed or ended[needed]
                running.append(item)
            assert running, "nothing is ready and nothing runs"
            item = running.pop(draw.randrange(len(running)))
            good = draw.random() < 0.7
            assert item.spec.arm not in ended
            ended[item.spec.arm] = good
            for stuck, _ in queue.end(done(item) if good else failed(item)):
                assert stuck.spec.arm not in ended
                ended[stuck.spec.arm] = False
        assert ended.keys() == set(names)


def one_seed() -> Recipe:
    return load_recipe(FORKS, overrides={"seeds.count": "1"})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_trunk_fails_its_forks_and_resume_mends_all(
    workers: int, tmp_path: Path
) -> None:
    """With a seed whose trunk cannot be written, the other seed's runs are complete.

    Catches: forks that run without a start; a sweep that hangs; a resume that leaves
    them failed.
    """
    recipe = load_recipe(FORKS)
    place = tmp_path / "runs/trunk-seed0"
    place.mkdir(parents=True)
    blocker = place / "checkpoints"
    blocker.write_text("a file where a directory has to be")
    heard: list[ProgressEvent] = []
    with pytest.raises(RunFailedError) as caught:
        sweep.run(recipe, tmp_path, workers=workers, progress=heard.append)
    assert "10 of 20 runs failed" in str(caught.value)
    by_id = {row.run_id: row for row in status(tmp_path)}
    assert {row.status for row in by_id.values()} == {"done", "damaged", "failed"}
    reason = by_id["fork.snapshot-mid.order-1.batch_size-4-seed0"].detail
    assert reason.startswith("run trunk-seed0, which it starts from, failed: ")
    last = by_id["second-seed0"].detail
    assert last.startswith("run fork.snapshot-mid.order-1.batch_size-4-seed0, which it")
    ends = [event.run_id for event in heard if event.phase in {"done", "failed"}]
    assert sorted(ends) == sorted(by_id)

    blocker.unlink()
    runs = sweep.resume(tmp_path, workers=0)
    assert set(runs.runs["status"]) == {"done"}
    assert runs.faults == []


def test_status_says_what_a_run_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: forks that are shown as missing while their trunk is at work."""

    def refuse(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executors, "execute", refuse)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(one_seed(), tmp_path, workers=0)
    rows = {row.run_id: (row.status, row.detail) for row in status(tmp_path)}
    assert rows["trunk-seed0"] == ("created", "")
    assert rows["second-seed0"] == (
        "waiting",
        "for run fork.snapshot-mid.order-1.batch_size-4-seed0",
    )
    assert rows["fork.snapshot-mid.order-1.batch_size-4-seed0"] == (
        "waiting",
        "for run trunk-seed0",
    )


def test_a_chain_bounds_the_time_from_below() -> None:
    """Many workers do not shorten trunk, fork and fork's fork.

    Catches: a time that divides the work by workers which have nothing to do.
    """
    specs = one_seed().run_specs()
    seconds = {spec.run_id: 1.0 for spec in specs} | {"second-seed0": 5.0}
    assert longest_chain(specs, seconds) == 7.0


def test_what_a_kill_left_behind_is_removed(tmp_path: Path) -> None:
    """A run that was killed between its last word and its tidying is tidied.

    Catches: checkpoints of complete runs that stay on the disk for ever.
    """
    runs = sweep.run(one_seed(), tmp_path, workers=0)
    left = runs.directories[0].checkpoints / "update-000000012.safetensors"
    left.write_bytes(b"a checkpoint")
    before = runs.directories[0].manifest
    sweep.resume(tmp_path, workers=0)
    assert not left.exists()
    assert RunDirectory.open(left.parents[1]).manifest == before
