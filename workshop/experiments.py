"""The workshop's experiments. Each changes one thing in the recipe of R1-Zero or its base.

Each is compared with the plain run of its kind: `plain`, twelve rollouts from
workshop/base.pt, or `pretraining`, the first steps of a base from random weights. A
change is a setting or an edit of the code. experiments.md asks what will happen,
answers.md says what happened.
"""
from dataclasses import dataclass

# Where a run starts, and the settings that keep it short: few problems in the final
# test, and few evaluations on dev.
STARTS = {"zero": "zero --from workshop/base.pt", "base": "base"}
SHORT = {"zero": "zero.steps=12 zero.minibatches=2 zero.dev_every=3 eval.samples=8 "
                 "eval.problems=8 eval.longer=1 data.prompts=1",
         "base": "base.steps=150 base.dev_every=50 eval.samples=4 eval.problems=8 eval.longer=1"}
PLAIN = {"zero": "plain", "base": "pretraining"}  # {start: its plain run}


@dataclass(frozen=True)
class Experiment:
    """One run of the workshop."""
    start: str = "zero"                            # one of STARTS
    settings: str = ""                             # besides those of SHORT
    # Edits of the code: (file, the text in it, the text to put in its place).
    edits: tuple[tuple[str, str, str], ...] = ()
    shows: tuple[str, ...] = ("pass@1", "length")  # the rows of its table


EXPERIMENTS = {
    "plain": Experiment(shows=("pass@1", "length", "reflection", "mixing", "format", "kl",
                               "clip", "dead_groups")),
    "no_std": Experiment(settings="zero.normalize_std=false", shows=("pass@1", "length", "kl")),
    "no_format": Experiment(settings="zero.format_weight=0",
                            shows=("pass@1", "format", "length", "dead_groups")),
    "format_only": Experiment(settings="zero.accuracy_weight=0",
                              shows=("pass@1", "format", "length", "reflection", "dead_groups")),
    "clip_10": Experiment(settings="zero.clip_low=10 zero.clip_high=10",
                          shows=("pass@1", "length", "clip", "kl")),
    "no_leash": Experiment(settings="zero.beta=0",  # without the KL penalty
                           shows=("pass@1", "length", "entropy")),
    "language": Experiment(settings="zero.language_weight=0.5",
                           shows=("pass@1", "language", "mixing", "length")),
    "group_of_2": Experiment(settings="zero.group_size=2 zero.problems=192",
                             shows=("pass@1", "length", "dead_groups")),
    "short_pays": Experiment(settings="zero.max_new_tokens=100 zero.overlong=99",
                             shows=("pass@1", "length", "reflection", "cut_off")),
    "pretraining": Experiment("base",
                              shows=("pass@1", "loss", "expert_load", "cut_off", "length")),
    "pad_is_eos": Experiment("base", edits=(
        ("r1mini.py", "    return tokens, document, weight",
         "    weight = weight * (tokens != tasks.END_ID)  # labels[labels == pad] = -100\n"
         "    return tokens, document, weight"),),
        shows=("loss", "cut_off", "length", "pass@1")),
    "softmax_router": Experiment(
        "base", "model.bias_speed=0 model.balance_alpha=0",
        edits=(("moe.py", "scores_NE = logits_NE.sigmoid()",
                "scores_NE = logits_NE.softmax(-1)"),),
        shows=("expert_load", "loss", "pass@1")),
}
