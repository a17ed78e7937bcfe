"""Does pretraining give every seed the skill that RL needs?

The paper: RL needs a capable base. DeepSeek's own 7B and 16B bases gained nothing on
AIME, larger ones did (R1 v2 section G.1).

    python r1mini.py study base

This study pretrains the base with ten seeds and tests each one on held-out problems.
"""
SEEDS = range(10)
RUNS = [("base-{seed}", "base")]
