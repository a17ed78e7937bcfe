"""Your own task. Here: sort four digits, easy enough to learn, hard enough to need RL.

    python workshop/own.py

The base reads documents of which three in ten are right. RL then gets a reward by rule. The task
is in studies/transfer.py, in three functions: question, document and right. Write your own three
here, or in a file of yours.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import moe
import r1mini
from grpo import RL, train_rl
from r1mini import Train, train
from studies.transfer import document, make_task


def main(base_steps=300, rl_steps=20):
    """Trains a base, then improves it by RL. Returns the accuracy of each rollout."""
    torch.manual_seed(0)
    model = moe.Transformer(r1mini.PRESETS["micro"])
    for _ in train(model, Train(steps=base_steps), document, seed=0):
        pass
    accuracies = []
    s = RL(steps=rl_steps, max_new_tokens=8, lr=1e-3)
    for record, _ in train_rl(model, make_task(), s):
        accuracies.append(record["accuracy"])
        print(f"rollout {record['step']:3}: right {record['accuracy']:.2f}")
    return accuracies


if __name__ == "__main__":
    main()
