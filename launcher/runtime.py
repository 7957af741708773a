"""How a command enters its environment on a node: Pyxis, Apptainer, or none."""

from __future__ import annotations

from launcher.spec import HUB, RunSpec


def mounts(spec: RunSpec) -> list[str]:
    """SRC:DST[:FLAGS] of everything the container must see, run directory first.

    Sources have their links resolved (`spec.resolved`): the target of a link lies outside the container.
    """
    wanted = [f"{spec.run_dir}:{spec.run_dir}"]
    theirs = [mount.split(":")[1].rstrip("/") for mount in spec.job.mounts]
    for path in (spec.data_path, spec.tokenizer_path):
        covered = any(path == target or path.startswith(f"{target}/") for target in (spec.run_dir, *theirs))
        if path != HUB and not covered:
            wanted.append(f"{spec.resolved.get(path, path)}:{path}:ro")
    return list(dict.fromkeys([*wanted, *spec.profile.mounts, *spec.job.mounts]))


def srun_flags(spec: RunSpec) -> list[str]:
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


def node_command(spec: RunSpec) -> list[str]:
    """The command that runs once on each node, container start included where srun does not do it."""
    entry = [spec.job.python, f"{spec.run_dir}/job/node.py", f"{spec.run_dir}/job/node.json"]
    if spec.job.runtime != "apptainer":
        return entry
    binds = [part for mount in mounts(spec) for part in ("--bind", mount)]
    gpu = ["--nv"] if spec.profile.device == "cuda" else []
    return ["apptainer", "exec", "--no-home", *gpu, *binds, "--pwd", spec.run_dir, spec.job.image, *entry]
