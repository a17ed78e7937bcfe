"""Does Zero mix languages only since the corpus' checked style does? Here every style mixes equally
often; but a longer one shows it more: compare within one.

    python r1mini.py study mixing
"""
RUNS = [("mixing-{seed}", "zero --set corpus.steps_mixed=0.4 corpus.checked_mixed=0.4")]
