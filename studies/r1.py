"""Does R1's whole recipe work in miniature?

The paper: AIME 2024 pass@1 is 77.9 for R1-Zero, 59.0, 74.0 and 78.1 for Dev1 to Dev3, and
79.8 for R1 (R1 v2 Table 3). A 32B student reaches 72.6 by distillation and 47.0 by RL
(R1 v1 Table 6).

    python r1mini.py study r1

Each seed runs the whole pipeline, then three ablations:

    logits               the student learns R1's probabilities, not only its answers
    noformat             RL on the student without the format reward
    no_language_reward   Dev2's RL without the language reward (the paper's: R1 v2
                         section B.6)
"""
SEEDS = range(6)
RUNS = [
    ("r1-{seed}", "all"),
    ("logits-{seed}",
     "distill --from runs/r1-{seed}/r1.pt "
     "--data runs/r1-{seed}/distill.jsonl --only distill_logits"),
    ("noformat-{seed}",
     "distill --from runs/r1-{seed}/student.pt --only student_rl_no_format"),
    ("no_language_reward=nolang-{seed}",
     "dev2 --from runs/r1-{seed}/dev1.pt --set dev2.language_weight=0"),
]
