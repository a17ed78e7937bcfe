"""From which base on does RL work? Students by width and steps of pretraining, each with RL and
with distillation.

    python r1mini.py study threshold

The paper: DeepSeek's own dense base of 7B and mixture of 16B gained nothing by RL on AIME, larger
ones did (R1 v2 G.1).
"""
from engine.folder import read_log
from tools.figures import sheet, threshold_picture
from tools.report import of_flops
from tools.study import tested
from tools.tables import table

# Beside the student of every run.
POINTS = ((48, 250), (64, 500), (64, 800))
RUNS = [(f"threshold-{dim}-{steps}-{{seed}}",
         "distill --from runs/r1-{seed}/r1.pt --only student student_rl distill "
         f"--set student.dim={dim} student.inter_dim={3 * dim} "
         f"student_base.steps={steps} student_rl.steps=60")
        # at least distillation's FLOPs: a narrow student's answers shrink to eight tokens
        for dim, steps in POINTS]
# What became of a student: its base, and what RL and distillation made of it.
FATES = {"base": "student", "RL": "student_rl", "distilled": "distill"}


def figures(seed, at="runs/"):
    """pass@1 of what became of each student of a seed, and the TFLOP that took, by key such as
    64-500.RL and 64-500.RL.tflop."""
    folders = {f"{dim}-{steps}": f"{at}threshold-{dim}-{steps}-{seed}" for dim, steps in POINTS}
    folders["default"] = f"{at}r1-{seed}"
    found = {}
    for name, folder in folders.items():
        log = read_log(folder)
        dev = [r for r in log if r["kind"] == "dev" and r["stage"] == "student"]
        found[f"{name}.base, on dev"] = dev[-1]["pass@1"]
        for fate, stage in FATES.items():
            found[f"{name}.{fate}"] = tested(folder, stage)["pass@1"]
            found[f"{name}.{fate}.tflop"] = of_flops(log)[stage]
    return found


def page(rows, notes):
    """From what base on does RL work? Sorted by the base, each seed's students for themselves."""
    names = {f"{dim}-{steps}": f"width {dim}, {steps} steps" for dim, steps in POINTS}
    names["default"] = "the table's: width 48, 400 steps"
    columns = [*FATES, "base, on dev", *(f"{fate}.tflop" for fate in FATES)]
    students = [([rows[f"{key}.{column}"]["per_seed"][seed] for column in columns],
                 f"{name}, seed {seed}")
                for key, name in names.items() for seed in rows[f"{key}.base"]["per_seed"]]
    lower = [b for (b, rl, distilled, *_), _ in students if rl < distilled]
    stuck = [b for (b, rl, *_), _ in students if rl < 0.5]
    cheap = [name for values, name in students if values[-2] < values[-1]]
    plot = sheet("results/threshold", "threshold", threshold_picture(rows))
    heads = [column.replace(".tflop", ", TFLOP") for column in columns]
    return [*table(["student", *heads], [[name, *(f"{x:.3f}" for x in values)]
                                         for values, name in sorted(students)]), "", *plot, "",
            f"Distilled beats RL on {len(lower)} of {len(students)} students"
            + (f", the best of them with a base at {max(lower):.3f}" if lower else "")
            + f". RL stays below one half on {len(stuck)}"
            + (f", with bases up to {max(stuck):.3f}." if stuck else ".")
            + f" RL took fewer FLOPs than distillation on {len(cheap)}. The table's student was "
            "chosen on dev, before this curve.", "",
            "The paper: DeepSeek's own dense base of 7B and mixture of 16B gained nothing by RL on "
            "AIME, larger ones did (R1 v2 G.1); Qwen2-Math-7B came to 22.3 (Table 17); Qwen-32B "
            "reached 47.0 by RL, 72.6 distilled (R1 v1 Table 6)."]
