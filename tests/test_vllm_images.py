"""Images in prompts: their tokens are positions as vLLM counts them, each with a row of the stream that is steered and read."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm_engines import CLOSE_SCORE, ENVIRONMENT, environment, fields, needs_vllm, reads, tiny_probes, unit

import steerfast as sf

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS, IMAGE, QUERIES = 5, 3, 4


def build(folder: Path) -> tuple[Any, Any]:
    """A BLIP-2 with an OPT of three layers, and its processor: an image is four tokens before the text."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    seen = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    text = transformers.OPTConfig(
        vocab_size=128,
        hidden_size=128,
        ffn_dim=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=128,
        max_position_embeddings=256,
        init_std=0.1,
    )
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**seen, image_size=16, patch_size=8).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(**seen, vocab_size=128, encoder_hidden_size=32).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = transformers.Blip2ForConditionalGeneration(config).float().eval()
    torch.nn.init.normal_(model.query_tokens)
    torch.nn.init.normal_(model.language_projection.weight, std=0.3)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE, **{f"w{i}": i for i in range(4, 128)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    pictures = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    processor = transformers.Blip2Processor(image_processor=pictures, tokenizer=fast, num_query_tokens=QUERIES)
    processor.save_pretrained(folder)
    return model, processor


def plans(folder: Path, top: Any) -> dict[str, sf.Plan]:
    v, w = unit(1, 128), unit(2, 128)
    lean = sf.probes.LinearProbe(unit(11, 128), place=0)
    made = {
        "add": sf.Plan({1: sf.Add(v, 15.0)}),
        "norm": sf.Plan({0: sf.Add(w, 4.0, keep_norm=True), 2: sf.Ablate(torch.stack([v, w]))}),
        "held": sf.Plan({1: sf.WhenToken(sf.Condition(lean, 0.05, release=-0.05), sf.Add(v, 15.0))}),
        "once": sf.Plan({1: sf.When(sf.Condition(lean, 0.0), sf.Add(w, 15.0)), 2: sf.Add(v, 9.0)}),
        "rows": sf.Plan({1: sf.Add(torch.stack([unit(seed, 128) for seed in range(3, 9)]), 15.0)}),
        "top": sf.Plan({2: sf.EditFeatures(top, {3: 4.0, 9: 2.0})}),
    }
    for name, plan in made.items():
        plan.save(folder / name)
    return made


def test_the_tokens_of_an_image_are_positions_like_any(tmp_path: Path) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    model, processor = build(tmp_path / "model")
    probes = {name: probe for name, probe in tiny_probes(tmp_path / "all", tmp_path / "saes").items() if name != "sure"}
    for name, probe in probes.items():
        probe.save(tmp_path / "probes" / name)
    made = plans(tmp_path / "plans", probes["top"].sae)
    wheres = [
        "all",
        f"0:{QUERIES}",
        f"{QUERIES}",
        f"ids:{IMAGE}",
        f"!ids:{IMAGE} & prompt",
        f"after:ids:{IMAGE}",
        "generated",
    ]
    asked: list[tuple[str | None, str | None]] = [(None, None), *((name, None) for name in made)]
    asked += [("add", where) for where in wheres]
    draw, numbers = random.Random(0), np.random.default_rng(0)
    pictures = [Image.fromarray(numbers.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in asked]
    texts = [" ".join(f"w{draw.randrange(4, 128)}" for _ in range(4 + i % 4)) for i in range(len(asked))]
    wanted = [
        truth(model, processor(text=t, images=p, return_tensors="pt"), made, *ask)
        for t, p, ask in zip(texts, pictures, asked, strict=True)
    ]
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    with environment(**ENVIRONMENT, **folders, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = LLM(
            str(tmp_path / "model"),
            dtype="float32",
            max_model_len=64,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
        )
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        wishes = [
            reads(*probes)
            | ({} if name is None else fields((name, 1.0)))
            | ({} if where is None else {"steer_positions": where})
            for name, where in asked
        ]
        outputs = llm.generate(
            [{"prompt": t, "multi_modal_data": {"image": p}} for t, p in zip(texts, pictures, strict=True)],
            [SamplingParams(**common, extra_args=wish) for wish in wishes],
            use_tqdm=False,
        )
        llm.llm_engine.engine_core.shutdown()
    plain = [
        truth(model, processor(text=t, images=p, return_tensors="pt"), made, None, None)
        for t, p in zip(texts, pictures, strict=True)
    ]
    assert sum(one != other for one, other in zip(wanted, plain, strict=True)) >= len(asked) // 2
    for ask, text, picture, output, tokens in zip(asked, texts, pictures, outputs, wanted, strict=True):
        inputs = processor(text=text, images=picture, return_tensors="pt")
        assert list(output.prompt_token_ids) == inputs["input_ids"][0].tolist()
        assert list(output.outputs[0].token_ids) == tokens, ask
        assert_read(model, inputs, tokens, output, probes, made, *ask)


def steering(
    model: Any, prompt: int | None, made: dict[str, sf.Plan], name: str | None, where: str | None
) -> ExitStack:
    stack = ExitStack()
    if name is not None:
        plan = sf.Plan(made[name].edits, made[name].positions if where is None else where)
        stack.enter_context(sf.steer(model, plan) if prompt is None else sf.steer(model, plan, prompt_length=prompt))
    return stack


@torch.inference_mode()
def truth(model: Any, inputs: Any, made: dict[str, sf.Plan], name: str | None, where: str | None) -> list[int]:
    """What transformers generates, token by token, each from a whole pass."""
    ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1]
    with steering(model, prompt, made, name, where):
        for _ in range(TOKENS):
            logits = model(
                input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)
            ).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt:].tolist()


@torch.inference_mode()
def assert_read(
    model: Any, inputs: Any, tokens: list[int], output: Any, probes: dict[str, Any], made: Any, *ask: Any
) -> None:
    prompt = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]])], 1)
    with steering(model, prompt, made, *ask), sf.read(model, probes) as reading:
        model(input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids))
        scores = reading.scores()
    for name, found in output.kv_transfer_params["steerfast"].items():
        values = scores[name].values[0]
        assert found["positions"] == [*range(ids.shape[1])], name
        within = CLOSE_SCORE * max(1.0, float(values.abs().max()))
        assert (torch.tensor(found["scores"]).reshape(values.shape) - values).abs().max() < within, (name, ask)
