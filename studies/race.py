"""Which reaches 85% on dev in less time: our RL or TRL's GRPOTrainer?

The papers give no number for this. Both sides start from the same base checkpoint, and
each trains for ten minutes at most.

    python r1mini.py bench --against --from CKPT --part rl     from base.pt beside CKPT
    python r1mini.py study race                                the same, from runs/r1-SEED

Ours is what `python r1mini.py zero` does: train_rl with Zero's settings. Theirs is TRL's
GRPOTrainer on the exported base, with the same settings as far as it has them:

- the same questions in each rollout, the same number of answers, the same rewards
- GRPO's loss, clips, KL penalty, updates of the reference, and updates in a rollout
- AdamW with the same betas, and the same learning rate at each update; float32

What stays different:

- TRL reads a prompt once for each answer, writes until the longest answer ends, and pads
  all answers to it. It recomputes the old log-probabilities; ours keeps the sampler's.
- Theirs does not move DeepSeek-V3's routing bias, which transformers never moves.
- Ours leaves out groups of equal rewards; theirs learns their KL penalty.
- Theirs is one process, with the number of threads that was faster in a trial. Ours
  shares each step between processes, as the main command does.

Our evaluate() tests both on the same dev problems after every second rollout. The clock
stands still meanwhile. A side is done when it reaches 85%, when its ten minutes are over,
or after Zero's last rollout, when its learning rate is 0. The rollout under way is
finished, so a side can take a little more than ten minutes. One seed is one race: another
seed can take twice as many rollouts.
"""
import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

import tasks
from engine import devices
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.optim import learning_rate_at
from grpo import train_rl
from r1mini import make_task, rule_rewards
from tools import bench, export
from tools.study import measure_once
from tools.tables import table

DEV_GOAL = 0.85        # pass@1 on dev at temperature 1
SECONDS_LIMIT = 600.0  # seconds of training, each side
TEST_EVERY = 2         # rollouts between tests on dev


# ------------------------------------------------------------------------------
# The clock and the stop rule


@dataclass
class TimedTraining:
    """The clock of one training, and its score on dev. Tests stop the clock."""
    test: Callable                         # () -> pass@1 on dev
    limit: float                           # seconds of training
    clock: Callable = time.perf_counter    # () -> seconds
    seconds: float = 0.0                   # of training so far
    rollouts: int = 0
    score: float = math.nan                # at the last test

    def start(self):
        """Starts the clock."""
        self.began = self.clock()

    def after_rollout(self, is_last):
        """Tests if it is time to. Returns whether the training ends here."""
        self.seconds += self.clock() - self.began
        self.rollouts += 1
        ends = is_last or self.seconds >= self.limit
        if ends or self.rollouts % TEST_EVERY == 0:
            self.score = self.test()
        self.began = self.clock()
        return ends or self.reached

    @property
    def reached(self):
        """Whether the last test reached the goal."""
        return self.score >= DEV_GOAL

    def result(self):
        """What came of it, as a text."""
        if self.reached:
            return (f"{DEV_GOAL:.0%} reached after {self.seconds:.0f} seconds and {self.rollouts} "
                    f"rollouts ({self.score:.0%} then)")
        if self.seconds >= self.limit:
            return f"not reached within {_duration(self.limit)} ({self.score:.0%} then)"
        return (f"not reached in all {self.rollouts} rollouts, {self.seconds:.0f} seconds "
                f"({self.score:.0%} then)")


def _duration(seconds):
    """A number of seconds in words."""
    if seconds == SECONDS_LIMIT:
        return "ten minutes"
    return f"{seconds:g} seconds"


def _shared_clock():
    """The first process' clock, which all processes get. So all stop at the same rollout."""
    now = time.perf_counter() if devices.is_main() else 0.0
    return float(devices.all_sum(torch.tensor(now, dtype=torch.float64)))


def _dev_score(model, run):
    """pass@1 on the dev problems that Zero is watched on, at temperature 1. All processes
    take part."""
    problems = tasks.make_problems("dev", run.eval.dev_problems, run.zero.levels,
                                   run.corpus.products)
    means, _ = evaluate(model, problems, run.eval.samples, 1.0, 1.0, run.zero.max_new_tokens,
                        run.eval.rows)
    return means["pass@1"]


# ------------------------------------------------------------------------------
# Ours


def _train_ours(base, run, limit):
    """The TimedTraining of train_rl from a base."""
    model = devices.copy_model(base)
    training = TimedTraining(lambda: _dev_score(model, run), limit, _shared_clock)
    training.start()
    task = make_task(run, run.zero, rule_rewards(run.zero))
    for record, _ in train_rl(model, task, run.zero, run.seed):
        if training.after_rollout(is_last=record["step"] == run.zero.steps):
            break
    return training


# ------------------------------------------------------------------------------
# Theirs. peers.py uses the first three functions too.


def their_model(config, device, weights=None):
    """transformers' DeepseekV3ForCausalLM with the sizes and weights of bench_model()."""
    from transformers import DeepseekV3ForCausalLM
    with tempfile.TemporaryDirectory() as path:
        ours = bench.bench_model(config, "cpu", torch.float32, weights)
        export.write_hf_folder(f"{path}/model", ours)
        return DeepseekV3ForCausalLM.from_pretrained(f"{path}/model").to(device)


def word_tokenizer(vocab_size):
    """A tokenizer of transformers for texts such as "t17 t4", in which each word names
    a token id. So TRL trains on our token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", pad_token=f"t{tasks.PAD_ID}",
        eos_token=f"t{tasks.END_ID}")


def trl_settings(s, path, device, dtype, answers, group, new, rollouts, **others):
    """A GRPOConfig for rollouts of `answers` answers of at most `new` tokens, `group` to
    a question, with the settings s of RL. bfloat16 is mixed precision."""
    from trl import GRPOConfig
    return GRPOConfig(
        output_dir=path, per_device_train_batch_size=answers // s.minibatches,
        steps_per_generation=s.minibatches, num_generations=group, beta=s.beta,
        max_completion_length=new, epsilon=s.clip_low, bf16=dtype == torch.bfloat16,
        max_steps=s.minibatches * rollouts, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu",
        shuffle_dataset=False, loss_type="grpo",
        gradient_checkpointing=False,  # ours recomputes nothing either
        **others)


def _questions_of_rollouts(run):
    """The problems of all rollouts, one after the other. They are those of train_rl."""
    s, problems = run.zero, []
    task = make_task(run, s, rule_rewards(s))
    for step in range(s.steps):
        problems += task.draw(random.Random(f"{run.seed}/rl/{step}"), s.problems, step)
    return problems


def _their_rewards(problems, rewards):
    """Our rewards as TRL calls them. Each row of TRL's data has the `number` of its
    problem."""
    def as_trl_calls_it(name, reward):
        def score(completion_ids, number, **_):
            texts = [tasks.decode(ids) for ids in completion_ids]
            return reward(texts, [problems[i] for i in number])
        score.__name__ = name
        return score
    return [as_trl_calls_it(name, reward) for name, (_, reward) in rewards.items()]


def _train_with_trl(model, run, device, at_start, after_rollout):
    """TRL's GRPOTrainer with Zero's settings. Changes the model's copy, which is given to
    after_rollout(model, is_last) after each rollout with its updates, until that says
    that the training ends."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer
    s, problems = run.zero, _questions_of_rollouts(run)
    updates = s.minibatches * s.steps

    class Watch(TrainerCallback):
        """Calls the two functions."""

        def on_train_begin(self, args, state, control, **kwargs):
            """Before the first rollout."""
            at_start()

        def on_step_end(self, args, state, control, model, **kwargs):
            """After an update."""
            is_last = state.global_step == updates
            if state.global_step % s.minibatches == 0 and after_rollout(model, is_last):
                control.should_training_stop = True

    prompts = [" ".join(f"t{i}" for i in tasks.encode_prompt(p.question)) for p in problems]
    rows = [{"prompt": prompt, "number": number} for number, prompt in enumerate(prompts)]
    rewards = rule_rewards(s)
    synced = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0,
              "ref_model_sync_steps": s.reference_every * s.minibatches} if s.beta else {}
    with tempfile.TemporaryDirectory() as path:  # TRL reads the model and the reference from here
        model.save_pretrained(path)
        settings = trl_settings(
            s, path, device, torch.float32, s.problems * s.group_size, s.group_size,
            s.max_new_tokens, s.steps, epsilon_high=s.clip_high, temperature=s.temperature,
            reward_weights=[weight for weight, _ in rewards.values()],
            scale_rewards="group" if s.normalize_std else "none", learning_rate=s.lr,
            adam_beta2=0.95, weight_decay=0.0, seed=run.seed, **synced)
        trainer = GRPOTrainer(path, _their_rewards(problems, rewards), settings,
                              train_dataset=Dataset.from_list(rows),
                              processing_class=word_tokenizer(model.config.vocab_size),
                              callbacks=[Watch()])
        # train_rl's learning rate at each update.
        trainer.lr_scheduler = LambdaLR(
            trainer.create_optimizer(),
            lambda update: learning_rate_at(update, updates, s.warmup, s.decay))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _copy_weights(theirs, ours):
    """Copies the weights of a transformers model into one of ours."""
    with tempfile.TemporaryDirectory() as path:
        theirs.save_pretrained(path)
        model, _ = export.read_hf_folder(path)
    ours.load_state_dict(model.state_dict())


def _send_weights(model):
    """Gives all processes the first one's weights."""
    for x in model.state_dict().values():
        devices.all_sum(x if devices.is_main() else x.zero_())


def with_threads(threads, work):
    """A function that calls work() with a number of threads."""
    def call():
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return work()
        finally:
            torch.set_num_threads(threads_before)
    return call


def _faster_threads(make_model, run, device, choices):
    """The number of threads with which TRL's second rollout and its updates take least
    time."""
    def second_rollout():
        ends = []

        def after_rollout(model, is_last):
            ends.append(time.perf_counter())
            return len(ends) == 2

        _train_with_trl(make_model(), run, device, lambda: None, after_rollout)
        return ends[-1] - ends[0]

    if len(choices) == 1:
        return choices[0]
    return min(choices, key=lambda threads: with_threads(threads, second_rollout)())


def _train_theirs(base, run, device, limit, choices):
    """(the TimedTraining of TRL's GRPOTrainer from a base, its number of threads).

    It trains in the first process. The other processes only help to test on dev.
    Their TimedTraining stays empty.
    """
    config = dataclasses.replace(base.config, n_mtp_layers=0)
    weights = base.state_dict()
    tested = bench.bench_model(config, device, torch.float32, weights)
    training, threads = TimedTraining(None, limit), choices[0]
    if devices.is_main():
        trained = []  # TRL's model, once it trains

        def test():
            devices.any_process(True)  # tells the others that there is something to test
            _copy_weights(trained[0], tested)
            _send_weights(tested)
            return _dev_score(tested, run)

        def after_rollout(model, is_last):
            trained[:] = [model]
            return training.after_rollout(is_last)

        def make_model():
            return their_model(config, device, weights)

        threads = _faster_threads(make_model, run, device, choices)
        training.test = test
        with_threads(threads, lambda: _train_with_trl(make_model(), run, device, training.start,
                                                      after_rollout))()
        devices.any_process(False)  # there is nothing more to test
    else:
        while devices.any_process():
            _send_weights(tested)
            _dev_score(tested, run)
    return training, threads


# ------------------------------------------------------------------------------
# The race


def rl_to_85(base, run, device, limit=SECONDS_LIMIT, thread_choices=None):
    """{key: number or text} of RL from a base, ours and then TRL's.

    limit: seconds of training of each side. thread_choices: the numbers of threads that
    are tried for TRL; None: one, and as many as all our processes have. Without both
    times there is no ratio; if ours alone gets there, .at_least says how much longer TRL
    has trained.
    """
    processes = devices.rank_and_size()[1]
    if thread_choices is None:
        thread_choices = sorted({1, torch.get_num_threads() * processes})
    ours = _train_ours(base, run, limit)
    theirs, threads = _train_theirs(base, run, device, limit, thread_choices)
    numbers = {"rl_to_85.ours.setting":
               f"float32, processes x threads {processes} x {torch.get_num_threads()}",
               "rl_to_85.trl.setting": f"float32, processes x threads 1 x {threads}"}
    for side, training in (("ours", ours), ("trl", theirs)):
        numbers |= {f"rl_to_85.{side}.result": training.result(),
                    f"rl_to_85.{side}.dev": training.score,
                    f"rl_to_85.{side}.rollouts": training.rollouts}
        if training.reached:
            numbers[f"rl_to_85.{side}"] = training.seconds
    if ours.reached and theirs.reached:
        numbers["rl_to_85.vs_trl"] = theirs.seconds / ours.seconds
    elif ours.reached:
        numbers["rl_to_85.vs_trl.at_least"] = theirs.seconds / ours.seconds
    return numbers


def check_race(run):
    """UserError if TRL cannot have these settings of RL."""
    s = run.zero
    if s.problems * s.group_size % s.minibatches:
        raise UserError("--against: zero.minibatches must divide "
                        f"{s.problems * s.group_size}, the number of answers in a rollout")
    if s.objective != "grpo" or s.oversample > 1 or s.overlong:
        raise UserError("--against: RL to 85% is GRPO's on both sides, so zero.objective must be "
                        "grpo, without zero.oversample and zero.overlong")


# ------------------------------------------------------------------------------
# The study

SEEDS, SETTINGS, NEEDS, STAGES = (0,), (), ("base.pt", "zero.pt"), ()


def measure(folder):
    """The numbers of the race from the base of a run, in a process of its own."""
    zero = str(Path(folder.run.start).parent / "zero.pt")
    numbers = measure_once(folder, "rl", lambda: bench.run_bench(
        folder, "--against", "--part", "rl", "--from", zero))
    return {key: x for key, x in numbers.items() if key != "machine"}


def page(rows, notes):
    """The lines of the report: what came of each side, and a table of all numbers."""
    lines = [f"- {key}: {text}." for key, text_of_seed in notes.items()
             for text in text_of_seed.values()]
    return [*lines, "", *table(["key", "value"],
                               [[key, f"{row['mean']:.4g}"] for key, row in rows.items()])]
