"""How a command enters its environment on a node: Pyxis, Apptainer, or none."""

from __future__ import annotations

from launcher.config.spec import PlacedRun, RunSpec


def mounts(spec: PlacedRun) -> list[str]:
    """SRC:DST[:FLAGS] of everything the container must see, run directory first.

    Sources have their links resolved (`spec.sources`): the target of a link lies outside the container.
    """
    wanted = [f"{spec.run_dir}:{spec.run_dir}"]
    own = [f"{spec.profile.scratch}:{spec.profile.scratch}"] if spec.profile.scratch else []
    theirs = [mount.split(":")[1].rstrip("/") for mount in (*spec.profile.mounts, *spec.job.mounts)]
    for path in (spec.data_path, spec.tokenizer_path, spec.job.init_from, spec.job.checkpoint_dir):
        covered = any(path == target or path.startswith(f"{target}/") for target in (spec.run_dir, *theirs))
        if path.startswith("/") and not covered:  # not "hub", not s3://
            wanted.append(f"{spec.sources.get(path, path)}:{path}{'' if path == spec.job.checkpoint_dir else ':ro'}")
    return list(dict.fromkeys([*wanted, *own, *spec.profile.mounts, *spec.job.mounts]))


def host_path(spec: RunSpec, path: str) -> str:
    """Where `path`, as the job sees it, is outside the container: a mount of the user's or the profile's may move
    it.
    """
    if spec.job.runtime == "bare":
        return path
    moved = [mount.split(":")[:2] for mount in (*spec.profile.mounts, *spec.job.mounts)]
    inside = [
        (target.rstrip("/"), source) for source, target in moved if f"{path}/".startswith(f"{target.rstrip('/')}/")
    ]
    if not inside:
        return path
    target, source = max(inside, key=lambda pair: len(pair[0]))  # the innermost hides the others
    return source.rstrip("/") + path[len(target) :] or "/"


def srun_flags(spec: PlacedRun) -> list[str]:
    """Pyxis' options of srun; empty for the other runtimes."""
    if spec.job.runtime != "pyxis":
        return []
    names = sorted({*spec.env, *spec.secret_env})
    return [
        f"--container-image={spec.job.image}",
        f"--container-mounts={','.join(mounts(spec))}",
        f"--container-workdir={spec.run_dir}",
        "--no-container-mount-home",
        # A variable of the image's own environment wins over the job's unless it is named here.
        *([f"--container-env={','.join(names)}"] if names else []),
    ]


def node_command(spec: PlacedRun) -> list[str]:
    """The command that runs once on each node, container start included where srun does not do it."""
    return _entered(spec, [spec.job.python, f"{spec.run_dir}/job/node.py", f"{spec.run_dir}/job/node.json"])


def again_command(spec: PlacedRun) -> list[str]:
    """The command that decides what follows an attempt; with Pyxis it has srun's flags, as the node's has."""
    return _entered(spec, [spec.job.python, f"{spec.run_dir}/job/again.py", spec.run_dir])


def _entered(spec: PlacedRun, entry: list[str]) -> list[str]:
    """`entry` in the image, where srun does not start it there."""
    if spec.job.runtime != "apptainer":
        return entry
    # A variable of the image's own environment wins over the job's unless it comes with this prefix.
    env = [f"APPTAINERENV_{name}={value}" for name, value in sorted(spec.env.items())]
    # Without --no-eval those values are evaluated by a shell. --no-home alone still mounts a home that is the working
    # directory, as it is for whoever submits from there. /dev comes whole: InfiniBand, IMEX channels; /tmp is the
    # node's.
    options = ["--no-eval", "--no-mount", "home,cwd", *(["--nv"] if spec.profile.device == "cuda" else [])]
    binds = [part for mount in mounts(spec) for part in ("--bind", mount)]
    command = ["apptainer", "exec", *options, *binds, "--pwd", spec.run_dir, spec.job.image, *entry]
    return ["env", *env, *command] if env else command
