"""Many runs as one sweep: ``python -m dms_lab.sweep submit|status|collect|cancel experiments/<name> [key=value ...]``.

submit   expands sweep.yaml, checks every point, submits what is neither done nor queued; returns at once
status   what ran, runs, failed and why; exit status 1 if a point failed
collect  writes results.csv beside sweep.yaml: every row of every point once
cancel   ends the sweep's own jobs; the same submit goes on later

key=value: cluster=local|slurm, workers=<points at a time on this machine>, resources.<key>=<value> as in conf/cluster.
"""

import argparse
import itertools
import json
import sys
import time

_SECONDS_BETWEEN = {"local": 1.0, "slurm": 10.0}  # two looks at the jobs, or more: a look takes a hundredth of the time
_SHARE = 0.01
_PATIENCE_SECONDS = 1800.0  # with a queue that does not answer: a controller that is started anew
_STOPPED = 130
COMMANDS = ("submit", "status", "collect", "cancel")


def main(words: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. A `ValueError` ends it with one sentence and 1."""
    asked = _parser().parse_args(words)
    try:
        from dms_lab.sweep_config import load_sweep
        from dms_lab.sweeping.points import expand

        sweep = load_sweep(asked.place, asked.overrides)
        return globals()[f"_{asked.command}"](asked, sweep, expand(sweep))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dms_lab.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("place", help="a sweep's folder with sweep.yaml in it, or another sweep file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="cluster=, workers=, resources.<key>=")
        if name == "submit":
            command.add_argument("--dry-run", action="store_true", help="print the plan: jobs, tokens, GPU-hours, disk")
            command.add_argument("--take-over", action="store_true", help="submit what a lost machine had been given, too")
            command.add_argument("--wait", action="store_true", help="stay until every job has ended, with progress")
        if name == "status":
            command.add_argument("--json", action="store_true", help="for scripts: one object a point")
        if name == "collect":
            command.add_argument("--strict", action="store_true", help="exit status 1 if a point is missing")
    return parser


def _submit(asked: argparse.Namespace, sweep, points) -> int:
    from dms_lab.sweeping import local, slurm
    from dms_lab.sweeping.records import submitting
    from dms_lab.sweeping.state import point_states

    if asked.dry_run:
        from dms_lab.sweeping.plan import print_plan

        print_plan(sweep, point_states(sweep, points))
        return 0
    with submitting(sweep):
        states = point_states(sweep, points)
        elsewhere = [state for state in states if state.state == "elsewhere"]
        todo = [state.point for state in states if state.is_free or (asked.take_over and state in elsewhere)]
        if todo:
            (slurm if sweep.cluster == "slurm" else local).submit(sweep, todo)
    done, active = sum(state.state == "done" for state in states), sum(state.is_active for state in states)
    print(f"{sweep.name}: {len(todo)} of {len(points)} points submitted, {done} done, {active} queued or running already")
    if elsewhere and not asked.take_over:
        print(
            f"{len(elsewhere)} points are left to {', '.join(sorted({state.job.host for state in elsewhere}))}, where they "
            "were submitted; ask for the status there, or add --take-over if nothing runs there any more"
        )
    if asked.wait:
        return _wait(sweep, points)
    if todo:
        print(f"python -m dms_lab.sweep status {asked.place}")
    return 0


def _wait(sweep, points) -> int:
    """Stays until no job is queued or running, shows how far they are, and returns what `status` would."""
    from rich.live import Live

    from dms_lab.sweeping.tables import console, print_states, states_table

    try:
        states = _answered(sweep, points)
        with Live(states_table(sweep, states), console=console(), transient=True) as live:
            taken = 0.0
            while any(state.is_active for state in states):
                time.sleep(max(_SECONDS_BETWEEN[sweep.cluster], taken / _SHARE))
                began = time.process_time()
                states = _answered(sweep, points)
                taken = time.process_time() - began
                live.update(states_table(sweep, states))
    except KeyboardInterrupt:
        print("the jobs go on", file=sys.stderr)
        return _STOPPED
    print_states(sweep, states)
    return int(any(state.state != "done" for state in states))


def _answered(sweep, points):
    """As `point_states`, where a queue that cannot be asked is asked again for half an hour."""
    from dms_lab.sweeping.slurm import QueueError
    from dms_lab.sweeping.state import point_states

    began = time.monotonic()
    for attempt in itertools.count():
        try:
            return point_states(sweep, points)
        except QueueError as error:
            if time.monotonic() - began > _PATIENCE_SECONDS:
                raise
            if attempt == 0:
                print(f"{error}; it is asked again until it answers", file=sys.stderr)
            time.sleep(_SECONDS_BETWEEN[sweep.cluster])


def _status(asked: argparse.Namespace, sweep, points) -> int:
    from dms_lab.sweeping.state import point_states

    states = point_states(sweep, points)
    if asked.json:
        print(json.dumps([state.plain() for state in states], indent=1))
    else:
        from dms_lab.sweeping.tables import print_states

        print_states(sweep, states)
    return int(any(state.state == "failed" for state in states))


def _collect(asked: argparse.Namespace, sweep, points) -> int:
    from dms_lab.sweeping.collect import collect

    num_rows, kept, missing = collect(sweep, points)
    print(f"{sweep.results}: {num_rows} rows of {len(points) - len(missing)} points")
    if kept:
        print(f"{len(kept)} of these points have no finished run here; their rows are those of before", file=sys.stderr)
    for point in missing:
        print(f"missing: {point.name} ({' '.join(point.overrides)})", file=sys.stderr)
    return int(asked.strict and bool(missing))


def _cancel(asked: argparse.Namespace, sweep, points) -> int:
    from dms_lab.sweeping import local, slurm
    from dms_lab.sweeping.records import load_jobs

    count = 0
    for module, cluster in ((slurm, "slurm"), (local, "local")):
        jobs = [job for job in load_jobs(sweep) if job.cluster == cluster]
        known = module.job_states(sweep, jobs)
        active = [job for job in jobs if known[job.job_id].is_active]
        module.cancel(sweep, active)
        count += len(active)
        for host in sorted({job.host for job in jobs if known[job.job_id].is_elsewhere}):
            print(f"jobs that were submitted on {host} are cancelled there", file=sys.stderr)
    print(f"{sweep.name}: {count} jobs cancelled; the same submit goes on where they stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
