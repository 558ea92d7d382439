#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, tokenizers 0.23.3: a GGUF file names in tokenizer.ggml.pre the rule that cuts text before its
# merges apply. The reader of the tokenizer is to split text the way the merges were learned; for names that its table does not
# hold, as stablelm2, deepseek-llm, deepseek-coder, command-r or falcon, it takes the rule of GPT-2 without a word. In llama.cpp
# the names qwen2 and stablelm2 stand for one rule: here the same vocabulary, merges and text give other tokens under the second,
# and such a model reads its prompts in pieces that it was not trained on.
#
# Seen: qwen2          17 tokens, learnt with 17; the same
#       stablelm2      30 tokens, learnt with 17; others
#       deepseek-coder 30 tokens, learnt with 17; others
#       learnt    ['def', ' mean', '(rows', '):\n\n', '   ', ' return', ' sum', '(rows', ');\n\n']
#       stablelm2 ['def', ' mean', '(', 'rows', '):', '\n\n', '   ', ' return', ' sum']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 2> /dev/null
cd "$folder"
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import json
import sys

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
learnt = Tokenizer(models.BPE())
learnt.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
learnt.decoder = decoders.ByteLevel()
lines = ["def mean(rows):\n\n    return sum(rows);\n\n", "(it's) the rows' mean\n\n\n", "x.append(y)\n    x.pop()\n\n"]
trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
learnt.train_from_iterator(lines * 50, trainer)
state = json.loads(learnt.to_str())["model"]


def read(pre):
    """The tokenizer of a GGUF file that names this rule."""
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")


text = lines[0] + lines[2]
expected = learnt.encode(text).ids
found = {}
for pre in ("qwen2", "stablelm2", "deepseek-coder"):
    found[pre] = read(pre)(text, add_special_tokens=False)["input_ids"]
    same = "the same" if found[pre] == expected else "others"
    print(f"{pre:<14} {len(found[pre])} tokens, learnt with {len(expected)}; {same}")
shown = [learnt.decode(found["stablelm2"][i : i + 1]) for i in range(9)]
print(f"learnt    {[learnt.decode([i]) for i in expected[:9]]}")
print(f"stablelm2 {shown}")
sys.exit(0 if found["qwen2"] == expected and found["stablelm2"] != expected else 1)
PYTHON
