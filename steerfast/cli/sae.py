"""`steerfast sae collect | train | eval | explain | steer | info`: an SAE from training to steering on the command line."""

from __future__ import annotations

import argparse
import hashlib
import os
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from steerfast.edits.features import Amplify, Calibrate, EditFeatures
from steerfast.hooks.steer import steer
from steerfast.models.layers import home
from steerfast.plan import Plan
from steerfast.sae.detection import Detection, detect
from steerfast.sae.documents import read_documents
from steerfast.sae.evaluate import evaluate_sae
from steerfast.sae.evidence import Evidence, ObserveConfig, observe
from steerfast.sae.explanation import RANKINGS, Explanations, explain
from steerfast.sae.judge import Judge, judged_detection
from steerfast.sae.model import SAE
from steerfast.sae.page import write_page
from steerfast.sae.relations import relate
from steerfast.sae.transcoder import Transcoder
from steerfast.sae.use import explain_use

from . import sae_collect, sae_train, shared

DESCRIPTION = (
    "Train, measure, explain and use a sparse autoencoder. Reads SAEs of every family that `sf.SAE.load` reads."
)
EXAMPLE = (
    "steerfast sae train --preset smollm2 --out sae\n"
    "steerfast sae collect demo --at 8 mlp_out:8 --text corpus.txt --out rows --part 1/2\n"
    "steerfast sae eval sae demo --text wikitext.txt\n"
    "steerfast sae explain sae demo --corpus articles.jsonl --html features.html --save words.json\n"
    'steerfast sae steer sae demo "The doctor put on a coat, because" --words herself --explanations words.json'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast sae` to a parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="collect|train|eval|explain|steer|info")
    sae_collect.add_arguments(_action(actions, "collect", sae_collect.TEXT))
    trained = "train an SAE or transcoder on a model's activations, also under torchrun; run it again to go on"
    sae_train.add_arguments(_action(actions, "train", trained))
    evaluated = _action(
        actions, "eval", "variance explained, dead features and cross-entropy recovered on held-out text"
    )
    _sae_and_model(evaluated)
    shared.corpus_arguments(evaluated, "--text", "what it was not trained on", required=True)
    evaluated.add_argument("--tokens", type=shared.positive, metavar="N", help="of the text, at most (default: all)")
    evaluated.add_argument(
        "--loss-tokens", type=shared.positive, default=20_000, metavar="N", help="default: %(default)s"
    )
    evaluated.add_argument("--out", type=shared.out_file, metavar="FILE", help="write the numbers as JSON, too")
    _explain_arguments(
        _action(actions, "explain", "say what the features mean: words, evidence, and a score that can fail")
    )
    steered = _action(actions, "steer", "generate with some features changed, beside the unsteered text")
    _sae_and_model(steered)
    _steer_arguments(steered)
    _info_arguments(_action(actions, "info", "show what is in the file of an SAE; save it as one of ours"))


def run(args: argparse.Namespace) -> int:
    """Run `steerfast sae`; returns the exit code."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "collect": sae_collect.run,
        "train": sae_train.run,
        "eval": _eval,
        "explain": _explain,
        "steer": _steer,
        "info": _info,
    }
    return actions[args.action](args)


def _eval(args: argparse.Namespace) -> int:
    texts = list(read_documents(args.text, key=args.key, title=args.title))
    sae = SAE.load(args.sae)
    model, tokenizer = shared.load(args)
    found = evaluate_sae(
        sae.to(home(model)),
        model,
        tokenizer,
        texts,
        tokens=args.tokens,
        loss_tokens=args.loss_tokens,
        progress=shared.progress,
    )
    shared.say(str(found))
    if args.out is not None:
        digest = hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
        about = {"sae": repr(sae), "model": args.model, "text": Path(args.text).name, "text_sha256": digest}
        shared.say(f"\nNumbers     {found.save(args.out, about)}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    vocabulary = None if args.vocabulary is None else shared.texts("--vocabulary", [f"@{args.vocabulary}"])
    form = args.form or ("embedding" if args.corpus is None else "use")
    if args.corpus is None and (form == "use" or args.scores is not None or args.judge is not None):
        raise ValueError(
            "sae explain: --form use, --scores and --judge need --corpus PATH, the text that features are seen on"
        )
    if args.corpus is None:
        shared.refuse(args, "without --corpus", "key", "title", "tokens", "passage")
    if form == "use":
        shared.refuse(args, "of words by use (--form embedding looks at it)", "vocabulary", "ranking")
    key = _judge_key(args)
    sae = SAE.load(args.sae)
    documents = None if args.corpus is None else read_documents(args.corpus, key=args.key, title=args.title)
    model, tokenizer = shared.load(args)
    evidence = detection = None
    if documents is not None:
        config = ObserveConfig(tokens=args.tokens, passage=args.passage)
        evidence = observe(sae, model, tokenizer, documents, config, progress=shared.progress)
    shared.progress(f"explaining {sae.features} features")
    if form == "use" and evidence is not None:
        found = explain_use(evidence, args.count)
    else:
        found = explain(sae, model, tokenizer, vocabulary, args.count, ranking=args.ranking)
    if evidence is not None:
        detection = _scored(args, found, evidence)
    chosen = None if args.find is None else found.find(args.find)
    if chosen == []:
        raise ValueError(f"sae explain: no feature is explained by {', '.join(args.find)}; try other words")
    chosen = _best(detection) if chosen is None else chosen
    shared.say(found.table(chosen))
    if args.judge is not None and evidence is not None:
        _ask(Judge(args.judge, args.judge_model, key), found, evidence, chosen)
    if args.save is not None:
        shared.say(f"\nWords       {found.save(args.save)}")
    if args.html is not None:
        shared.progress("looking for logits and neighbours")
        relations = relate(sae, model, tokenizer, min(8, sae.features - 1)) if sae.features > 1 else None
        shared.say(f"Page        {write_page(args.html, found, evidence, detection=detection, relations=relations)}")
    return 0


def _best(detection: Detection | None, most: int = 20) -> list[int] | None:
    """The features whose words foretell best; None where nothing was scored."""
    if detection is None:
        return None
    order: list[int] = detection.accuracy.nan_to_num(-1).argsort(descending=True, stable=True).tolist()
    return order[: min(most, int(detection.scored.sum()))]


def _scored(args: argparse.Namespace, found: Explanations, evidence: Evidence) -> Detection | None:
    """The scores of the words; a corpus that is too small for them says so and leaves the rest."""
    try:
        detection = detect(found, evidence)
    except ValueError as reason:
        if args.scores is not None:
            raise
        shared.note(f"not scored: {shared.one_line(reason)}")
        return None
    shared.say(f"{detection}\n")
    if args.scores is not None:
        about = {
            "corpus": Path(args.corpus).name,
            "form": found.ranking,
            "tokens": evidence.tokens,
            "documents": evidence.documents,
        }
        shared.say(f"Scores      {detection.save(args.scores, about)}\n")
    return detection


def _judge_key(args: argparse.Namespace) -> str | None:
    """The key that a judge wants; what it lacks is said before a corpus is read for it."""
    if args.judge is None:
        shared.refuse(args, "without --judge", "judge_model", "judge_key")
        return None
    if args.judge_model is None:
        raise ValueError("sae explain: --judge URL needs --judge-model NAME, the model that is asked")
    if args.judge_key is None:
        return None
    if not (key := os.environ.get(args.judge_key)):
        raise ValueError(
            f"sae explain: --judge-key: the environment has no variable {args.judge_key}; set it to the key, or leave it out"
        )
    return key


def _ask(judge: Judge, found: Explanations, evidence: Evidence, chosen: list[int] | None) -> None:
    """What a judge makes of the features that are shown."""
    features = chosen or found.scores[:, 0].topk(min(20, len(found))).indices.tolist()
    shared.say(f"\n{'feature':>8}  judged")
    for feature in features:
        try:
            accuracy = f"{judged_detection(judge, found, evidence, [feature])[feature]:.2f}"
        except ValueError as reason:
            accuracy = shared.one_line(reason)
        shared.say(f"{feature:>8}  {accuracy}")


def _steer(args: argparse.Namespace) -> int:
    if (args.feature is None) == (args.words is None):
        raise ValueError("sae steer: give --feature NUMBER ..., or --words WORD ...")
    if args.words is None:
        shared.refuse(args, "without --words", "explanations", "most")
    sae = SAE.load(args.sae)
    if sae.place is None:
        raise ValueError(f"sae steer: {args.sae} does not say where it belongs; save it with an Origin(place=...)")
    model, tokenizer = shared.load(args)
    chosen = args.feature
    if args.words is not None:
        known = Explanations.load(args.explanations) if args.explanations else explain(sae, model, tokenizer)
        chosen = known.find(args.words)[: args.most]
        if not chosen:
            raise ValueError(f"sae steer: no feature is explained by {', '.join(args.words)}; try other words")
        shared.say(known.table(chosen) + "\n")
    outside = [feature for feature in chosen if not 0 <= feature < sae.features]
    if outside:
        raise ValueError(f"sae steer: feature {outside[0]} is out of range; there are {sae.features}, from 0")
    rows = sae.w_dec[chosen].float()
    if args.mode == "amplify":
        edit: Any = Amplify(rows, alpha=args.value)
    elif args.mode == "calibrate":
        edit = Calibrate(rows, beta=args.value)
    else:
        edit = EditFeatures(sae, dict.fromkeys(chosen, args.value), mode=args.mode)
    known_special = shared.special(tokenizer, args.positions)
    plan = Plan({sae.place: edit}, positions=args.positions, model=model, special=known_special)
    inputs = shared.prompt(tokenizer, args.prompt, model)
    options = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    for title in ("unsteered", "steered"):
        with nullcontext() if title == "unsteered" else steer(model, plan):
            out = model.generate(**inputs, **options)
        text = tokenizer.decode(out[0], skip_special_tokens=True)
        shared.say(f"[{title}]\n{textwrap.fill(text, shared.width())}\n")
    return 0


def _info(args: argparse.Namespace) -> int:
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    sae = SAE.load(args.sae, args.id, k=args.k, scale=args.scale, site=args.place, dtype=dtype)
    source = sae.source
    size = sum(tensor.numel() * tensor.element_size() for tensor in sae.tensors().values())
    select = f"the {sae.k} largest" if sae.k is not None else sae.activation
    written = source.hook_name_out if isinstance(sae, Transcoder) else source.hook_name
    place = f"{sae.place[0]} of layer {sae.place[1]}" if sae.place else written or "unknown"
    lengths = sae.w_dec.float().norm(dim=1)
    rows = {
        "family": source.library,
        "features": f"{sae.features} of width {sae.d}, {shared.short(sae.w_enc.dtype)}, {size / 1e6:.1f} MB",
        "selection": select,
        "normalisation": sae.normalisation,
        "place": place,
        "model": sae.origin.model or source.model or "unknown",
        "decoder rows": f"length {float(lengths.min()):.4g} to {float(lengths.max()):.4g}",
        "tied": "yes" if sae.w_enc.shape == sae.w_dec.shape and torch.equal(sae.w_enc, sae.w_dec) else "no",
    }
    if isinstance(sae, Transcoder):
        rows |= {
            "features": f"{rows['features']}, writes width {sae.d_out}",
            "reads": str(sae.reads.place or source.hook_name or "unknown"),
            "skip": "no" if sae.w_skip is None else "yes",
        }
    if source.rounding:
        rows["rounding"] = f"{source.rounding:.2g} of the length of a row, at most"
    for name, value in rows.items():
        shared.say(f"{name:<15}{value}")
    if args.save is not None:
        shared.say(f"\nSAE         {sae.save(args.save)}")
    return 0


# --- arguments --------------------------------------------------------------------------------------------------------


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(name, help=text, description=textwrap.fill(text, 100))
    made.set_defaults(usual=made.get_default)
    return made


def _sae_and_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help="directory or file of an SAE")
    shared.model_arguments(parser)


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", metavar="SAE", help="directory or file of an SAE, a release, or an id of Neuronpedia")
    parser.add_argument("id", nargs="?", metavar="ID", help="the SAE of a release")
    parser.add_argument("--k", type=shared.positive, metavar="N", help="of a Top-K file that does not say it")
    parser.add_argument("--scale", type=float, metavar="S", help="of a file that was trained on s·x and does not say s")
    parser.add_argument("--place", metavar="HOOK", help="of a file that does not say it, as blocks.20.hook_resid_post")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the matrices (default: the file's)"
    )
    parser.add_argument(
        "--save", type=shared.out_folder, metavar="DIR", help="write it in our format, for the other actions"
    )


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _sae_and_model(parser)
    form = "words by use on the corpus, or by the embedding (default: use, where there is a corpus)"
    parser.add_argument("--form", choices=("use", "embedding"), help=form)
    shared.corpus_arguments(parser, "--corpus", "what features are seen on")
    parser.add_argument("--tokens", type=shared.positive, metavar="N", help="of the corpus, at most (default: all)")
    parser.add_argument(
        "--passage",
        type=shared.positive,
        default=16,
        metavar="N",
        help="tokens of a scored passage (default: %(default)s)",
    )
    parser.add_argument("--scores", type=shared.out_file, metavar="FILE", help="write the scores as JSON, too")
    parser.add_argument(
        "--judge", metavar="URL", help="also ask a model over OpenAI's API, such as http://localhost:8000/v1"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="which model is asked")
    parser.add_argument("--judge-key", metavar="VARIABLE", help="the environment variable with its key")
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="of the embedding form: words, one per line (default: the tokenizer's own)"
    )
    parser.add_argument(
        "--ranking", choices=RANKINGS, default=RANKINGS[0], help="of the embedding form (default: %(default)s)"
    )
    parser.add_argument(
        "--count", type=shared.positive, default=10, metavar="N", help="words per feature (default: 10)"
    )
    parser.add_argument("--find", nargs="+", metavar="WORD", help="show the features that these words explain")
    parser.add_argument("--html", type=shared.out_file, metavar="FILE", help="write a page of features")
    parser.add_argument(
        "--save", type=shared.out_file, metavar="FILE", help="write the words as JSON; `steer` reads it"
    )


def _steer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the text begins with")
    parser.add_argument("--feature", type=int, nargs="+", metavar="N", help="numbers of features")
    parser.add_argument("--words", nargs="+", metavar="WORD", help="take the features that these words explain")
    parser.add_argument("--explanations", type=Path, metavar="FILE", help="what `explain --save` wrote; else made now")
    parser.add_argument(
        "--most", type=shared.positive, default=1, metavar="N", help="features at most (default: %(default)s)"
    )
    modes = ("set", "add", "scale", "min", "max", "amplify", "calibrate")
    text = "of the value: see sf.EditFeatures; amplify: α; calibrate: β (default: %(default)s)"
    parser.add_argument("--mode", default="add", choices=modes, help=text)
    parser.add_argument("--value", type=float, default=20.0, metavar="X", help="default: %(default)s")
    steered = "tokens that are steered, as generated, 0:8 or 'all & !special' (default: %(default)s)"
    parser.add_argument("--positions", default="all", type=shared.selector, metavar="POSITIONS", help=steered)
    parser.add_argument(
        "--tokens", type=shared.positive, default=40, metavar="N", help="new tokens (default: %(default)s)"
    )
