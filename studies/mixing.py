"""Does R1-Zero mix languages only because checked solutions mix them in our corpus?

The paper: R1-Zero mixes English and Chinese in one chain of thought; its base has read
mostly these two languages (R1 v2 section A.1).

    python r1mini.py study mixing

In our corpus, checked solutions mix languages more often than short ones. In this study
both mix them equally often. Longer answers have more words, and so more chances to mix.
So compare answers of one style with each other.
"""
RUNS = [("mixing-{seed}", "zero --set corpus.steps_mixed=0.4 corpus.checked_mixed=0.4")]
