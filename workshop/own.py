"""Your own task. Here: sort four digits, easy enough to learn, hard enough to need RL.

    python workshop/own.py

The base reads documents of which three in ten are right. RL then gets a reward by rule.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import moe
import r1mini
import tasks
from grpo import RL, Task, train_rl
from r1mini import Train, train


def question(rng, n=1, step=0):  # your problems: n questions with their right answers
    numbers = ["".join(rng.choices("0123456789", k=4)) for _ in range(n)]
    return [tasks.Problem(f"sort {x}", "".join(sorted(x)), "en") for x in numbers]


def document(rng):  # your internet: mostly wrong, in the style that answers may have
    [problem] = question(rng)
    shuffled = "".join(rng.sample(problem.answer, 4))
    return tasks.dialogue(problem, problem.answer if rng.random() < 0.3 else shuffled)


def right(texts, problems):  # your reward: a number for each text, by rule
    return [float(text == problem.answer) for text, problem in zip(texts, problems)]


def main(base_steps=300, rl_steps=20):
    """Trains a base, then improves it by RL. Returns the accuracy of each rollout."""
    torch.manual_seed(0)
    model = moe.Transformer(r1mini.PRESETS["micro"])
    for _ in train(model, Train(steps=base_steps), document, seed=0):
        pass
    task = Task(question, lambda problem: tasks.encode_prompt(problem.question), tasks.decode,
                {"accuracy": (1.0, right)}, {}, tasks.END_ID, tasks.PAD_ID)
    accuracies = []
    for record, _ in train_rl(model, task, RL(steps=rl_steps, max_new_tokens=8, lr=1e-3)):
        accuracies.append(record["accuracy"])
        print(f"rollout {record['step']:3}: right {record['accuracy']:.2f}")
    return accuracies


if __name__ == "__main__":
    main()
