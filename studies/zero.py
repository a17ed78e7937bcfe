"""Does the choice of objective matter? GRPO, Dr. GRPO, DAPO and GSPO from the same bases.

The paper: on AIME 2024, with Qwen2.5-32B, naive GRPO reaches 30 and all changes of DAPO
together 50 (DAPO Table 1).

    python r1mini.py study zero

RL starts with each objective from the bases that `study r1` made (run it first).
"""
from grpo import OBJECTIVES, RL

SEEDS = range(6)
RUNS = []
for name in OBJECTIVES:
    if name != "kimi":  # it has a study of its own
        folder = "zero" if name == RL.objective else name
        RUNS.append((folder + "-{seed}", "zero --from runs/r1-{seed}/base.pt "
                                         f"--set zero.objective={name} eval.longer=1"))
