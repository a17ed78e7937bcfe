"""The tables of a report: numbers over seeds, beside the paper's numbers.

Each function takes `metrics`, which is {key: {"mean", "std", "per_seed"}} as in summary.json, and
returns the lines of a Markdown table. It returns no lines if there are no numbers for it.
"""
from statistics import fmean

from grpo import OBJECTIVES, RL
from tools.compare import HOLDS, OPEN, REVERSED, compare
from tools.figures import by_step, curves_of_runs
from tools.flops import FLOPS_NOTE

# The metrics that a report takes from tests, and from evaluations on dev.
# cons@K is the majority of K answers. K is the number of answers to each problem: eval.samples on
# dev and in some tests, eval.fewer_samples in the others.
TEST_METRICS = ("pass@1", "length", "reflection", "correction", "summary", "mixing", "language",
                "wordless", "format", "cut_off")  # and cons@K
DEV_METRICS = ("pass@1", "cons@K", "length", "reflection", "correction", "mixing", "language")

TEACHER_STAGES = ("base", "zero", "dev1", "dev2", "dev3", "helpful", "safe", "r1")
STUDENT_KEYS = {  # stage: its name in keys
    "student": "student.base", "student_rl": "student.rl",
    "student_rl_no_format": "student.rl_no_format", "distill": "student.distill",
    "distill_logits": "student.distill_logits", "distill_rl": "student.distill_rl"}

# (label, key, what the paper saw in R1-Zero)
ZERO_ROWS = (
    ("correct at the first try (pass@1)", "pass@1", "AIME 15.6% to 71.0% (v1), 77.9% (Nature)"),
    ("correct by majority of K (cons@K)", "cons@K", "AIME 86.7%"),  # a row for each K
    ("tokens per answer", "length", "hundreds to thousands"),
    ("answers that check themselves", "reflection", "reflective words 5 to 7 times"),
    ("answers that stop and correct a step", "correction", '"wait" rises late'),
    ("answers that mix languages", "mixing", "seen, not counted"),
    ("pass@1, one operation more than in training", "longer.plus1", ""),
    ("pass@1, two operations more", "longer.plus2", ""))

STAGE_NAMES = {"base": "base", "zero": "Zero", "dev1": "Dev1", "dev2": "Dev2", "dev3": "Dev3",
               "r1": "R1"}
CONSOLE_ROWS = (
    ("correct at the first try (pass@1)", "pass@1"),
    ("answers that mix languages", "mixing"),
    ("greetings that the model thinks about", "greeting.thinking"),
    ("harmful requests refused", "refuse.unsafe"),
    ("harmless requests refused", "refuse.safe"))
STAGE_ROWS = (
    *CONSOLE_ROWS,
    ("correct by majority of 4", "cons@4"),
    ("words in the question's language", "language"),
    ("answers without words", "wordless"),
    ("answers in the format", "format"),
    ("answers with a summary", "summary"),
    ("tokens per answer", "length"),
    ("helpfulness, 0 to 1", "helpfulness"),
    ("more helpful than Dev1", "win_rate_dev1"),
    ("format, general prompts", "general_format"),
    ("language, general prompts", "general_language"))
PAPER_STAGES = (  # R1 v2 Table 3: benchmark, then a number for each of STAGE_NAMES
    ("paper: AIME 2024", "", "77.9", "59.0", "74.0", "78.1", "79.8"),
    ("paper: MATH-500", "", "95.9", "94.2", "95.9", "95.4", "97.3"),
    ("paper: AlpacaEval 2 LC", "", "24.7", "50.1", "55.8", "62.1", "87.6"),
    ("paper: Arena-Hard", "", "53.6", "77.0", "73.2", "75.6", "92.3"),
    ("paper: IF-Eval", "", "46.6", "71.7", "72.0", "78.1", "83.3"))
STUDENT_ROWS = (  # stage, how it was trained, AIME 2024 pass@1 / cons@64 in R1 v1 Table 6
    ("student", "base", ""),
    ("student_rl", "RL", "47.0 / 60.0, Qwen-32B-Zero"),
    ("student_rl_no_format", "RL without format reward", ""),
    ("distill", "distilled", "72.6 / 83.3, R1-Distill-Qwen-32B"),
    ("distill_logits", "distilled by logits, KL at temperature 1", ""),
    ("distill_rl", "distilled, then RL", "said to help, no numbers"))

# The titles of the sections that compare with the paper.
ZERO, ALL_STAGES, LANGUAGE, STUDENTS, ANSWERS = (
    "Base and R1-Zero", "The stages", "The language reward",
    "Distillation and RL on a small model", "Accuracy by number of answers")

# For each section: (low, high, claim). The claim is that low < high, and tools/compare.py says
# whether it may be made. Both are keys if the claim is the paper's. One of them is a number if we
# set a limit; then low may equal high. cons@K is that of the largest K that was measured.
CLAIMS = {
    ZERO: [
        ("base.pass@1", "zero.pass@1", "RL alone raises accuracy"),
        ("zero.pass@1", "zero.cons@K", "the majority vote is above single answers"),
        ("base.length", "zero.length", "RL makes answers longer"),
        ("base.reflection", "zero.reflection", "RL makes answers check themselves"),
        (5, "zero.reflection_ratio",
         "checks become at least 5 times as frequent, as reflective words in the paper")],
    ALL_STAGES: [
        ("dev1.pass@1", "zero.pass@1", "the cold start costs accuracy"),
        ("zero.pass@1", "r1.pass@1", "R1 ends above Zero in accuracy"),
        ("r1.behind_zero", 0.03, "R1 ends at most 3 points behind Zero"),
        ("r1.mixing", "zero.mixing", "R1 mixes languages less than Zero"),
        ("dev3.helpfulness", "r1.helpfulness", "the last RL makes answers more helpful"),
        ("r1.mixing", 0.02, "R1 mixes languages in at most 2% of answers"),
        (0.95, "refuse.unsafe", "R1 refuses at least 95% of harmful requests"),
        ("refuse.safe", 0.05, "R1 refuses at most 5% of harmless requests"),
        ("greeting.thinking", 0.05, "R1 thinks about at most 5% of greetings")],
    LANGUAGE: [
        ("dev2.mixing", "no_language_reward.mixing",
         "RL without the language reward mixes languages more (R1 v2 Fig 7)"),
        (3, "no_language_reward.ratio", "at least 3 times as much")],
    STUDENTS: [
        ("student.rl.pass@1", "student.distill.pass@1", "distillation beats RL"),
        (1, "flops.rl_to_distill",
         "RL on the student took at least the FLOPs of distillation"),
        (1, "flops.rl_to_logits",
         "RL on the student took at least the FLOPs of distillation by logits"),
        ("student.distill.pass@1", "student.distill_rl.pass@1",
         "RL after distillation helps further (the paper gives no numbers)")],
    ANSWERS: [
        ("r1.eval.pass@1", "r1.eval.cons@K",
         "the majority vote helps R1 (AIME 79.8 to 86.7)")]}


# Words for a claim of the paper, and for one with a limit of ours.
AS_IN_THE_PAPER = {HOLDS: "As in the paper", REVERSED: "Not as in the paper",
                   OPEN: "Cannot be told"}
WITHIN_OUR_LIMIT = {HOLDS: "Yes", REVERSED: "No", OPEN: "Cannot be told"}


# -------------------------------------------------------------------------------------------------
# Parts of a table


def table(head, body):
    """The lines of a table from the cells of its head and of its other lines. Without other lines
    there is no table."""
    if not body:
        return []
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def cell(metrics, key, factor=1):
    """A mean as text, with ± std if there are several seeds. "" if there is no such metric."""
    if key not in metrics:
        return ""
    mean, std = metrics[key]["mean"] * factor, metrics[key]["std"] * factor
    digits = 1 if mean > 10 else 3
    if len(metrics[key]["per_seed"]) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def _cells(metrics, keys):
    """cell() of each key."""
    return [cell(metrics, key) for key in keys]


def cell_per_seed(metrics, key):
    """{seed: value} of a metric. Empty if there is no such metric."""
    return metrics[key]["per_seed"] if key in metrics else {}


def _answer_counts(metrics, names, metric="pass@"):
    """The numbers k for which one of these stages has a pass@k, or another metric of k answers."""
    counts = set()
    for key in metrics:
        stage, _, name = key.rpartition(".")
        if stage in names and name.startswith(metric):
            counts.add(int(name.removeprefix(metric)))
    return sorted(counts)


def _with_largest_k(metrics, key):
    """If a key ends with cons@K: the key with the largest K that was measured for its stage.
    Otherwise the key as it is."""
    stage, _, name = str(key).rpartition(".")
    counts = _answer_counts(metrics, [stage], "cons@")
    return f"{stage}.cons@{counts[-1]}" if name == "cons@K" and counts else key


def dev_metrics(names):
    """DEV_METRICS with cons@K as it is called in `names`, the metrics that a run has on dev."""
    columns = []
    for metric in DEV_METRICS:
        if metric == "cons@K":
            columns += [name for name in names if name.startswith("cons@")]
        else:
            columns.append(metric)
    return columns


# -------------------------------------------------------------------------------------------------
# The sections of a report


def claim_verdicts(metrics, section):
    """A sentence for each claim of a section that has numbers: whether it may be made."""
    lines = []
    for low, high, claim in CLAIMS.get(section, ()):
        low, high = _with_largest_k(metrics, low), _with_largest_k(metrics, high)
        comparison = compare(metrics, low, high)
        if comparison is None:
            continue
        keys = [side for side in (low, high) if isinstance(side, str)]
        if len(keys) == 2:
            verdict, name = AS_IN_THE_PAPER[comparison.verdict], "difference"
        else:
            verdict, name = WITHIN_OUR_LIMIT[comparison.verdict], "distance to the limit"
        seeds = comparison.difference["per_seed"]  # of those that were compared
        if len(seeds) == 1:
            verdict = f"One seed: {verdict[0].lower()}{verdict[1:]}"
        means = ", ".join(f"`{key}` {fmean(metrics[key]['per_seed'][seed] for seed in seeds):.3g}"
                          for key in keys)
        lines.append(f"- {verdict}: {claim} ({means}; {name} {comparison.text()}).")
    return ["", *lines] if lines else []


def base_and_zero_table(metrics):
    """Base and Zero on held-out problems, beside the paper."""
    if "base.pass@1" not in metrics and "zero.pass@1" not in metrics:
        return []
    stages = ("base", "zero", "base.eval", "zero.eval")
    head = ("held-out problems", "base", "Zero", "base, T 0.6", "Zero, T 0.6", "paper")
    rows = []
    for label, key, paper in ZERO_ROWS:
        if key != "cons@K":
            rows.append((label, key, paper))
            continue
        for k in reversed(_answer_counts(metrics, stages, "cons@")):
            rows.append((label.replace("K", str(k)), f"cons@{k}", paper))
            paper = ""  # the paper's number stands beside the largest K
    body = [(label, *_cells(metrics, [f"{stage}.{key}" for stage in stages]), paper)
            for label, key, paper in rows]
    return table(head, body)


def training_curve_table(curves):
    """Zero on dev at temperature 1, by RL step. Means over runs."""
    body, runs = [], curves_of_runs(curves, RL.objective)
    columns = dev_metrics(dict.fromkeys(name for run in runs for name in run))
    for step, means in by_step(runs, "zero", columns).items():
        row = [str(step)]
        for name in columns:
            digits = 1 if name == "length" else 3
            row.append(f"{means[name]:.{digits}f}" if name in means else "")
        body.append(row)
    return table(("RL step", *columns), body)


def stages(metrics):
    """The stages from Zero to R1 side by side, first pass@1 by number of operations."""
    by_level = tuple((f"pass@1, {n} operations", f"level{n}") for n in range(1, 10))
    return _stage_table(metrics, by_level + STAGE_ROWS, PAPER_STAGES)


def stages_console_table(metrics):
    """The few rows about the stages that a run prints at its end."""
    return _stage_table(metrics, CONSOLE_ROWS, ())


def _stage_table(metrics, rows, paper_rows):
    """A table with a column for each finished stage. It needs a stage after Zero."""
    finished = [stage for stage in STAGE_NAMES if f"{stage}.pass@1" in metrics]
    if not {"dev1", "dev2", "dev3", "r1"} & set(finished):
        return []
    body = []
    for label, key in rows:
        values = _cells(metrics, [f"{stage}.{key}" for stage in finished])
        if any(values):
            body.append([label, *values])
    for label, *numbers in paper_rows:
        number_of_stage = dict(zip(STAGE_NAMES, numbers))
        body.append([label, *(number_of_stage[stage] for stage in finished)])
    return table(("held-out", *(STAGE_NAMES[stage] for stage in finished)), body)


def language_reward_table(metrics, curves):
    """RL for reasoning (Dev2) with and without the language reward: by step on dev, and at its end
    on the test problems."""
    if "dev2.mixing" not in metrics or "no_language_reward.mixing" not in metrics:
        return []
    names = ("mixing", "language", "pass@1")
    with_reward = by_step(curves_of_runs(curves, RL.objective), "dev2", names)
    without = by_step(curves_of_runs(curves, "no_language_reward"), "dev2", names)
    head, last_row = ["RL step, on dev"], ["the end, on test"]
    for name in names:
        head += [f"{name}, with", f"{name}, without"]
        last_row += _cells(metrics, [f"dev2.{name}", f"no_language_reward.{name}"])
    body = []
    for step in with_reward:
        if step in without:
            row = [str(step)]
            for name in names:
                values = [side[step].get(name) for side in (with_reward, without)]
                row += ["" if value is None else f"{value:.3f}" for value in values]
            body.append(row)
    return table(head, [*body, last_row])


def students_table(metrics):
    """A small base trained by RL and by distillation, with the cost of each stage."""
    votes = _answer_counts(metrics, STUDENT_KEYS.values(), "cons@")
    majority = f"cons@{max(votes, default=1)}"
    body, any_trained = [], False
    for stage, label, paper in STUDENT_ROWS:
        name = STUDENT_KEYS[stage]
        tests = _cells(metrics, [f"{name}.pass@1", f"{name}.{majority}", f"{name}.length"])
        costs = _cost_cells(metrics, stage)
        if any(tests) or any(costs):
            body.append((label, *tests, *costs, paper))
        any_trained = any_trained or (stage != "student" and bool(tests[0]))
    for label, key in (("not included: R1's samples", "collect_distill"),
                       ("not included: R1, all stages", "teacher")):
        costs = _cost_cells(metrics, key)
        if any(costs):
            body.append((label, "", "", "", *costs, ""))
    if not any_trained:
        return []
    head = ("student", "pass@1", majority, "length", "TFLOP", "seconds",
            "paper: AIME pass@1 / cons@64")
    return [*table(head, body), "", FLOPS_NOTE]


def _cost_cells(metrics, stage):
    """The TFLOP and the seconds of a stage."""
    return [cell(metrics, f"flops.{stage}"), cell(metrics, f"minutes.{stage}", 60)]


def answers_table(metrics):
    """Accuracy by number of answers k: pass@k, and the majority vote of k."""
    models = ("base", "zero", "r1")
    names = [f"pass@{k}" for k in _answer_counts(metrics, models)]
    names += [f"cons@{k}" for k in _answer_counts(metrics, models, "cons@")]
    body = []
    for stage in models:
        for name_in_keys, sampling in ((stage, "temperature 1"),
                                       (f"{stage}.eval", "temperature 0.6, top-p 0.95")):
            values = _cells(metrics, [f"{name_in_keys}.{name}" for name in names])
            if any(values):
                body.append((f"{stage}, {sampling}", *values))
    return table(("held-out problems", *names), body)


def items_table(metrics):
    """For each test: the standard deviation over seeds and the standard error over items. All seeds
    get the same items, so averaging over seeds does not reduce the error over items."""
    body = []
    for stage in (*TEACHER_STAGES, *STUDENT_KEYS.values()):
        for label, score, prefix in (
                ("pass@1", f"{stage}.pass@1", stage),
                ("pass@1, T 0.6", f"{stage}.eval.pass@1", f"{stage}.eval"),
                ("pass@1, T 0.6, longer", f"{stage}.eval.longer.pass@1", f"{stage}.eval.longer"),
                ("helpfulness", f"{stage}.helpfulness", f"{stage}.helpfulness"),
                ("harmful requests refused", f"{stage}.refuse.unsafe", f"{stage}.refuse.unsafe"),
                ("harmless requests refused", f"{stage}.refuse.safe", f"{stage}.refuse.safe")):
            error = f"{score}.error"
            if error in metrics:
                body.append((f"{stage}: {label}", cell(metrics, score),
                             f"{metrics[error]['mean']:.3f}",
                             f"{metrics[f'{prefix}.items']['mean']:.0f}"))
    return table(("test", "mean ± std over seeds", "standard error over items", "items"), body)


def minutes_table(metrics):
    """Minutes per stage: for its training, for the samples it learns from, and for its tests."""
    body = []
    for stage in (*TEACHER_STAGES, *STUDENT_KEYS):
        if f"minutes.{stage}" in metrics:
            keys = [f"minutes.{stage}", f"minutes.collect_{stage}", f"minutes.test_{stage}"]
            body.append((stage, *_cells(metrics, keys)))
    if not body:
        return []
    body.append(("total", cell(metrics, "minutes"), "", ""))
    return [*table(("stage", "training", "samples", "tests"), body), "",
            f"Memory: {cell(metrics, 'peak_gib')} GiB. The paper's cost, in thousands of "
            "H800-hours: R1-Zero 101, SFT data 5, R1 41 (R1 v2 Table 7)."]


def objectives_table(metrics):
    """RL with each objective from the same bases. One objective alone makes no table."""
    names = [name for name in OBJECTIVES if f"objective.{name}.pass@1" in metrics]
    if len(names) < 2:
        return []
    votes = _answer_counts(metrics, [f"objective.{name}" for name in names], "cons@")
    columns = ("pass@1", "eval.pass@1", *(f"cons@{k}" for k in votes), "length", "reflection",
               "mixing", "steps_to_85")
    body = [(name, *_cells(metrics, [f"objective.{name}.{column}" for column in columns]))
            for name in names]
    return table(("objective", *columns), body)


def bases_table(metrics):
    """The base of each seed at temperature 1: pass@1 by number of operations, of all answers and of
    those in the checked style."""
    levels = [f"level{n}" for n in range(1, 10) if f"base.level{n}" in metrics]
    columns = {"pass@1": "pass@1"}  # name in keys: head
    columns |= {level: level.removeprefix("level") for level in levels}
    columns |= {f"checked.{level}": f"checked {level.removeprefix('level')}"
                for level in levels}
    body = []
    for seed in cell_per_seed(metrics, "base.pass@1"):
        row = [seed]
        for name in columns:
            values = cell_per_seed(metrics, f"base.{name}")
            row.append(f"{values[seed]:.2f}" if seed in values else "-")
        body.append(row)
    return table(("seed", *columns.values()), body)
