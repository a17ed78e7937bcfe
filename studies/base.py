"""Does every seed's base come to the skill that RL needs? Ten bases, tested.

    python r1mini.py study base
"""
SEEDS = range(10)
RUNS = [("base-{seed}", "base")]
