"""Tables over seeds, beside the paper's. Each takes the rows of report.over_seeds and returns lines
of Markdown, none where there are no figures."""
from grpo import OBJECTIVES, RL
from tools.figures import by_step, runs_named

TESTED = ("pass@1", "cons@16", "length", "reflection", "correction", "summary", "mixing",
          "language", "format", "cut_off")
CURVES = ("pass@1", "cons@16", "length", "reflection", "correction", "mixing", "language")
TEACHER = ("base", "zero", "dev1", "dev2", "dev3", "helpful", "safe", "r1")
STUDENTS = {"student": "student.base", "student_rl": "student.rl",  # stage: its name in keys
            "student_rl_no_format": "student.rl_no_format", "distill": "student.distill",
            "distill_logits": "student.distill_logits", "distill_rl": "student.distill_rl"}

FLOPS = (
    "FLOPs are estimated, with N the parameters a token meets in products (the embedding is looked "
    "up) and n all tokens of a stage: 6 N n in a supervised stage, MTP's in N; in RL, which leaves "
    "MTP alone, 2 N n to sample, n with the prompts, and "
    "(6 + 2) N n to learn and for the reference (not where beta is 0), n of live groups only; by "
    "logits 2 N n more, with the teacher's N; the samples a stage learns from 2 N n. Evaluation is "
    "left out. A TFLOP is 10^12.")

# What a reader wants to know first: its name, its key, and what the paper saw in R1-Zero.
STORY = (("right at the first try (pass@1)", "pass@1", "AIME 15.6% to 71.0% (v1), 77.9% (Nature)"),
         ("right by majority of 16 (cons@16)", "cons@16", "AIME 86.7%"),
         ("right by majority of 4 (cons@4)", "cons@4", ""),
         ("tokens in an answer", "length", "hundreds to thousands"),
         ("answers that check themselves", "reflection", "reflective words 5 to 7 times"),
         ("answers that stop and mend a step", "correction", '"wait" rises late'),
         ("answers that mix languages", "mixing", "seen, not counted"),
         ("pass@1, one step longer than any learnt", "longer.plus1", ""),
         ("pass@1, two steps longer", "longer.plus2", ""))
STAGES = {"zero": "Zero", "dev1": "Dev1", "dev2": "Dev2", "dev3": "Dev3", "r1": "R1"}
SHORT = (("right at the first try (pass@1)", "pass@1"), ("answers that mix languages", "mixing"),
         ("greetings thought about", "greeting.thinking"),
         ("harmful wishes refused", "refuse.unsafe"), ("harmless wishes refused", "refuse.safe"))
LONG = (*SHORT, ("words in the question's language", "language"), ("format kept", "format"),
        ("answers with a summary", "summary"), ("tokens in an answer", "length"),
        ("helpfulness, 0 to 1", "helpfulness"),
        ("more helpful than Dev1", "win_rate_dev1"), ("format, general prompts", "general_format"),
        ("language, general prompts", "general_language"))
PAPER = (("paper: AIME 2024", "77.9", "59.0", "74.0", "78.1", "79.8"),  # R1 v2 Table 3
         ("paper: MATH-500", "95.9", "94.2", "95.9", "95.4", "97.3"),
         ("paper: AlpacaEval 2 LC", "24.7", "50.1", "55.8", "62.1", "87.6"),
         ("paper: Arena-Hard", "53.6", "77.0", "73.2", "75.6", "92.3"),
         ("paper: IF-Eval", "46.6", "71.7", "72.0", "78.1", "83.3"))
TAUGHT = (  # stage, what was done, the paper's AIME 2024 pass@1 / cons@64 (R1 v1 Table 6)
    ("student", "base", ""), ("student_rl", "RL", "47.0 / 60.0, Qwen-32B-Zero"),
    ("student_rl_no_format", "RL without format reward", ""),
    ("distill", "distilled", "72.6 / 83.3, R1-Distill-Qwen-32B"),
    ("distill_logits", "distilled by logits, KL at temperature 1", ""),
    ("distill_rl", "distilled, then RL", "said to help, no numbers"))

# What the paper found, by section: (lower figure, higher, what that means); a number: our limit.
CLAIMS = {
    "Base and R1-Zero": [
        ("base.pass@1", "zero.pass@1", "RL alone raises accuracy"),
        ("zero.pass@1", "zero.cons@16", "the vote is above single answers"),
        ("base.length", "zero.length", "RL makes answers longer"),
        ("base.reflection", "zero.reflection", "RL makes answers check themselves"),
        (5, "zero.reflection_ratio", "checks rise at least 5 times, as reflective words did")],
    "The stages": [
        ("dev1.pass@1", "zero.pass@1", "the cold start costs accuracy"),
        ("zero.pass@1", "r1.pass@1", "R1 ends above Zero in accuracy"),
        ("r1.behind_zero", 0.03, "R1 ends at most 3 points behind Zero"),
        ("r1.mixing", "zero.mixing", "R1 mixes languages less than Zero"),
        ("dev3.helpfulness", "r1.helpfulness", "the last RL makes answers more helpful"),
        ("r1.mixing", 0.02, "R1 mixes languages in at most 2% of answers"),
        (0.95, "refuse.unsafe", "R1 refuses at least 95% of harmful wishes"),
        ("refuse.safe", 0.05, "R1 refuses at most 5% of harmless wishes"),
        ("greeting.thinking", 0.05, "R1 thinks about at most 5% of greetings")],
    "The language reward": [
        ("dev2.mixing", "no_language_reward.mixing",
         "RL without the language reward mixes languages more (R1 v2 Fig 7)"),
        (3, "no_language_reward.ratio", "at least 3 times as much")],
    "Distillation and RL on a small model": [
        ("student.rl.pass@1", "student.distill.pass@1", "distillation beats RL"),
        (1, "flops.rl_to_distill", "RL on the student took at least the FLOPs of distillation"),
        (1, "flops.rl_to_logits", "RL on the student took at least the FLOPs of that by logits"),
        ("student.distill.pass@1", "student.distill_rl.pass@1",
         "RL after distillation helps further (said without numbers)")],
    "Accuracy by number of answers": [
        ("r1.eval.pass@1", "r1.eval.cons@4", "voting helps R1 (AIME 79.8 to 86.7)")]}


def table(head, body):
    """A table from the cells of its head and of its other lines; none without those."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]] if body else []


def cell(rows, key, factor=1):
    """A figure's mean, and its deviation over seeds if there are several; "" if there is none."""
    if key not in rows:
        return ""
    m, std = rows[key]["mean"] * factor, rows[key]["std"] * factor
    digits = 1 if m > 10 else 3
    return f"{m:.{digits}f}" + f" ± {std:.{digits}f}" * (len(rows[key]["per_seed"]) > 1)


def per_seed(rows, key):
    """A figure's values by seed; none if there is no such figure."""
    return rows.get(key, {"per_seed": {}})["per_seed"]


def verdicts(rows, section):
    """A list of sentences, each one of two: whether a claim holds on every seed, or not."""
    lines = [""]
    for *sides, claim in CLAIMS.get(section, ()):
        keys = [x for x in sides if isinstance(x, str)]
        seeds = set.intersection(*(set(per_seed(rows, key)) for key in keys))
        pairs = [[rows[x]["per_seed"][seed] if x in keys else x for x in sides] for seed in seeds]
        held = sum(low < high or low == high and len(keys) == 1 for low, high in pairs)
        words = ("As in the paper", "Not as in the paper") if len(keys) == 2 else ("Yes", "No")
        if seeds:
            shown = ", ".join(f"`{key}` {rows[key]['mean']:.3g}" for key in keys)
            lines.append(f"- {words[held < len(seeds)]}: {claim} ({shown}; on {held} of "
                         f"{len(seeds)} seeds).")
    return lines[1:] and lines


def story(rows):
    """Base and zero on held-out problems, beside the paper."""
    head = ("held-out problems", "base", "zero", "base, evaluated", "zero, evaluated", "paper")
    return table(head, [(name, *(cell(rows, f"{stage}.{key}") for stage in (
        "base", "zero", "base.eval", "zero.eval")), paper) for name, key, paper in STORY
        if "base.pass@1" in rows or "zero.pass@1" in rows])


def climb(curves):
    """Zero on dev at temperature 1, against its steps; means over runs."""
    return table(("RL step", *CURVES), [(str(step), *(
        f"{row[name]:.{1 if name == 'length' else 3}f}" if name in row else "" for name in CURVES))
        for step, row in by_step(
            runs_named(curves, RL.objective), "zero", CURVES).items()])


def stages(rows, lines=LONG, levels=True):
    """The stages from Zero to R1 side by side; levels are numbers of operations."""
    found = {stage: name for stage, name in STAGES.items() if f"{stage}.pass@1" in rows}
    if not {"dev1", "dev2", "dev3", "r1"} & set(found):
        return []
    if levels:
        lines = [*((f"pass@1, {n} operations", f"level{n}") for n in range(1, 10)), *lines]
    body = [(name, *(cell(rows, f"{stage}.{key}") for stage in found)) for name, key in lines]
    paper = [(name, *(x for stage, x in zip(STAGES, values) if stage in found))
             for name, *values in PAPER if levels]
    return table(("held-out", *found.values()), [b for b in body if any(b[1:])] + paper)


def language(rows, curves):
    """RL for reasoning with and without the language reward, at its end and by step."""
    if not {"dev2.mixing", "no_language_reward.mixing"} <= set(rows):
        return []
    names = ("mixing", "language", "pass@1")
    sides = [by_step(runs_named(curves, name), "dev2", names)
             for name in (RL.objective, "no_language_reward")]
    head = [f"{name}, {side}" for name in names for side in ("with", "without")]
    body = [(str(step), *(f"{side[step][name]:.3f}" for name in names for side in sides))
            for step in sides[0] if step in sides[1]]
    test = [cell(rows, f"{side}.{name}") for name in names
            for side in ("dev2", "no_language_reward")]
    return table(("RL step, on dev", *head), [*body, ("the end, on test", *test)])


def counts(rows, *stages):
    """The numbers of answers k that there is a pass@k for, of some stages."""
    return sorted({int(key.rpartition("@")[2]) for key in rows for stage in stages
                   if key.startswith(f"{stage}.pass@")})


def students(rows):
    """What becomes of a small base by RL and by distillation, with what each step up costs."""
    vote = f"cons@{max(counts(rows, *STUDENTS.values()), default=1)}"
    body = [(name, *(cell(rows, f"{STUDENTS[stage]}.{key}") for key in ("pass@1", vote, "length")),
             cell(rows, f"flops.{stage}"), cell(rows, f"minutes.{stage}", 60), paper)
            for stage, name, paper in TAUGHT]
    apart = [(name, "", "", "", cell(rows, f"flops.{key}"), cell(rows, f"minutes.{key}", 60), "")
             for name, key in (("apart: R1's samples", "collect_distill"),
                               ("apart: R1, all stages", "teacher"))]
    if not any(b[1] for b in body[1:]):
        return []
    head = ("student", "pass@1", vote, "length", "TFLOP", "seconds", "paper: AIME pass@1 / cons@64")
    return table(head, [b for b in body + apart if any(b[1:6])]) + ["", FLOPS]


def votes(rows):
    """Accuracy by the number of answers: the best of k, and the vote."""
    ks = counts(rows, "base", "zero", "r1")
    names = [f"pass@{k}" for k in ks] + [f"cons@{k}" for k in ks[-1:]]
    body = [(f"{stage}{how}", *(cell(rows, f"{stage}{key}.{name}") for name in names))
            for stage in ("base", "zero", "r1")
            for key, how in (("", ", temperature 1"), (".eval", ", evaluated"))]
    return table(("held-out problems", *names), [b for b in body if any(b[1:])])


def times(rows):
    """Minutes by stage: to train it, for the samples it learns from, and for its tests."""
    body = [(stage, *(cell(rows, f"minutes.{part}{stage}") for part in ("", "collect_", "test_")))
            for stage in (*TEACHER, *STUDENTS) if f"minutes.{stage}" in rows]
    paper = ("The paper's cost, in thousands of H800-hours: R1-Zero 101, SFT data 5, R1 41 (R1 v2 "
             "Table 7).")
    lines = table(("stage", "training", "samples", "tests"), [
        *body, ("in all", cell(rows, "minutes"), "", "")])
    return body and [*lines, "", f"Memory: {cell(rows, 'peak_gib')} GiB. {paper}"]


def objectives(rows):
    """What each objective makes of the same bases."""
    columns = ("pass@1", "eval.pass@1", "cons@16", "length", "reflection", "mixing", "steps_to_85")
    names = [name for name in OBJECTIVES if f"objective.{name}.pass@1" in rows]
    return table(("objective", *columns), [(name, *(
        cell(rows, f"objective.{name}.{column}") for column in columns))
        for name in names if len(names) > 1])


def bases(rows):
    """What each seed's base can do at temperature 1, by number of operations."""
    levels = [f"level{n}" for n in range(1, 10) if f"base.level{n}" in rows]
    names = ["pass@1", *levels, *(f"checked.{level}" for level in levels)]
    head = [name.replace(".level", " ").removeprefix("level") for name in names]
    return table(("seed", *head), [(seed, *(
        f"{values[seed]:.2f}" if seed in values else "-" for values in (
            per_seed(rows, f"base.{name}") for name in names)))
        for seed in per_seed(rows, "base.pass@1")])
