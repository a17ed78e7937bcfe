"""Train on your own task. Here the task is to sort four digits.

    python workshop/own.py

A base learns from documents, of which three in ten are right. Then RL rewards right answers by a
rule. The task is three functions of studies/transfer.py: question, document and right. To train on
your task, define your own three below the imports: they replace the imported ones.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import moe
import r1mini
from grpo import RL, train_rl
from r1mini import Train, train
from studies.transfer import document, make_task, question, right


def main(base_steps=300, rl_steps=20):
    """Trains a base, then improves it by RL. Returns the accuracy of each rollout."""
    torch.manual_seed(0)
    model = moe.Transformer(r1mini.PRESETS["micro"])
    for _ in train(model, Train(steps=base_steps), document, seed=0):
        pass
    accuracies = []
    s = RL(steps=rl_steps, max_new_tokens=8, lr=1e-3)
    for record, _ in train_rl(model, make_task(question, right), s):
        accuracies.append(record["accuracy"])
        print(f"rollout {record['step']:3}: right {record['accuracy']:.2f}")
    return accuracies


if __name__ == "__main__":
    main()
