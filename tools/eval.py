"""eval: tests a checkpoint on the held-out problems of its preset, or on the problems of a file.

    python r1mini.py eval runs/nano/r1.pt
    python r1mini.py eval runs/nano/r1.pt --problems FILE.jsonl --samples 64 --json
    python r1mini.py eval runs/nano/zero.pt --against runs/nano/base.pt

The answers to a problem of a file do not depend on the other problems in the file.

--against names another checkpoint. It answers the same problems with the same random numbers. The
difference of a problem is the first model's share of right answers less the other's. The mean of
the differences has a 95% t interval over problems (tools/compare.py). If the interval contains 0,
it cannot be told which model is better. The interval holds for these two checkpoints. It says
nothing about other seeds of training.

With --samples above 16, eval also reports the majority vote of k answers and the most central of k
answers, for each power of 2 up to --samples.
"""
import json
from pathlib import Path
from statistics import fmean

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
from tools.compare import paired_difference
from tools.settings import resolve_settings


def main(options):
    """The command eval. Prints the means, or with --json one object with every problem in the
    order of the file."""
    model, record = load_from_arguments(options)
    run = resolve_settings(record.get("preset", "nano"), options.set)
    if options.problems:
        problems = read_problems(options.problems)
        seed = answer_seeds(problems, options.samples)
    else:
        problems = _held_out(run)
        seed = 1
    _check_room(problems, model.config.max_seq_len - run.zero.max_new_tokens)
    other = _load_other(options, run, problems) if options.against else None

    means, by_problem = _answer(model, problems, options.samples, run, seed)
    result = means | {"by_problem": by_problem}
    if other:
        other_means, other_by_problem = _answer(other, problems, options.samples, run, seed)
        difference = _difference(by_problem, other_by_problem, options.samples)
        result |= {"against": other_means | {"by_problem": other_by_problem},
                   "difference": difference}

    if options.json:
        print(json.dumps(result))
        return 0
    if other:
        _print_means(other_means, options.against)
        _print_means(means, options.checkpoint)
        print(_verdict(difference, options))
    else:
        _print_means(means)
    return 0


def _held_out(run):
    """The test problems of a run's preset."""
    return tasks.make_problems("test", run.eval.problems, run.zero.levels, run.corpus.products)


def _answer(model, problems, samples, run, seed):
    """(means over all answers, a record for each problem) of a model."""
    s, limit = run.eval, run.zero.max_new_tokens
    means, by_problem = evaluate(model, problems, samples, s.temperature, s.top_p, limit, s.rows,
                                 seed, name="answers")
    if samples > 16:
        # The seed is the same, so these are the same answers once more.
        prompts = repeat_for_answers(prompts_of(problems), samples)
        ids = sample_answers(model, prompts, limit, s.rows, s.temperature, s.top_p, seed)
        texts = [tasks.decode(answer) for answer in ids]
        embeddings = answer_embeddings(model.eval(), prompts, ids)
        means |= selection_scores(texts, problems, embeddings)
    return means, by_problem


def _print_means(means, name=None):
    """Prints a line for each number. name: the checkpoint, if two are compared."""
    if name:
        print(f"{name}:")
    for key, value in means.items():
        if isinstance(value, float):
            print(f"{key:12} {value:.3f}")
        elif not isinstance(value, dict):
            print(f"{key:12} {value}")
    for level, value in means["by_level"].items():
        if level != "0":  # the problems of a file have no level
            print(f"level {level:6} {value:.3f}")
    if name:
        print()


# -------------------------------------------------------------------------------------------
# Against another checkpoint


def _load_other(options, run, problems):
    """The checkpoint of --against. UserError if it cannot be asked the same problems."""
    if Path(options.against).resolve() == Path(options.checkpoint).resolve():
        raise UserError(f"--against {options.against}: this is the same checkpoint; name another "
                        "one, such as the one that the run began with")
    if len({problem.question for problem in problems}) < 2:
        raise UserError("--against needs at least 2 different problems: the difference on one "
                        "problem has no interval")
    other, record = load_from_arguments(options, options.against)
    preset = record.get("preset", "nano")
    if not options.problems and _held_out(resolve_settings(preset, options.set)) != problems:
        raise UserError(f"{options.against} is of preset {preset}, {options.checkpoint} of "
                        f"{run.preset}, and their held-out problems differ: give both the same "
                        "ones by --problems FILE")
    _check_room(problems, other.config.max_seq_len - run.zero.max_new_tokens)
    return other


def _difference(by_problem, other_by_problem, samples):
    """{"mean", "low", "high", "n"} of the differences on n problems: the first model's share of
    right answers minus the other's. A question that occurs twice counts as one problem."""
    def share_of_question(records):
        shares = {}
        for record in records:
            shares.setdefault(record["question"], []).append(record["right"] / samples)
        return {question: fmean(values) for question, values in shares.items()}

    difference = paired_difference(share_of_question(by_problem),
                                   share_of_question(other_by_problem))
    return {key: difference[key] for key in ("mean", "low", "high", "n")}


def _verdict(difference, options):
    """Which of two checkpoints is better, in one line."""
    if difference["low"] > 0:
        verdict = f"{options.checkpoint} is better"
    elif difference["high"] < 0:
        verdict = f"{options.against} is better"
    else:
        verdict = "which is better cannot be told"
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return (f"{options.checkpoint} minus {options.against}: {mean:+.1f} points of pass@1, 95% "
            f"interval {low:+.1f} to {high:+.1f}, {difference['n']} problems: {verdict}")


def _check_room(problems, room):
    """UserError if a problem has more than `room` tokens."""
    for i, problem in enumerate(problems, 1):
        length = len(tasks.encode_prompt(problem.question))
        if length > room:
            raise UserError(f"problem {i} is too long: it has {length} tokens, and only "
                            f"{max(0, room)} fit beside an answer; shorten it, or --set a lower "
                            "zero.max_new_tokens")
