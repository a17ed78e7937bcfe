"""Does the choice of objective matter? GRPO, Dr. GRPO, DAPO and GSPO from the same bases.

The paper: on AIME 2024, with Qwen2.5-32B, naive GRPO reaches 30 and all changes of DAPO
together 50 (DAPO Table 1).

    python r1mini.py study zero

Each seed pretrains one base. RL then starts from it once with each objective.
"""
from grpo import OBJECTIVES, RL

SEEDS = range(6)
OTHERS = [name for name in OBJECTIVES if name not in (RL.objective, "kimi")]  # study kimi
RUNS = [("zero-{seed}", "zero")]
for name in OTHERS:
    RUNS.append((name + "-{seed}", "zero --from runs/zero-{seed}/base.pt "
                                   f"--set zero.objective={name} eval.longer=1"))
