# One file for every channel and both architectures: `launcher image build CHANNEL` drives it, and so does
#   docker build --build-arg CHANNEL=stable .
# Only what the engine's own builder understands, too (no buildx): no RUN --mount, no here-documents, no TARGETARCH.

# CUDA's base variant: the driver's requirements and nothing else. torch's wheels bring CUDA, cuDNN and NCCL.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04


# ---- system: what the final image needs from the distribution (Debian or Ubuntu)
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS system
# gcc, g++ and Python's headers: triton and inductor compile at run time. libibverbs1, its providers and librdmacm1:
# NCCL over InfiniBand. pciutils: torchtitan calls lspci.
# Byte code with unchecked-hash: a squashfs has one time for all files, which makes byte code that is compared by
# time stale; Python would then compile it again at every start, as a read-only image cannot keep the result.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates g++ gcc ibverbs-providers libc6-dev libibverbs1 libpython3-dev librdmacm1 pciutils python3 \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/ldconfig /var/log/apt /var/log/*.log \
      /usr/share/man /usr/share/info /usr/share/locale \
 && find /usr/share/doc -type f ! -name copyright -delete \
 && python3 -B -W ignore -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.*


# ---- pip: a wheel that runs as it is; only to install with, so it stays out of the image
FROM system AS pip
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-pip-whl


# ---- the image
FROM system
ARG CHANNEL=stable
# Where the channel's torch comes from besides PyPI; empty for PyPI alone. INDEX_URL: a mirror of PyPI.
ARG EXTRA_INDEX_URL=""
ARG INDEX_URL=""
COPY containers/locks/${CHANNEL}-*.txt /tmp/locks/
COPY --from=pip /usr/share/python-wheels/pip-*.whl /tmp/pip/
# Into the system's site-packages below /usr/local: found whatever a login shell does to PATH, nothing to activate.
# Installed here and not copied from another stage: a copy of 6 GB costs minutes.
# Removed in the same layer, a gigabyte that no training loads: tests, debug symbols of triton, static libraries, the
# second and third cupti (triton's own profiler), cuSOLVER for several GPUs, NVRTC for old hosts.
RUN lock="/tmp/locks/${CHANNEL}-$(dpkg --print-architecture).txt" \
 && if [ ! -e "$lock" ]; then echo "no lock: containers/locks/${lock##*/}" >&2; exit 1; fi \
 && umask 022 \
 && PYTHONPATH="$(echo /tmp/pip/pip-*.whl)" PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -B -m pip install \
      --ignore-installed --no-deps --require-hashes --only-binary :all: --no-compile --no-cache-dir \
      --disable-pip-version-check --progress-bar off --retries 2 \
      ${INDEX_URL:+--index-url "$INDEX_URL"} ${EXTRA_INDEX_URL:+--extra-index-url "$EXTRA_INDEX_URL"} \
      --requirement "$lock" \
 && install -D -m 644 "$lock" /usr/local/share/titan/lock.txt \
 && rm -rf /tmp/locks /tmp/pip \
 && find /usr/local/lib/python3.* -type d -path '*-packages/*/tests' -prune -exec rm -rf {} + \
 && find /usr/local/lib/python3.* -path '*/triton/_C/*.so' -exec strip --strip-debug {} + \
 && find /usr/local/lib/python3.* ! -type d '(' -path '*/triton/*.a' -o -path '*/nvidia/*.a' -o -path '*/nvidia/lib/cupti*/*' \
      -o -name 'libcusolverMg.so.*' -o -name 'libnvrtc.alt.so.*' ')' -delete \
 && chmod -R a+rX,go-w /usr/local/lib/python3.* \
 && { python3 -B -W ignore -m compileall -q -j 0 -x '/tests?/' --invalidation-mode unchecked-hash \
        /usr/local/lib/python3.* || echo "what cannot be compiled is written for another Python"; }
COPY containers/check.py containers/describe.py containers/channels.toml /usr/local/share/titan/
# enroot reads these: without them no GPU, no IMEX channel and no InfiniBand device is visible inside. "void": none.
ARG VISIBLE_DEVICES=all
# PYTHONNOUSERSITE: a mounted home must not bring another torch from ~/.local.
ENV NVIDIA_VISIBLE_DEVICES=${VISIBLE_DEVICES} \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MELLANOX_VISIBLE_DEVICES=${VISIBLE_DEVICES} \
    PYTHONNOUSERSITE=1 \
    LANG=C.UTF-8 \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ARG SOURCE_REVISION=""
ARG SBOM=""
# RFC 3339, from SOURCE_DATE_EPOCH; never the time of the build.
ARG CREATED=""
# setuid and setgid bits: nobody in a training container may become root.
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
 && HOME=/nonexistent python3 -B /usr/local/share/titan/describe.py \
      --channel "$CHANNEL" --source-revision "$SOURCE_REVISION" --sbom "$SBOM" --created "$CREATED"
LABEL org.opencontainers.image.title="titan-${CHANNEL}" \
      org.opencontainers.image.description="torchtitan with its torch, for launcher submit --image" \
      org.opencontainers.image.revision="${SOURCE_REVISION}" \
      org.opencontainers.image.created="${CREATED}"
ENTRYPOINT []
CMD ["/bin/bash"]
WORKDIR /
