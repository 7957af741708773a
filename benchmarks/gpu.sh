#!/bin/sh
# What only a GPU can tell, in order: node check, smoke test, quantization, one-GPU recipes. On a login node:
#     benchmarks/gpu.sh titan-stable-arm64.sqsh gb200
# NOT VERIFIED: nobody has run it on a GPU yet. What is expected is said before each step; the run directories keep what
# was found. More options of `launcher submit`: OPTIONS="--partition gpu --dry-run".
set -eu
image=${1:?benchmarks/gpu.sh IMAGE GPU} gpu=${2:?benchmarks/gpu.sh IMAGE GPU}
launcher=${LAUNCHER:-launcher}
failed=""

step() { # step EXPECTED NAME OPTION...
    echo "== $2: expected: $1"
    name=gpu-$gpu-$2
    shift 2
    # shellcheck disable=SC2086 # OPTIONS are words
    $launcher submit --image "$image" --gpu "$gpu" --nodes 1 --name "$name" --follow --data sample --tokenizer sample \
        ${OPTIONS:-} "$@" || failed="$failed $name"
}

echo "== image: expected: the quantizations that it can do, and no check that failed"
$launcher image inspect "$image" --gpu "$gpu"

step "titan-node: OK, the speed of matrix products within 10% of the profile's, 20 steps whose loss falls" \
    check --recipe debug --check full
step "COMPLETED; loss of step 20 below that of step 2; no warning of torch.compile or triton" \
    compile --recipe debug --check off --set recipe.compile=true

# 8 billion parameters take 96 GB with gradients and optimiser: one GPU of 140 GB or more.
one="--gpus-per-node 1 --batch-size 1 --steps 20 --check off --set recipe.log_freq=5"
case $gpu in
    h100 | a100) echo "== one GPU: 8B does not fit into 80 GB" ;;
    *)
        # shellcheck disable=SC2086 # words
        {
            step "COMPLETED; memory about 124 GiB (launcher plan); the loss falls; the next steps are compared with it" \
                bf16 --recipe llama3-8b $one
            step "more tokens/s than bf16 (published: +7 to 16%)" \
                compile-8b --recipe llama3-8b $one --set recipe.compile=true
            step "more than compile-8b; the loss close to it" \
                float8 --recipe llama3-8b-fast $one --set recipe.quantize=float8
        }
        ;;
esac
case $gpu in
    gb200 | gb300 | b200 | b300)
        # shellcheck disable=SC2086 # words
        {
            step "more than compile-8b; no error about torchao::mxfp8_quantize in the first backward pass" \
                mxfp8 --recipe llama3-8b-fast $one --set recipe.quantize=mxfp8
            step "more than mxfp8, less memory (published: 36 to 41% below bf16); the loss close to compile-8b's" \
                nvfp4 --recipe llama3-8b-nvfp4 $one
        }
        ;;
esac

$launcher results || true
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
