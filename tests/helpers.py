"""What several test files share: tiny models, problems, and one finished micro run."""
import atexit
import copy
import dataclasses
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, settings

import moe
import r1mini
import tasks
from engine import checkpoint
from tools import cli, study

ROOT = Path(__file__).parent.parent
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Property tests: the same 300 examples at every run, and no limit on an example's time.
lightly = settings(deadline=None, derandomize=True, max_examples=300,
                   suppress_health_check=[HealthCheck.too_slow])


# -------------------------------------------------------------------------------------------------
# Models

# Every part of DeepSeek-V3 is in it: a query latent, limited groups, MTP, a balance loss.
TINY = moe.Config(vocab_size=24, dim=24, inter_dim=40, moe_inter_dim=16, n_layers=3, n_heads=2,
                  n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, route_scale=2.5,
                  q_lora_rank=12, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
                  v_head_dim=16, balance_alpha=0.1, init_std=0.1, max_seq_len=64)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [2, 3, 8], [4, 6, 2, 6, 4, 3]]

# The micro preset with the tokenizer's vocabulary: a model that reads and writes text.
MICRO = dataclasses.replace(r1mini.PRESETS["micro"], vocab_size=tasks.VOCAB_SIZE)
# A reward model of that size, whose random scores differ visibly.
JUDGE = dataclasses.replace(MICRO, n_outputs=1, n_mtp_layers=0, init_std=0.2)


def make(seed=0, **changes):
    """A TINY model whose weights, norms' gains and routing biases are all random."""
    torch.manual_seed(seed)
    model = moe.Transformer(dataclasses.replace(TINY, **changes))
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.uniform_(-0.2, 0.2) if name.endswith("bias") else tensor.uniform_(0.5, 1.5)
    return model.eval()


def random_micro():
    """A model of the micro preset with random weights, always the same."""
    torch.manual_seed(0)
    return moe.Transformer(MICRO).eval()


def make_batch(seed=1, lengths=(9, 4, 7, 9, 2, 5)):
    """Random right-padded rows: tokens, real, and a weight of 1 on all but each row's first two."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TINY.vocab_size, (len(lengths), max(lengths)), generator=generator)
    column = torch.arange(max(lengths))
    real = column < torch.tensor(lengths).unsqueeze(-1)
    return tokens * real, real, (real & (column > 1)).float()


def make_judge(seed):
    """A random reward model."""
    torch.manual_seed(seed)
    return moe.Transformer(JUDGE).eval()


def equal_states(a, b):
    """Whether two state dicts hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_weights(path, other_path):
    """Whether two checkpoints hold the same bits."""
    return equal_states(*(checkpoint.load(p)[0].state_dict() for p in (path, other_path)))


# -------------------------------------------------------------------------------------------------
# Problems and prompts


def problems(count, **kind):
    """`count` problems, of every level from 1 to 8."""
    rng = random.Random(0)
    return [tasks.make_problem(rng, 1 + i % 8, **kind) for i in range(count)]


@cache
def general_questions(part, kind):
    """All questions of one kind of general prompts in a part of the split."""
    return {prompt.question for language in tasks.LANGUAGES
            for prompt in tasks.all_prompts(part, kind, language)}


def json_lines(*records):
    """A text with one JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


# -------------------------------------------------------------------------------------------------
# Runs

STAGES = [stage for stage in r1mini.STAGES if stage not in r1mini.ABLATIONS]
# The options of a run of all stages that takes seconds.
FEW = ["--preset", "micro", "--set", "dev1.steps=6", "dev3.steps=6", "judge.steps=6",
       "student_base.steps=6", "distill.steps=6", "eval.dev_problems=2"]


def nano_run(**changes):
    """The nano preset's Run with some settings changed: nano_run(**{"data.tries": 3})."""
    return cli.resolve_settings("nano", [f"{key}={value}" for key, value in changes.items()])


@cache
def micro_run():
    """The folder of one finished run of all stages with the options FEW, made once a session.

    All tests share it: copy what you want to change, and never write into it.
    """
    top = Path(tempfile.mkdtemp(prefix="r1mini-tests-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    folder = top / "whole"
    assert cli.main([*FEW, "--out", str(folder)]) == 0
    return folder


def use_random_micro(module, monkeypatch, folder):
    """A study then takes copies of a random micro model for the kept ones, and works in a folder
    of the test. Returns the random model."""
    model = random_micro()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "load_kept", lambda *_: copy.deepcopy(model))
    return model


# The settings with which an arm of a study takes seconds.
FEW_OF_STUDY = ["base.steps=5", "base.warmup=1", "base.documents=4", "dev1.steps=2",
                "dev1.documents=4", "dev3.steps=2", "dev3.documents=4", "judge.steps=1",
                "judge.documents=4", "data.cold_start=2", "data.rejection=2", "data.prompts=2",
                "eval.problems=4", "eval.dev_problems=4", "eval.samples=2", "eval.fewer_samples=1",
                "eval.longer=1", "zero.dev_every=1"]
FEW_OF_STUDY += [f"{stage}.{setting}" for stage in ("zero", "dev2", "r1") for setting in (
    "problems=2", "group_size=2", "minibatches=1", "steps=2", "max_new_tokens=9")]


def run_arm(module, arm, *settings):
    """Runs an arm of a study with the micro preset, in the working folder. Returns its numbers, as
    they are in runs.jsonl. The study's page is printed too."""
    one_arm = SimpleNamespace(
        ARMS={arm: module.ARMS[arm]}, STAGES=module.STAGES, page=module.page,
        SETTINGS=(*module.SETTINGS, *settings), measure_arm=module.measure_arm)
    options = SimpleNamespace(name="demo", preset="micro", rest=["--seeds", "0"])
    study.main(options, one_arm)
    return study._measure_arms(options, one_arm, 0, [])[0]["metrics"]
