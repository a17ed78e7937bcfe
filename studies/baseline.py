"""What else could be made of the base, beside Zero's RL?

    python r1mini.py study baseline

    sft         SFT on the base's own right answers, for as many FLOPs as Zero's RL took
    examples    the base with 2 or 4 worked examples in its prompt
    vote        the base's majority vote

FLOPs a token, with N active parameters: 2N to write or read it, 6N to learn it. RL so takes 10N
(the policy writes, the reference reads, the policy learns), 2N in dead groups. Figures are of test
problems, at temperature 1; where SFT stops is fixed by its FLOPs, not chosen.
"""
import copy
import dataclasses
import random
from pathlib import Path

import moe
import tasks
from engine import checkpoint
from engine.evaluate import sample_answers, selection
from engine.folder import read_log
from engine.watch import Watch
from r1mini import collect, train
from tools.cost import in_products
from tools.report import flops_by_stage
from tools.study import once, tested
from tools.tables import cell, table

SETTINGS, NEEDS, STAGES = (), ("base.pt", "zero.pt"), ("sft",)


def cost_of_rl(log):
    """(answers drawn, tokens of their prompts, FLOPs a parameter) of zero's RL in a run's log."""
    updates, s = [r for r in log if r["kind"] == "zero"], log[0]["zero"]
    return (len(updates) * s["problems"] * s["group_size"] * s["oversample"],
            sum(r["prompt_tokens"] for r in updates),
            flops_by_stage(log)["zero"] * 1e12
            / in_products(moe.Config(**log[0]["model"]), mtp=False))


def rejection_sampling(folder, base, log):
    """SFT on the base's own right answers: it draws as many as RL did, then learns from those that
    RL rewards in full until RL's FLOPs are spent. Returns (model, figures)."""
    run = folder.run
    count, read, work = cost_of_rl(log)
    documents = collect(folder, "sft", base, count // run.data.tries,
                        lambda text, p: tasks.accuracy(text, p) and tasks.format_reward(text))
    drawn = next(r for r in read_log(folder.path) if r["kind"] == "collected")
    left = work - 2 * (drawn["tokens"] + read)  # in N
    step = 6 * run.dev3.documents * sum(len(d.tokens) for d in documents) / len(documents)
    s = dataclasses.replace(run.dev3, steps=max(1, round(left / step)))
    model = folder.stage("sft", copy.deepcopy(base), lambda m, state: train(
        m, s, lambda rng: rng.choice(documents), run.seed, state), s.steps,
        Watch(folder, "sft", s.dev_every, s.steps))
    return model, {"sft.kept": drawn["kept"], "sft.of": drawn["of"], "sft.steps": s.steps,
                   "sft.epochs": s.steps * s.documents / len(documents)}


def with_examples(problem, n, rng, level):
    """Token ids of a prompt after n dialogues with checked workings, in the problem's language."""
    ids = []
    for _ in range(n):
        example = tasks.make_problem(rng, level, "train", problem.language)
        text = tasks.response(*tasks.work(example, "checked", rng))
        ids += tasks.encode_prompt(example.question) + tasks.encode_response(text)
    return ids + tasks.encode_prompt(problem.question)


def few_shot(model, run, n):
    """A model's figures with n worked examples, of as few operations as any problem has."""
    problems = tasks.make_problems("test", run.eval.problems, run.zero.levels, run.corpus.products)
    prompts = [prompt for i, p in enumerate(problems) for prompt in [with_examples(
        p, n, random.Random(f"examples/{i}"), min(run.zero.levels))] * run.eval.samples]
    room = model.config.max_seq_len - max(map(len, prompts))
    ids = sample_answers(model, prompts, min(room, run.zero.max_new_tokens), run.eval.rows, seed=1)
    return selection([tasks.decode(x) for x in ids], problems)


def measure(folder):
    """The figures of a run's base and of what was made of it, by key such as sft.pass@1."""
    run, given = folder.run, Path(folder.run.start).parent
    base = checkpoint.load(given / "base.pt", folder.options.device, folder.options.dtype)[0]
    learnt, found = rejection_sampling(folder, base, read_log(given))
    records = {"zero": tested(given, "zero")}
    for name, model, n in (("base", base, 0), ("sft", learnt, 0), ("examples2", base, 2),
                           ("examples4", base, 4)):
        records[name] = once(folder, f"test_{name}", lambda: few_shot(model, run, n))
    for name, record in records.items():
        found |= {f"{name}.{key}": x for key, x in record.items()
                  if key in ("pass@1", f"cons@{run.eval.samples}")}
    return found


NAMES = {"base": "the base", "examples2": "with 2 worked examples in the prompt",
         "examples4": "with 4 worked examples", "sft": "SFT on its own right answers",
         "zero": "RL: zero"}


def page(rows, notes):
    """The table of the report, and what each way gains."""
    vote = next(key.partition(".")[2] for key in rows if key.startswith("base.cons@"))
    first = {name: 100 * rows[f"{name}.pass@1"]["mean"] for name in NAMES}
    gain = {name: f"{first[name] - first['base']:+.1f}" for name in NAMES}
    best = max("examples2", "examples4", key=first.get)
    return [*table(["", "pass@1", vote], [[text, *(cell(rows, f"{name}.{key}") for key in (
        "pass@1", vote))] for name, text in NAMES.items()]), "",
        f"RL changes pass@1 by {gain['zero']} points; SFT on the base's own right answers, for as "
        f"many FLOPs, by {gain['sft']}; examples in the prompt, at best, by {gain[best]}. The "
        f"base's vote is {100 * rows[f'base.{vote}']['mean'] - first['base']:+.1f} from its first "
        "try. The base has read documents of one dialogue only.", "",
        "SFT: {:.0f} of {:.0f} answers kept, {:.0f} steps, {:.1f} epochs.".format(*(
            rows[f"sft.{key}"]["mean"] for key in ("kept", "of", "steps", "epochs")))]
