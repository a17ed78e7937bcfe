"""What happens beside training: dev scores, sample answers and advice; at the end, tests."""
import random
import time

from tqdm import tqdm

import tasks
from engine.doctor import advice, doctor_note, on_track
from engine.evaluate import evaluate, evaluate_general, prompts_of, sample_answers
from engine.folder import read_log
from engine.look import Look

ALSO_AS_THE_PAPER = ("base", "zero", "r1")  # tested at temperature 0.6 and top-p 0.95 too
GENERAL = ("base", "zero", "dev1", "dev2", "dev3", "r1")  # tested on general prompts


class Watch:
    """Called after each step of a stage as watch(model, record, bar), and before the first one with
    {"step": 0}. It writes to the run's log and above the progress bar.

    every: steps between evaluations on dev. settings: the stage's RL settings, None if it is
    supervised. before: the stage whose weights RL starts with.
    """

    def __init__(self, folder, stage, every, steps, settings=None, before=None):
        run = folder.run
        self.folder, self.run, self.stage, self.before = folder, run, stage, before
        self.every, self.steps, self.settings = every, steps, settings
        self.first_record, self.already_said = {}, set()
        self.look = Look(folder, stage, settings) if settings else None
        levels, products = run.zero.levels, run.corpus.products
        self.dev = tasks.make_problems("dev", run.eval.dev_problems, levels, products)
        self.shown = tasks.make_problems("test", 2 * len(levels), levels, products, "shown")
        rng = random.Random("test/shown")
        self.shown += [tasks.make_prompt(rng, "test", (kind,)) for kind in tasks.GENERAL]

    def __call__(self, model, record, bar):
        """Does what is due after a step."""
        step = record["step"]
        if step > 0:
            self.first_record = self.first_record or dict(record)
            self.advise(record, bar)
        elif self.settings is None:
            return  # a supervised stage starts from random weights, or from another stage's
        if self.look:
            self.look(model, step)
        known = self.records_of_before() if step == 0 else {}
        if step % self.every == 0 or step == self.steps:
            self.evaluate_on_dev(model, step, known.get("dev"), bar)
        if step in (0, self.steps // 2, self.steps):
            self.show_samples(model, step, known.get("samples"))

    def records_of_before(self):
        """The last dev and samples records of the stage before: step 0 has the same weights, so
        they are not made again."""
        return {r["kind"]: r for r in read_log(self.folder.path) if r.get("stage") == self.before}

    def advise(self, record, bar):
        """Says each advice once."""
        for keyword, sentence in advice(record, self.first_record, self.settings, self.stage):
            if keyword not in self.already_said:
                bar.write(doctor_note(sentence))
                self.already_said.add(keyword)

    def evaluate_on_dev(self, model, step, known, bar):
        """Logs and prints the scores on the dev problems, at temperature 1."""
        s = self.run.eval
        where = {"stage": self.stage, "step": step}
        if known:
            r = known | where
        else:
            means, _ = evaluate(model, self.dev, s.samples, 1.0, 1.0,
                                self.run.zero.max_new_tokens, s.rows)
            r = {"kind": "dev"} | where | means
        self.folder.log(r)
        mixing = "-" if r["mixing"] is None else f"{r['mixing']:.2f}"  # None: there are no words
        bar.write(f"  {self.stage} {step:>4}: dev pass@1 {r['pass@1']:.3f}  "
                  f"majority of {s.samples} {r[f'cons@{s.samples}']:.3f}  "
                  f"tokens {r['length']:3.0f}  checks {r['reflection']:.2f}  "
                  f"mixes {mixing}" + on_track(self.run, self.stage, step, r["pass@1"]))

    def show_samples(self, model, step, known):
        """Logs answers to the same few held-out questions."""
        s = self.run.eval
        where = {"stage": self.stage, "step": step}
        if known:
            self.folder.log(known | where)
            return
        ids = sample_answers(model, prompts_of(self.shown), self.run.zero.max_new_tokens, s.rows,
                             s.temperature, s.top_p)
        answers = [[p.question, p.answer, tasks.decode(x)] for p, x in zip(self.shown, ids)]
        self.folder.log({"kind": "samples"} | where | {"answers": answers})


def test_plans(run, stage):
    """[(set, problems, samples, temperature, top-p)] of the tests of a stage.

    All stages are tested at temperature 1. base, zero and r1 are also tested at temperature 0.6 and
    top-p 0.95, as in the paper: on the same problems and on longer ones than any in training. Base,
    and all stages from zero to r1, are tested on general prompts too.
    """
    s, levels = run.eval, run.zero.levels
    problems = tasks.make_problems("test", s.problems, levels, run.corpus.products)
    samples = s.samples if stage in ("base", "zero") else s.fewer_samples
    plans = [("test", problems, samples, 1.0, 1.0)]
    if stage in ALSO_AS_THE_PAPER:
        longest = max(*run.corpus.levels, *levels)
        longer = tasks.make_problems("test", 2 * s.longer, (longest + 1, longest + 2),
                                     run.corpus.products)
        plans.append(("test", problems, s.fewer_samples, s.temperature, s.top_p))
        plans.append(("longer", longer, s.fewer_samples, s.temperature, s.top_p))
    if stage in GENERAL:
        plans.append(("general", None, 0, 1.0, 1.0))
    return plans


def test_stage(folder, stage, model):
    """Tests a finished stage on held-out problems and logs the scores. What the log has already is
    not done again."""
    run, s, plans = folder.run, folder.run.eval, test_plans(folder.run, stage)
    done = sum(r["kind"] in ("test", "general") and r["stage"] == stage
               for r in read_log(folder.path))
    bar = tqdm(plans[done:], f"test {stage}", disable=done == len(plans))
    for name, asked, samples, temperature, top_p in bar:
        folder.check()
        began = time.monotonic()
        if name == "general":
            folder.log({"kind": "general", "stage": stage} | evaluate_general(model, run))
        else:
            means, _ = evaluate(model, asked, samples, temperature, top_p,
                                run.zero.max_new_tokens, s.rows, seed=1)
            folder.log({"kind": "test", "stage": stage, "set": name} | means)
        folder.clock(f"test_{stage}", 0, began)
