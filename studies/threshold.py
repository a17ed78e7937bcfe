"""How good must a base be for RL to work?

The paper: RL gained nothing on AIME from DeepSeek's own dense 7B base and 16B mixture;
larger bases gained (R1 v2 section G.1). At 32B, RL reaches 47.0 and distillation 72.6
(R1 v1 Table 6).

    python r1mini.py study threshold

Students of several widths and lengths of pretraining are the bases. RL and distillation
both start from each of them.
"""
from engine.folder import read_log
from tools.compare import compare
from tools.figures import threshold_picture
from tools.flops import flops_by_stage
from tools.study import test_record
from tools.tables import table

POINTS = ((48, 250), (64, 500), (64, 800))  # width and pretraining steps of the new students
RUNS = [(f"threshold-{dim}-{steps}-{{seed}}",
         "distill --from runs/r1-{seed}/r1.pt --only student student_rl distill "
         f"--set student.dim={dim} student.inter_dim={3 * dim} "
         f"student_base.steps={steps}")
        for dim, steps in POINTS]
# {name in keys: stage} of a student: its base, then what RL and distillation make of it.
FATES = {"base": "student", "RL": "student_rl", "distilled": "distill"}


def numbers(seed, at="runs/"):
    """pass@1 and TFLOP of each student of a seed, by key such as 64-500.RL and
    64-500.RL.tflop."""
    folders = {f"{dim}-{steps}": f"{at}threshold-{dim}-{steps}-{seed}" for dim, steps in POINTS}
    folders["default"] = f"{at}r1-{seed}"  # study r1's student
    numbers = {}
    for name, folder in folders.items():
        log = read_log(folder)
        dev = [r for r in log if r["kind"] == "dev" and r["stage"] == "student"]
        numbers[f"{name}.base, on dev"] = dev[-1]["pass@1"]
        for fate, stage in FATES.items():
            numbers[f"{name}.{fate}"] = test_record(folder, stage)["pass@1"]
            numbers[f"{name}.{fate}.tflop"] = flops_by_stage(log)[stage]
    return numbers


def picture(rows):
    """What RL and distillation made of each student, against its base."""
    return threshold_picture(rows)


def page(rows, notes):
    """The lines of the report: the students of all seeds sorted by their bases."""
    names = {f"{dim}-{steps}": f"width {dim}, {steps} steps" for dim, steps in POINTS}
    names["default"] = "the table's: width 48, 400 steps"
    columns = [*FATES, "base, on dev", *(f"{fate}.tflop" for fate in FATES)]
    students = []  # (values of the columns, name)
    for key, name in names.items():
        for seed in rows[f"{key}.base"]["per_seed"]:
            values = [rows[f"{key}.{column}"]["per_seed"][seed] for column in columns]
            students.append((values, f"{name}, seed {seed}"))
    heads = [column.replace(".tflop", ", TFLOP") for column in columns]
    body = [[name, *(f"{x:.3f}" for x in values)] for values, name in sorted(students)]

    lower, stuck, cheap = [], [], 0  # lower, stuck: pass@1 of bases
    for (base, rl, distilled, _, _, rl_tflop, distilled_tflop), _ in students:
        if rl < distilled:
            lower.append(base)
        if rl < 0.5:
            stuck.append(base)
        if rl_tflop < distilled_tflop:
            cheap += 1
    finding = f"Distillation beats RL on {len(lower)} of {len(students)} students"
    if lower:
        finding += f", the best of them with a base at {max(lower):.3f}"
    finding += f". RL stays below one half on {len(stuck)}"
    if stuck:
        finding += f", with bases up to {max(stuck):.3f}"
    finding += (f". RL took fewer FLOPs than distillation on {cheap}. The table's student was "
                "chosen on dev, before this study.")
    claims = []
    for key, name in names.items():
        comparison = compare(rows, f"{key}.RL", f"{key}.distilled")
        claims.append(f"- {name}: that distillation beats RL {comparison.verdict}; the difference "
                      f"is {comparison.text(points=True)}")
    return [*table(["student", *heads], body), "", finding, "", *claims, "",
            "The paper: RL gained nothing on AIME from DeepSeek's own dense 7B base and 16B "
            "mixture; larger bases gained (R1 v2 G.1). Qwen2-Math-7B reached 22.3 (Table 17). "
            "Qwen-32B reached 47.0 by RL and 72.6 by distillation (R1 v1 Table 6)."]
