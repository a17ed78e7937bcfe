"""The workshop's experiments: each asks what one idea in the recipe of R1-Zero, or of its
base, is good for.

    plain           twelve rollouts from the kept base, beside which most others stand
    pretraining     150 steps of a base from random weights, for the others of its kind
    format_only     a right answer earns nothing, only the form does
    short_pays      each token costs about 0.01; the limit is 100 tokens instead of 200
    group_of_2      two answers to each of 192 questions, not sixteen to each of 24
    pad_is_eos      the loss leaves out the end token, as if it were padding
    language        words in the language of the question earn up to 0.5
    length_reward   Kimi k1.5's length reward with weight 0.3
    from_base       questions of seven operations only, from the base
    frontier        the same questions from Zero, beside from_base
    softmax_router  softmax instead of sigmoid, no routing bias, no balance loss
    clip_10         a clip of 10, which is almost none

Each is `python workshop/measure.py NAME`. A change is a setting, an edit of the code, or the
model that RL starts from. What its line does not name stays the same, the seed too.
experiments.md asks what will happen, answers.md says what happened.
"""
from dataclasses import dataclass, field

# The settings that keep a run short: few problems in the final test, and few evaluations on
# dev.
SHORT = {"zero": "zero.steps=12 zero.minibatches=2 zero.dev_every=3 eval.samples=8 "
                 "eval.problems=8 eval.longer=1 data.prompts=1",
         "base": "base.steps=150 base.dev_every=50 eval.samples=4 eval.problems=8 eval.longer=1"}
PLAIN = {"zero": "plain", "base": "pretraining"}  # {start: its plain run}


@dataclass(frozen=True)
class Experiment:
    """One run of the workshop."""
    start: str = "zero"                            # zero: RL; base: pretraining
    settings: str = ""                             # besides those of SHORT
    # Edits of the code: (file, the text in it, the text to put in its place).
    edits: tuple[tuple[str, str, str], ...] = ()
    model: str = "base"                            # the kept model that RL starts from
    beside: str = ""                               # the run beside it; "": the plain run
    shows: tuple[str, ...] = ("pass@1", "length")  # the rows of its table
    # The curves of its picture, each with a title. {KEY} in a title is the last value of a
    # curve, {other KEY} that of the run beside it.
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def compared_with(self):
        """The name of the run beside it."""
        return self.beside or PLAIN[self.start]


# Titles of several pictures.
RIGHT_BESIDE_PLAIN = "{pass@1:.0%} right,\nplain {other pass@1:.0%}"
LENGTH_BESIDE_PLAIN = "{length:.0f} tokens an answer,\nplain {other length:.0f}"
LOSS_BESIDE_PLAIN = "The loss is {loss:.2f},\nplain {other loss:.2f}"
DEAD_GROUPS = "{dead_groups:.0%} of the groups\nteach nothing"

EXPERIMENTS = {
    "plain": Experiment(
        # accuracy is what the reward pays in training. With a student's reward that has a
        # hole it rises, and pass@1, on dev and by the project's rule, does not.
        shows=("pass@1", "accuracy", "length", "reflection", "mixing", "format", "kl", "clip",
               "dead_groups"),
        titles={"pass@1": "RL alone: {pass@1:.0%} right",
                "length": "Answers grow to\n{length:.0f} tokens"}),
    "pretraining": Experiment(
        "base", shows=("pass@1", "loss", "expert_load", "cut_off", "length"),
        titles={"loss": "The loss falls to {loss:.2f}",
                "expert_load": "The busiest expert\nhas {expert_load:.1f} times the mean load"}),
    "format_only": Experiment(
        settings="zero.accuracy_weight=0",
        shows=("pass@1", "format", "length", "reflection", "dead_groups"),
        titles={"pass@1": RIGHT_BESIDE_PLAIN,
                "format": "{format:.0%} keep the format,\nplain {other format:.0%}"}),
    "short_pays": Experiment(
        settings="zero.max_new_tokens=100 zero.overlong=99",
        shows=("pass@1", "length", "reflection", "cut_off"),
        titles={"length": LENGTH_BESIDE_PLAIN,
                "pass@1": RIGHT_BESIDE_PLAIN}),
    "group_of_2": Experiment(
        settings="zero.group_size=2 zero.problems=192",
        shows=("pass@1", "length", "dead_groups"),
        titles={"pass@1": RIGHT_BESIDE_PLAIN,
                "dead_groups": DEAD_GROUPS}),
    "pad_is_eos": Experiment(
        "base", edits=(
            ("r1mini.py", "    return tokens, document, weight",
             "    weight = weight * (tokens != tasks.END_ID)  # labels[labels == pad] = -100\n"
             "    return tokens, document, weight"),),
        shows=("loss", "cut_off", "length", "pass@1"),
        titles={"loss": LOSS_BESIDE_PLAIN,
                "cut_off": "{cut_off:.0%} of the answers\ndo not end"}),
    "language": Experiment(
        settings="zero.language_weight=0.5",
        shows=("language", "mixing", "pass@1", "length"),
        titles={"language": "{language:.0%} of the words in the\nquestion's language, plain "
                            "{other language:.0%}",
                "pass@1": RIGHT_BESIDE_PLAIN}),
    "length_reward": Experiment(
        settings="zero.length_weight=0.3",
        shows=("length", "pass@1", "reflection", "dead_groups"),
        titles={"length": LENGTH_BESIDE_PLAIN,
                "pass@1": RIGHT_BESIDE_PLAIN}),
    "from_base": Experiment(
        settings="zero.levels=7", shows=("pass@1", "length", "format", "dead_groups"),
        titles={"pass@1": "Seven operations, from the base:\n{pass@1:.0%} right",
                "dead_groups": DEAD_GROUPS}),
    "frontier": Experiment(
        settings="zero.levels=7", model="zero", beside="from_base",
        shows=("pass@1", "length", "format", "dead_groups"),
        titles={"pass@1": "{pass@1:.0%} right from Zero,\n{other pass@1:.0%} from the base",
                "dead_groups": "{dead_groups:.0%} of the groups teach\nnothing, from the base "
                               "{other dead_groups:.0%}"}),
    "softmax_router": Experiment(
        "base", "model.bias_speed=0 model.balance_alpha=0",
        edits=(("moe.py", "scores_NE = logits_NE.sigmoid()",
                "scores_NE = logits_NE.softmax(-1)"),),
        shows=("expert_load", "loss"),
        titles={"expert_load": "The busiest expert has\n{expert_load:.1f} times the mean load,\n"
                               "plain {other expert_load:.1f}",
                "loss": LOSS_BESIDE_PLAIN}),
    "clip_10": Experiment(
        settings="zero.clip_low=10 zero.clip_high=10",
        shows=("pass@1", "length", "clip", "kl"),
        titles={"pass@1": RIGHT_BESIDE_PLAIN,
                "clip": "The plain run's clip acts on\n{other clip:.2%} of the tokens"}),
}
# The runs that others are compared with. No question asks for them.
BESIDE = {experiment.compared_with for experiment in EXPERIMENTS.values()}


@dataclass(frozen=True)
class Use:
    """How a student's function takes the place of the project's in a copy of the code."""
    file: str           # of the copy
    before: str         # the line that calls the project's function
    after: str          # the line that calls the student's, in the module `mine`
    settings: str = ""  # what else the run needs
    start: str = "zero"


# The exercises router and absorbed are missing: functions of one token at a time, as most
# students write them, would take hours here.
USES = {
    "advantage": Use("grpo.py", "advantage = advantages(rewards, s.normalize_std)",
                     "advantage = mine.advantages(rewards.clone())"),
    "reward": Use("r1mini.py",
                  'return tasks.accuracy(text, problem) if problem.kind == "sum" else math.nan',
                  "return float(mine.accuracy(text, problem.answer))"),
    "kl": Use("grpo.py", "kl = kl_k3(new, reference)                              # (n, T), D_it",
              "kl = mine.kl_k3(new, reference)"),
    "kimi": Use("grpo.py", "J = (advantage * log_ratio - s.tau / 2 * log_ratio ** 2).sum() "
                           "/ batch.answers",
                "# A pass has some of the minibatch's answers. Their shares add up to 1.\n"
                "    J = mine.kimi(new, old, advantage, mask, s.tau) * len(new) / batch.answers",
                "zero.objective=kimi"),
    "bias": Use("moe.py", "module.bias += step",
                "module.bias = mine.update_bias(module.bias, module.load, "
                "module.config.bias_speed)", start="base"),
}
