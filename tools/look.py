"""look: a page that shows GRPO on your own run.

    python r1mini.py look runs/nano     writes runs/nano/look.html

The page is one file, made from tools/look.html, and fetches nothing. This module makes the JSON
object that it shows (`vocabulary` has the text of each token id):

    groups    {stage: [group]} from look.jsonl: 16 answers, token by token, before and after an
              update, with their rewards and advantages
    curves    {stage: {curve: [[step, value]]}} from log.jsonl
    prompts   the same questions, answered by each stage, from log.jsonl
    loads     {stage: {"steps", "layers"}}: each expert's load over the mean, from log.jsonl
    inside    two answers of the last model: likeliest next tokens, experts, attention
    rules     what the rewards in the page need to know of tasks.py

A page has at most LIMIT bytes. While it has more, every second group is left out.
"""
import dataclasses
import json
import random
from pathlib import Path

import torch

import r1mini
import tasks
from engine import checkpoint
from engine.errors import UserError
from engine.evaluate import prompts_of
from engine.folder import read_log
from engine.look import answer_ids, look_problem, read_look
from engine.sampling import generate
from grpo import RL, advantages, length_reward, overlong_penalty
from moe import MLA, Router, causal_mask, rotate

LIMIT = 2_000_000  # bytes of a page
TEMPLATE = Path(__file__).with_name("look.html")
NAMES = {"base": "Base", "zero": "R1-Zero", "dev1": "Dev1", "dev2": "Dev2", "dev3": "Dev3",
         "r1": "R1", "student": "Student's base", "distill": "Distilled",
         "student_rl": "Student + RL", "distill_rl": "Distilled + RL",
         "distill_logits": "Distilled (logits)", "student_rl_no_format": "Student + RL, no format"}
FINAL = ("r1", "dev3", "dev2", "dev1", "zero", "base")  # looked into: the first that there is
# Curves: (key of a step's record, key of a record on dev). {} stands for the number of samples.
CURVES = {"accuracy": ("accuracy", "pass@1"), "majority": (None, "cons@{}"),
          "length": ("length", "length"), "checks": ("reflection", "reflection"),
          "mixing": ("mixing", "mixing"), "entropy": ("entropy", None),
          "dead": ("dead_groups", None)}
LOAD_POINTS = 30        # a stage has 30 to 60 columns in the picture of the experts' load
LIKELIEST = 5           # next tokens that are shown
MOST_WEIGHTS = 400_000  # attention weights of one answer; of more, the mean over heads is shown
# An attention weight, rounded to 1/63, is one letter.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
# What a token is, for the table of what each expert reads.
KINDS = ("question", "operand", "sign", "=", "result", "check", "ok", "tag", "other")


def main(options):
    """Writes the page of a run. Returns the exit code."""
    folder = Path(options.run)
    log = read_log(folder, repaired=True)
    if not log:
        raise UserError(f"{folder}: nothing is logged yet; wait for the first steps")
    page = _make_page(folder, log)
    path = folder / "look.html"
    path.write_text(page, "utf-8")
    print(f"{path}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser")
    return 0


def _make_page(folder, log):
    """The HTML of a run's page."""
    run, template = _run_of(log[0]), TEMPLATE.read_text("utf-8")
    kinds = {r["kind"] for r in log}
    stages = [stage for stage in r1mini.STAGES if stage in kinds and _settings_of(run, stage)]
    data = {
        "run": {"name": folder.resolve().name, "preset": run.preset, "seed": run.seed},
        "names": NAMES,
        "vocabulary": [tasks.ENCODING.decode_single_token_bytes(i).decode("utf-8", "replace")
                       for i in range(tasks.VOCAB_SIZE)],
        "end": tasks.END_ID,
        "question": _problem_for_page(look_problem(run)),
        "groups": _groups(run, read_look(folder)),
        "settings": {stage: _settings_for_page(_settings_of(run, stage)) for stage in stages},
        "curves": {stage: _curves(log, stage) for stage in stages},
        "prompts": _prompts(log),
        "loads": _loads(log, run),
        "inside": _inside(folder, run),
        "rules": _rules(run),
    }
    while True:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        # Escape "<": no text of the data can then end the script element that holds it.
        page = template.replace("@DATA@", text.replace("<", "\\u003c"))
        if len(page.encode()) <= LIMIT or not any(map(len, data["groups"].values())):
            return page
        data["groups"] = {stage: groups[1::2] for stage, groups in data["groups"].items()}


def _run_of(config):
    """The settings of a run, from the first record of its log. Those that this version does not
    know are left out."""
    def change(default, values):
        known = {field.name for field in dataclasses.fields(default)} & set(values)
        fields = {name: values[name] for name in known}
        for name, value in fields.items():
            old = getattr(default, name)
            if dataclasses.is_dataclass(old):
                fields[name] = change(old, value)
            elif isinstance(value, list):
                fields[name] = tuple(value)
        return dataclasses.replace(default, **fields)
    return change(r1mini.Run(), config)


def _settings_of(run, stage):
    """The settings of a stage of RL; None for another stage."""
    s = getattr(run, stage.removesuffix("_no_format"), None)
    if not isinstance(s, RL):
        return None
    return dataclasses.replace(s, format_weight=0.0) if stage.endswith("_no_format") else s


# -------------------------------------------------------------------------------------------
# The groups


def _settings_for_page(s):
    """The weights of the rules of a stage, and whether it divides by the standard deviation."""
    return {"weights": {name: weight for name, (weight, _) in r1mini.rule_rewards(s).items()},
            "normalize": s.normalize_std}


def _groups(run, recorded):
    """{stage: groups} for the page, of the groups in look.jsonl."""
    groups = {}
    for group in recorded:
        s = _settings_of(run, group["stage"])
        if s:  # a study may have stages that the page does not know
            groups.setdefault(group["stage"], []).append(_group_for_page(run, group, s))
    return groups


def _group_for_page(run, group, s):
    """One group for the page: its answers with the rewards and advantages that training would give
    them."""
    problem = look_problem(run)
    if group["question"] != problem.question:
        raise UserError("look.jsonl was written by another version of r1mini: delete it, and the "
                        "page is made without the groups")
    ids = [answer_ids(answer) for answer in group["answers"]]
    parts = reward_parts([tasks.decode(x) for x in ids], problem, s, [len(x) for x in ids],
                         group["step"] - 1)
    rewards = sum(parts.values())                                             # (G,)
    answers = []
    for i, advantage in enumerate(advantages(rewards.unsqueeze(0), s.normalize_std)[0].tolist()):
        answers.append({
            "ids": ids[i], "before": group["before"][i], "after": group["after"][i],
            "parts": {name: round(float(part[i]), 4) for name, part in parts.items()},
            "reward": round(float(rewards[i]), 4), "advantage": round(advantage, 4)})
    return {"step": group["step"], "answers": answers, "mean": round(float(rewards.mean()), 4),
            "std": round(float(rewards.std()), 4)}


def reward_parts(texts, problem, s, lengths, step):
    """{reward: (G,), with its weight} of the answers of one group to a problem, as in
    grpo.make_rollout. lengths: of the answers, in tokens. step: rollouts before this one."""
    parts = {name: weight * torch.tensor(reward(texts, [problem] * len(texts)))
             for name, (weight, reward) in r1mini.rule_rewards(s).items()}
    lengths = torch.tensor(lengths)
    if s.overlong:
        parts["overlong"] = overlong_penalty(lengths, s.max_new_tokens, s.overlong)
    if s.length_weight and step >= s.length_from * s.steps:
        right = torch.tensor([tasks.accuracy(text, problem) == 1.0 for text in texts])
        parts["length"] = s.length_weight * length_reward(lengths[None], right[None])[0]
    return parts


# -------------------------------------------------------------------------------------------
# What the log has


def _curves(log, stage):
    """{curve: {"train" or "dev": [[step, value]]}} of a stage of RL."""
    curves = {name: {"train": [], "dev": []} for name in CURVES}
    for r in log:
        is_dev = r["kind"] == "dev" and r["stage"] == stage
        if not is_dev and r["kind"] != stage:
            continue
        for name, keys in CURVES.items():
            key = (keys[1] or "").format(r.get("samples")) if is_dev else keys[0]
            if r.get(key) is not None:
                curves[name]["dev" if is_dev else "train"].append([r["step"], round(r[key], 4)])
    return curves


def _prompts(log):
    """[{"question", "answer", "kind", "answers": {stage: text}}] of the samples after each stage's
    last step."""
    prompts = {}
    for r in log:
        if r["kind"] == "samples":
            for question, answer, text in r["answers"]:
                prompt = prompts.setdefault(question, {"question": question, "answer": answer,
                                                       "answers": {}})
                prompt["answers"][r["stage"]] = text  # a later step replaces an earlier one
    for prompt in prompts.values():
        is_sum = prompt["answer"].lstrip("-").isdigit()
        problem = tasks.Problem(prompt["question"], prompt["answer"], "")
        prompt["right"] = {stage: tasks.accuracy(text, problem) == 1.0 if is_sum else None
                           for stage, text in prompt["answers"].items()}
    return list(prompts.values())


def _loads(log, run):
    """{stage: {"steps", "layers"}}. layers[l][e] is the load of expert e of layer l at these steps,
    divided by the mean load of the layer. MTP's experts are left out."""
    n_layers, loads = run.model.n_layers - run.model.n_dense_layers, {}
    for stage in FINAL[::-1]:
        records = [r for r in log if r["kind"] == stage and r.get("loads")]
        records = records[::max(1, len(records) // LOAD_POINTS)]
        if records and n_layers:
            loads[stage] = {"steps": [r["step"] for r in records], "layers": [
                [[round(x, 2) for x in column]
                 for column in zip(*(r["loads"][layer] for r in records))]
                for layer in range(n_layers)]}
    return loads


# -------------------------------------------------------------------------------------------
# Inside the final checkpoint


class Probe:
    """While it is open, keeps what the routers and the attention of a model compute.

    experts: for each mixture (gates (N, K), numbers of the experts (N, K)) of the last pass.
    attention: for each layer the weights (B, H, T, T) of the last pass.
    """

    def __init__(self, model):
        self.experts, self.attention = {}, {}
        self.hooks = []
        for number, layer in enumerate(model.layers):
            self.hooks.append(layer.attn.register_forward_hook(self.keep_attention(number)))
            for module in layer.ffn.modules():
                if isinstance(module, Router):
                    self.hooks.append(module.register_forward_hook(self.keep_experts(number)))

    def keep_attention(self, number):
        """A hook for a layer's MLA."""
        def hook(mla, inputs, _):
            self.attention[number] = _attention_weights(mla, *inputs[:2])
        return hook

    def keep_experts(self, number):
        """A hook for a layer's Router."""
        def hook(router, inputs, outputs):
            self.experts[number] = outputs[1:]
        return hook

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def _attention_weights(mla: MLA, x, rotation):
    """The weights (B, H, T, T) of causal attention, which MLA's fused kernel does not return
    (DeepSeek-V2 eq 37-47)."""
    q = mla.wq_b(mla.q_norm(mla.wq_a(x).float())) if mla.compresses_queries else mla.wq(x)
    q = q.unflatten(-1, (mla.heads, -1))                                      # (B, T, H, D + R)
    q_nope, q_rope = q.split((mla.nope_dim, mla.rope_dim), -1)
    latent, k_rope = mla.wkv_a(x).split((mla.rank, mla.rope_dim), -1)
    kv = mla.wkv_b(mla.kv_norm(latent.float())).unflatten(-1, (mla.heads, -1))
    k_nope = kv[..., :mla.nope_dim]                                           # (B, T, H, D)
    k_rope = rotate(k_rope.unsqueeze(2), rotation)[:, :, 0]                   # (B, T, R), shared
    score = torch.einsum("bthd,bshd->bhts", q_nope, k_nope)
    score = score + torch.einsum("bthr,bsr->bhts", rotate(q_rope, rotation), k_rope)
    score = score * mla.scale
    return (score + causal_mask(score)).softmax(-1)


@torch.no_grad()
def _inside(folder, run):
    """What the last model computes while it writes two answers, and which tokens each expert reads.
    None if no stage is finished."""
    stage = next((name for name in FINAL if (folder / f"{name}.pt").exists()), None)
    if stage is None:
        return None
    model, _ = checkpoint.load(folder / f"{stage}.pt")
    checkpoint.check_vocabulary(folder / f"{stage}.pt", model.config)
    model.eval()
    problems = [look_problem(run)]
    if stage in ("r1", "dev3"):  # they have learnt when to refuse
        problems.append(tasks.make_prompt(random.Random("look"), "test", ("unsafe",), "en"))
    else:
        level = max(run.zero.levels)
        problems.append(tasks.make_problem(random.Random("look"), level, "test", "zh"))
    with Probe(model) as probe:
        return {"stage": stage, "experts": model.config.n_routed_experts,
                "chosen": model.config.n_activated_experts,
                "layers": model.config.n_layers, "dense": model.config.n_dense_layers,
                "shared": model.config.n_shared_experts, "letters": LETTERS,
                "answers": [_trace(model, probe, problem, run) for problem in problems],
                "reads": _what_experts_read(model, probe, run)}


def _trace(model, probe, problem, run):
    """What the model computes at each token of a question and its answer. At each token of the
    answer it writes the likeliest."""
    prompt = tasks.encode_prompt(problem.question)
    samples = generate(model, [prompt], run.zero.max_new_tokens, tasks.END_ID, tasks.PAD_ID, 0.0)
    ids = prompt + samples.answers()[0]
    likeliest = model(torch.tensor([ids])).logits[0].softmax(-1).topk(LIKELIEST)
    following = [[[token, round(p, 3)] for p, token in zip(*pair)] for pair in
                 zip(likeliest.values.tolist(), likeliest.indices.tolist())]
    experts = {number: [[[e, round(g, 3)] for g, e in zip(*pair)]
                        for pair in zip(gates.tolist(), numbers.tolist())]
               for number, (gates, numbers) in probe.experts.items()}
    weights = torch.stack([probe.attention[i][0] for i in sorted(probe.attention)])  # (L, H, T, T)
    if weights.numel() // 2 > MOST_WEIGHTS:
        weights = weights.mean(1, keepdim=True)
    attention = [[_letters(head) for head in layer] for layer in weights]
    return {"ids": ids, "prompt": len(prompt), "next": following, "experts": experts,
            "attention": attention, "question": problem.question}


def _letters(weights):
    """Attention weights (T, T) of one head as a text: row after row up to the diagonal, one letter
    for each weight."""
    indices = (63 * weights).round().int().tolist()
    return "".join(LETTERS[x] for t, row in enumerate(indices) for x in row[:t + 1])


def _what_experts_read(model, probe, run):
    """{layer: {kind: [for each expert, the share of the tokens of this kind that it reads]}}, over
    answers to dev problems at temperature 1. "tokens" has the number of tokens of each kind."""
    problems = tasks.make_problems("dev", run.eval.dev_problems, run.zero.levels,
                                   run.corpus.products)
    prompts = prompts_of(problems)
    samples = generate(model, prompts, run.zero.max_new_tokens, tasks.END_ID, tasks.PAD_ID)
    kinds = [kind for prompt, ids in zip(prompts, samples.answers())
             for kind in _kinds_of_tokens(prompt, ids)]
    real = samples.answer.clone()
    for row, prompt in zip(real, prompts):
        row[:len(prompt)] = True
    model(samples.tokens, real)
    used = [kind for kind in KINDS if kind in kinds]
    rows = torch.tensor([used.index(kind) for kind in kinds])                 # (M,)
    tables = {"tokens": {kind: kinds.count(kind) for kind in used}}
    for number, (_, numbers) in probe.experts.items():
        uses = torch.nn.functional.one_hot(numbers, model.config.n_routed_experts).sum(1)
        uses = uses[real.flatten()].float()                                   # (M, E)
        tables[number] = {kind: [round(x, 3) for x in uses[rows == i].mean(0).tolist()]
                          for i, kind in enumerate(used)}
    return tables


def _kinds_of_tokens(prompt, ids):
    """The kind, one of KINDS, of each token of a prompt and an answer."""
    words = {name: {words[name].strip() for words in tasks.WORDS.values()}
             for name in ("check", "ok", "wait", "then")}
    kinds, after_equals = ["question"] * len(prompt), False
    for token in ids:
        text = tasks.ENCODING.decode([token]).strip()
        if text.isdigit():
            kinds.append("result" if after_equals else "operand")
            continue
        after_equals = text == "=" or (after_equals and text == "-")
        if text in ("=", "check"):
            kinds.append(text)
        elif text in tasks.SPECIAL:
            kinds.append("tag")
        elif text in tuple("+-*"):
            kinds.append("sign")
        elif text in words["check"]:
            kinds.append("check")
        elif text in words["ok"] | words["wait"] | words["then"]:
            kinds.append("ok")
        else:
            kinds.append("other")
    return kinds


# -------------------------------------------------------------------------------------------
# The rewards in the page


def _ranges(belongs):
    """The characters for which belongs(character) holds, for a class of a JavaScript regular
    expression with the flag u. Python and a browser may know different versions of Unicode."""
    ranges, begin = [], None
    for code in range(0x110001):
        inside = code < 0x110000 and belongs(chr(code))
        if inside and begin is None:
            begin = code
        elif not inside and begin is not None:
            ranges.append(f"\\u{{{begin:x}}}-\\u{{{code - 1:x}}}")
            begin = None
    return "".join(ranges)


def _problem_for_page(problem):
    """What the rewards in the page know of a problem."""
    return {"question": problem.question, "answer": problem.answer, "language": problem.language}


def _rules(run):
    """What the rules of the page need of tasks.py, and problems to try them on."""
    problems = [look_problem(run)]
    for language in tasks.LANGUAGES:
        rng = random.Random("look/try")
        problems.append(tasks.make_problem(rng, 3, "train", language, run.corpus.products))
    return {"numeric": _ranges(str.isnumeric), "letters": _ranges(str.isalpha),
            "words": {name: [words[name].strip() for words in tasks.WORDS.values()]
                      for name in ("check", "wait", "summary")},
            "problems": [_problem_for_page(problem) for problem in problems]}
