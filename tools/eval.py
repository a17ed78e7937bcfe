"""eval: tests a checkpoint on the held-out problems of its preset, or on the problems of a file.

    python r1mini.py eval runs/nano/r1.pt
    python r1mini.py eval runs/nano/r1.pt --problems FILE.jsonl --samples 64 --json

The answers to a problem of a file do not depend on the other problems in the file.

With --samples above 16 it also reports, for each power of 2 up to --samples, the majority vote of k
answers and the most central of k answers.
"""
import json

import tasks
from engine.errors import UserError
from engine.evaluate import (
    answer_embeddings,
    answer_seeds,
    evaluate,
    prompts_of,
    read_problems,
    repeat_for_answers,
    sample_answers,
    selection_scores,
)
from tools.cli import load_from_arguments
from tools.settings import resolve_settings


def main(options):
    """The command eval. Prints the means, or with --json one object with every problem in the
    order of the file."""
    model, record = load_from_arguments(options)
    run = resolve_settings(record.get("preset", "nano"), options.set)
    s, limit = run.eval, run.zero.max_new_tokens
    if options.problems:
        problems = read_problems(options.problems)
        seed = answer_seeds(problems, options.samples)
    else:
        problems = tasks.make_problems("test", s.problems, run.zero.levels, run.corpus.products)
        seed = 1
    _check_room(problems, model.config.max_seq_len - limit)

    means, by_problem = evaluate(model, problems, options.samples, s.temperature, s.top_p, limit,
                                 s.rows, seed, name="answers")
    if options.samples > 16:
        # The seed is the same, so these are the same answers once more.
        prompts = repeat_for_answers(prompts_of(problems), options.samples)
        ids = sample_answers(model, prompts, limit, s.rows, s.temperature, s.top_p, seed)
        texts = [tasks.decode(answer) for answer in ids]
        embeddings = answer_embeddings(model.eval(), prompts, ids)
        means |= selection_scores(texts, problems, embeddings)

    if options.json:
        print(json.dumps(means | {"by_problem": by_problem}))
        return 0
    for name, value in means.items():
        if isinstance(value, float):
            print(f"{name:12} {value:.3f}")
        elif not isinstance(value, dict):
            print(f"{name:12} {value}")
    if not options.problems:  # the problems of a file have no level
        for level, value in means["by_level"].items():
            print(f"level {level:6} {value:.3f}")
    return 0


def _check_room(problems, room):
    """UserError if a problem has more than `room` tokens."""
    for i, problem in enumerate(problems, 1):
        length = len(tasks.encode_prompt(problem.question))
        if length > room:
            raise UserError(f"problem {i} is too long: it has {length} tokens, and only "
                            f"{max(0, room)} fit beside an answer; shorten it, or --set a lower "
                            "zero.max_new_tokens")
