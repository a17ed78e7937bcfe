"""Do the objectives differ? GRPO, Dr. GRPO, DAPO and GSPO from the same bases.

    python r1mini.py study zero
"""
from grpo import OBJECTIVES, RL

OTHERS = [name for name in OBJECTIVES if name != RL.objective]
RUNS = [("zero-{seed}", "zero")] + [
    (name + "-{seed}", "zero --from runs/zero-{seed}/base.pt "
     f"--set zero.objective={name} eval.longer=1") for name in OTHERS]
