#!/usr/bin/env bash
# On a machine with CUDA 13: installs MLX and torch into an environment of their own, checks what MLX computes against
# references, and times a step and a decoding beside torch and diffusers. It ends within nine minutes.
#
#     bash benchmarks/gpu.sh [FOLDER]      FOLDER is the environment's (build/gpu), kept for the next time
set -euo pipefail
cd "$(dirname "$0")/.."

limit=540
folder=${1:-build/gpu}
python="$folder/bin/python"

if ! nvidia-smi > /dev/null 2>&1; then
    echo "there is no NVIDIA GPU here (nvidia-smi fails): run python -m benchmarks.gpu --device cpu --shape tiny" >&2
    exit 2
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

python3 -m venv "$folder"
requirements="$folder/requirements.txt"
sed 's/mlx\[cpu\]/mlx[cuda13]/' requirements.txt > "$requirements"
grep -E '^(torch|diffusers|transformers)==' tests/requirements.txt >> "$requirements"
if ! timeout 300 "$folder/bin/pip" install -q -r "$requirements"; then
    echo "installing failed or took more than 300 s: run it again, and it goes on with what pip has kept" >&2
    exit 1
fi
echo "installed after $SECONDS s"

export SD_DEVICE=gpu
timeout 120 "$python" -m stable_diffusion check || echo "the check ended with $? (1: values outside their bounds)"
echo "checked after $SECONDS s"
"$python" -m benchmarks.gpu --seconds "$((limit - SECONDS - 10))"
echo "done after $SECONDS s"
