"""eval: a checkpoint on the held-out problems of its preset, or on those of a user's file.

With --samples above 16 also the vote and the most central answer of k, for each power of 2.
"""
import json

import tasks
from engine.errors import UserError
from engine.evaluate import (
    embeddings,
    evaluate,
    prompts_of,
    read_problems,
    sample_answers,
    selection,
)
from tools.cli import load_writer
from tools.settings import resolve


def main(options):
    """Prints the means, or with --json one object with every problem in file order."""
    model, record = load_writer(options)
    run = resolve(record.get("preset", "nano"), options.set)
    s, limit = run.eval, run.zero.max_new_tokens
    problems = read_problems(options.problems) if options.problems else \
        tasks.make_problems("test", s.problems, run.zero.levels, run.corpus.products)
    room = model.config.max_seq_len - limit
    for i, problem in enumerate(problems, 1):
        if (n := len(tasks.encode_prompt(problem.question))) > room:
            raise UserError(f"problem {i} is too long: {n} tokens; {room} fit beside an "
                                   "answer")
    result, each = evaluate(model, problems, options.samples, s.temperature, s.top_p, limit,
                                   s.rows, seed=1, name="answers")
    if options.samples > 16:  # the same seed, so the same answers once more
        prompts = [prompt for prompt in prompts_of(problems)
                   for _ in range(options.samples)]
        ids = sample_answers(model, prompts, limit, s.rows, s.temperature, s.top_p, 1)
        result |= selection([tasks.decode(x) for x in ids], problems,
                            embeddings(model.eval(), prompts, ids, s.rows))
    if options.json:
        print(json.dumps(result | {"by_problem": each}))
        return 0
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name:12} {value:.3f}" if isinstance(value, float) else f"{name:12} {value}")
    for level, value in result["by_level"].items() if not options.problems else ():
        print(f"level {level:6} {value:.3f}")
    return 0
