"""Does the choice of objective matter? GRPO, Dr. GRPO, DAPO and GSPO from the same bases.

The paper: on AIME 2024, with Qwen2.5-32B, naive GRPO reaches 30 and all changes of DAPO
together 50 (DAPO Table 1).

    python r1mini.py study zero

RL starts with each objective from the bases that `study r1` made. So run `study r1` first.
Kimi's objective has a study of its own.
"""
SEEDS = range(6)
FOLDERS = {"grpo": "zero", "dr_grpo": "dr_grpo", "dapo": "dapo", "gspo": "gspo"}
RUNS = [(f"{folder}-{{seed}}", "zero --from runs/r1-{seed}/base.pt "
                               f"--set zero.objective={objective} eval.longer=1")
        for objective, folder in FOLDERS.items()]
