"""What the console says about a training run: that it is on track, or what is wrong and what to
try."""
import contextlib
import dataclasses
import json
import math
import textwrap
from pathlib import Path

# The values that a healthy run has. They stand in for what a record does not have.
HEALTHY = {"accuracy": math.nan, "format": math.nan, "cut_off": 0.0, "dead_groups": 0.0,
           "kl": 0.0, "entropy": 1.0, "gap_p999": 0.0, "skipped": 0, "loads": []}
REFERENCE = Path(__file__).parent.parent / "results" / "r1" / "curves.json"


def doctor_note(sentence):
    """A sentence as the console shows it, in lines of less than 100 columns."""
    return textwrap.fill(f"note: {sentence}", 98, initial_indent="  ", subsequent_indent=" " * 8)


def _fill_with_healthy_values(record):
    """A record with healthy values where it has none."""
    return HEALTHY | {key: x for key, x in record.items() if x is not None}


def advice(record, first, s, stage):
    """[(keyword, sentence)]: what to say about a step's record.

    first: the record of the stage's first step. s: the stage's RL settings, None if it is
    supervised. stage: its name, which is also the prefix of its settings in --set.
    """
    step, is_rl = record["step"], s is not None
    stage = stage.removesuffix("_no_format")  # an ablation has the settings of its stage
    now, before = _fill_with_healthy_values(record), _fill_with_healthy_values(first)
    least_load = min(map(min, now["loads"]), default=1.0)
    cannot_differ = is_rl and not any(
        (s.accuracy_weight, s.format_weight, s.language_weight, s.overlong,
         s.general * s.preference_weight))
    level_advice = "easy, raise" if now["accuracy"] > 0.5 else "hard, lower"
    why_dead = f"The problems are too {level_advice} {stage}.levels"
    if is_rl and not s.accuracy_weight:
        why_dead = f"A right answer earns no more than a wrong one: raise {stage}.accuracy_weight"
    paid_wrongly = "overlong" if is_rl and s.overlong else "format_weight"
    cases = [
        ("loss", is_rl and step == 1 and s.objective in ("grpo", "gspo"),
         "no loss is shown. It is near 0 at each first update by construction: the ratio is 1, and "
         "the advantages of a group add up to 0. Watch accuracy and length"),
        ("skipped", now["skipped"] > 0,
         "a gradient was not finite, and its update was skipped. If that happens again, lower "
         f"{stage}.lr"),
        ("cut", now["cut_off"] > 0.25,
         f"{now['cut_off']:.0%} of the answers are cut off: raise {stage}.max_new_tokens"),
        ("alike", cannot_differ,
         f"no reward of {stage} has a weight, so all answers earn the same and nothing is learnt"),
        ("dead", now["dead_groups"] > 0.8 and not cannot_differ,
         f"{now['dead_groups']:.0%} of the groups have equal rewards and teach nothing. "
         f"{why_dead}"),
        ("stuck", now["accuracy"] < 0.02 and step >= 10,
         "almost nothing is right. RL cannot amplify what the base never does: train the base for "
         "more steps"),
        ("form", (now["format"] > before["format"] + 0.1
                  and now["accuracy"] < before["accuracy"] - 0.02),
         "format rises and accuracy falls: well-formed wrong answers pay. Lower "
         f"{stage}.{paid_wrongly}, or start from a better base"),
        ("entropy", now["entropy"] < 0.01 and now["dead_groups"] < 0.5,
         "the entropy is almost 0. All answers to a question are alike, so comparing them teaches "
         f"nothing: lower {stage}.lr"),
        ("kl", now["kl"] > 1.0,
         f"the policy is far from its reference (KL over 1): raise {stage}.beta or lower "
         f"{stage}.lr"),
        ("gap", now["gap_p999"] > 1e-2,
         "sampler and trainer disagree on probabilities by over 1%: try --dtype float32"),
        # The bias needs some steps, and more than a few groups' tokens, before this means anything.
        ("load", least_load < 0.05 and now["dead_groups"] < 0.5 and (is_rl or step >= 100),
         "an expert has less than a twentieth of the mean load: raise model.bias_speed"),
    ]
    return [(keyword, sentence) for keyword, holds, sentence in cases if holds]


def on_track(run, stage, step, score):
    """Compares pass@1 on dev with the runs in results/r1 at this step: " on track", or a line with
    their scores. "" if this run has other settings than those (seed and device aside)."""
    default = type(run)()
    if dataclasses.replace(run, seed=default.seed, device=default.device) != default:
        return ""
    curves = {}
    with contextlib.suppress(OSError, ValueError):
        curves = json.loads(REFERENCE.read_text("utf-8"))
    scores = []
    for name, curve in curves.items():
        if name.startswith("grpo-"):
            scores += [x for its_stage, its_step, x in curve["pass@1"]
                       if (its_stage, its_step) == (stage, step)]
    if not scores:
        return ""
    if score >= min(scores) - 0.05:
        return " on track"
    return "\n" + doctor_note(f"the runs in results/r1 had {min(scores):.2f} to "
                              f"{max(scores):.2f} here. This run is behind")
