"""The whole pipeline, and three ablations: the language reward, the format reward on the student,
and distillation by logits.

    python r1mini.py study r1
"""
RUNS = [("r1-{seed}", "all"),
        ("logits-{seed}", "distill --from runs/r1-{seed}/r1.pt "
         "--data runs/r1-{seed}/distill.jsonl --only distill_logits"),
        ("noformat-{seed}",
         "distill --from runs/r1-{seed}/student.pt --only student_rl_no_format"),
        ("no_language_reward=nolang-{seed}",
         "dev2 --from runs/r1-{seed}/dev1.pt --set dev2.language_weight=0")]
