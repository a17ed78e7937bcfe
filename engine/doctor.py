"""What the console says of a training: that it is on track, or what is off and what to try."""
import contextlib
import dataclasses
import json
import math
import textwrap
from pathlib import Path

# A figure that a record lacks is as it should be.
WELL = {"accuracy": math.nan, "format": math.nan, "cut_off": 0.0, "dead_groups": 0.0, "kl": 0.0,
        "entropy": 1.0, "gap_p999": 0.0, "skipped": 0, "loads": []}


def note(sentence):
    """A sentence as the console shows it, in lines of less than 100 columns."""
    return textwrap.fill(f"note: {sentence}", 98, initial_indent="  ", subsequent_indent=" " * 8)


def advice(record, first, s, stage):
    """Sentences on a step's record, the stage's first beside it: [(keyword, sentence)].

    s are the stage's settings of RL, None if it is supervised; stage: its name, which is theirs in
    --set (an ablation has its stage's)."""
    step, rl, stage = record["step"], s is not None, stage.removesuffix("_no_format")
    r, was = ({**WELL, **{k: x for k, x in of.items() if x is not None}} for of in (record, first))
    cases = [
        ("loss", rl and step == 1 and s.objective in ("grpo", "gspo"),
         "no loss is shown: it is near 0 at each first update by construction (ratio 1, advantages "
         "that sum to 0 in a group); watch accuracy and length"),
        ("skipped", r["skipped"] > 0,
         "a gradient was not finite and its update was skipped; if it comes again, lower "
         f"{stage}.lr"),
        ("cut", r["cut_off"] > 0.25,
         f"{r['cut_off']:.0%} of answers are cut off: raise {stage}.max_new_tokens"),
        ("dead", r["dead_groups"] > 0.8,
         f"{r['dead_groups']:.0%} of groups are dead (all answers score the same): problems too "
         f"{'easy, raise' if r['accuracy'] > 0.5 else 'hard, lower'} {stage}.levels"),
        ("stuck", r["accuracy"] < 0.02 and step >= 10,
         "almost nothing is right: RL cannot amplify what the base never does; raise its steps"),
        ("form", r["format"] > was["format"] + 0.1 and r["accuracy"] < was["accuracy"] - 0.02,
         "format rises and accuracy falls: well-formed wrong answers are what pays; lower "
         f"{stage}.format_weight, or start from a better base"),
        ("entropy", r["entropy"] < 0.01 and r["dead_groups"] < 0.5,
         "the entropy is almost 0: answers to a question are all alike and nothing can be learnt "
         f"from comparing them; lower {stage}.lr"),
        ("kl", r["kl"] > 1.0,
         f"the policy is far from its reference (KL over 1): raise {stage}.beta or lower its lr"),
        ("gap", r["gap_p999"] > 1e-2,
         "sampler and trainer disagree on probabilities by over 1%: try --dtype float32"),
        ("load", min(map(min, r["loads"]), default=1.0) < 0.05 and r["dead_groups"] < 0.5
         and (rl or step >= 100),  # it takes some steps, and more than a few groups' tokens
         "an expert has less than a twentieth of the mean load: raise model.bias_speed"),
    ]
    return [(keyword, sentence) for keyword, holds, sentence in cases if holds]


REFERENCE = Path(__file__).parent.parent / "results" / "r1" / "curves.json"


def on_track(run, stage, step, score):
    """What the console says of pass@1 on dev, if all settings but the seed and the device are as in
    the README's runs, beside theirs at this step: nothing, "on track", or what they had."""
    curves, like = {}, type(run)()
    if dataclasses.replace(run, seed=like.seed, device=like.device) != like:
        return ""
    with contextlib.suppress(OSError, ValueError):
        curves = json.loads(REFERENCE.read_text("utf-8"))
    seen = [x for name, curve in curves.items() if name.startswith("grpo-")
            for at, n, x in curve["pass@1"] if (at, n) == (stage, step)]
    if not seen or score >= min(seen) - 0.05:
        return " on track" if seen else ""
    return "\n" + note(f"the README's runs had {min(seen):.2f} to {max(seen):.2f} here; this run "
                       "is behind")
