"""Building the container image, turning it into a squashfs, and reading what is in one."""

# Docker's word for an architecture -> uname's, which profiles use.
ARCHES = {"amd64": "x86_64", "arm64": "aarch64"}
DOCKER = {uname: docker for docker, uname in ARCHES.items()}
