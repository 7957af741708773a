#!/bin/bash
# Installs the system packages that the tests use, where that is possible; otherwise says which tests will be skipped.
set -euo pipefail

# package: the program that proves it is there
packages=(
  shellcheck:shellcheck squashfs-tools:mksquashfs iproute2:ip gcc:gcc munge:munged slurmctld:slurmctld slurmd:slurmd
  slurm-client:sbatch libslurm-dev: mmdebstrap:mmdebstrap arch-test:arch-test docker.io:dockerd
  qemu-user-static:qemu-aarch64-static docker-registry:docker-registry squashfuse:squashfuse
  chromium:chromium
)
missing=()
for entry in "${packages[@]}"; do
  program=${entry#*:}
  if [ -n "$program" ]; then
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("${entry%%:*}")
  elif [ ! -e /usr/include/slurm/spank.h ]; then
    missing+=("${entry%%:*}")
  fi
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  if [ ! -e /usr/sbin/policy-rc.d ]; then # the tests start their own Slurm: the packages' services must not
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "not installed: ${missing[*]}"
  echo "the tests that need them are skipped; to run them all: apt-get install ${missing[*]}"
fi
