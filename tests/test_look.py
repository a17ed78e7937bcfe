"""Tests of engine/look.py, tools/look.py with its page, and tools/show.py.

The rules in the page run in node, the page itself in a Chromium that selenium drives. Where these
are not installed, their tests say so. On Debian: apt install nodejs chromium chromium-driver.
"""
import dataclasses
import json
import random
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

import grpo
import r1mini
import tasks
from engine import checkpoint, look
from engine.folder import read_log
from tests.helpers import make, micro_run
from tests.refusing import refused
from tests.test_folder import SHORT
from tools import cli, show
from tools import look as page_of

# This model's answers are noise. Their languages differ, so a reward for that makes it learn.
STEPS = ["--save-every", "3", "--set", "zero.steps=5", "zero.language_weight=1"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a short run of base and zero."""
    path = tmp_path_factory.mktemp("look") / "run"
    assert cli.main([*SHORT, *STEPS, "--out", str(path)]) == 0
    return path


# -------------------------------------------------------------------------------------------------
# The recording


def test_look_leaves_training_as_it_is(recorded, tmp_path, monkeypatch):
    """A run that records has the log and the weights of one that does not, to the bit."""
    monkeypatch.setattr(look.Look, "__call__", lambda self, model, step: None)
    assert cli.main([*SHORT, *STEPS, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "look.jsonl").exists()
    for name in ("log.jsonl", "zero.pt"):
        assert (recorded / name).read_bytes() == (tmp_path / name).read_bytes()


def test_look_records_every_second_step(recorded):
    """Each second step has a group of the stage's size, with a number a token before and after."""
    groups = look.read_look(recorded)
    assert [(g["stage"], g["step"]) for g in groups] == [("zero", 1), ("zero", 3), ("zero", 5)]
    for group in groups:
        lengths = [len(look.answer_ids(answer)) for answer in group["answers"]]
        assert len(lengths) == 4
        assert lengths == [len(x) for x in group["before"]] == [len(x) for x in group["after"]]
    problem = look.look_problem(r1mini.Run())
    assert groups[0]["question"] == problem.question
    assert tasks.part_of_problem(problem.expression) == "train"


def test_look_after_is_what_the_updated_model_says(recorded):
    """The last group's `after` is -log p of each token by the finished model, read one prefix at a
    time; its `before` is not."""
    model = checkpoint.load(recorded / "zero.pt")[0].eval().requires_grad_(False)
    group = look.read_look(recorded)[-1]
    prompt = tasks.encode_prompt(group["question"])
    for answer, before, after in zip(group["answers"], group["before"], group["after"]):
        ids, expected = look.answer_ids(answer), []
        for i, token in enumerate(ids):
            logits = model(torch.tensor([prompt + ids[:i]])).logits[0, -1]
            expected.append(-100 * float(logits.log_softmax(-1)[token]))
        assert after == pytest.approx(expected, abs=0.6)
        assert before != after


def test_look_answers_keep_their_tokens():
    """An answer is kept as a text where that gives the same tokens back; otherwise as ids."""
    text = "<think>3+4=7 check 7-4=3</think><answer>7</answer>"
    assert look.answer_ids(text) == tasks.encode_response(text)
    assert look.answer_ids([5, 6]) == [5, 6]


def test_look_draws_with_the_same_numbers_at_each_step(recorded):
    """A model that has not changed writes the same answers after each step; another seed of the run
    gives others."""
    model = checkpoint.load(recorded / "zero.pt")[0]
    s, lines = grpo.RL(max_new_tokens=16), []
    for seed in (0, 1):
        folder = SimpleNamespace(run=r1mini.Run(seed=seed), path=recorded,
                                 log=lambda record, _: lines.append(record))
        recorder = look.Look(folder, "zero", s)
        recorder(model, 0)
        recorder(model, 2)
    assert [line["step"] for line in lines] == [0, 2, 0, 2]
    assert lines[0]["answers"] == lines[1]["answers"] != lines[2]["answers"]
    assert len(lines[0]["answers"]) == s.group_size


@pytest.mark.parametrize("killed", [1, 4])
def test_look_goes_on_to_the_same_file(recorded, tmp_path, monkeypatch, killed):
    """A run that was killed after a step, with the last line torn, goes on to the same bytes."""
    call = look.Look.__call__

    def kill(self, model, step):
        call(self, model, step)
        if step == killed:
            raise RuntimeError("killed")
    monkeypatch.setattr(look.Look, "__call__", kill)
    with pytest.raises(RuntimeError, match="killed"):
        cli.main([*SHORT, *STEPS, "--out", str(tmp_path)])
    with open(tmp_path / "look.jsonl", "a") as file:
        file.write('{"stage": "zero", "st')
    monkeypatch.setattr(look.Look, "__call__", call)
    assert cli.main([*SHORT, *STEPS, "--out", str(tmp_path)]) == 0
    for name in ("look.jsonl", "log.jsonl"):
        assert (tmp_path / name).read_bytes() == (recorded / name).read_bytes()


def test_look_file_may_be_damaged_or_deleted(recorded, tmp_path):
    """Whatever is in look.jsonl, it is read without an error: lines that cannot be read are left
    out."""
    assert look.read_look(tmp_path) == []
    lines = (recorded / "look.jsonl").read_text().splitlines()
    no_numbers = '{"stage": "zero", "step": 1}'
    (tmp_path / "look.jsonl").write_text("\n".join([lines[0], "[1]", "{", no_numbers, *lines[1:3]]))
    assert [g["step"] for g in look.read_look(tmp_path)] == [1]


def test_look_fresh_deletes_recording_and_page(recorded, tmp_path):
    """--fresh knows both files."""
    shutil.copytree(recorded, tmp_path / "run")
    (tmp_path / "run/look.html").write_text("old")
    assert cli.main([*SHORT, *STEPS, "--out", str(tmp_path / "run"), "--fresh"]) == 0
    assert not (tmp_path / "run/look.html").exists()
    assert (tmp_path / "run/look.jsonl").read_bytes() == (recorded / "look.jsonl").read_bytes()


# -------------------------------------------------------------------------------------------------
# What the page shows


def data_of(page):
    """The data in a page."""
    return json.loads(re.search('id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("changes, step", [
    ({}, 0), ({"overlong": 20}, 0), ({"length_weight": 1.0}, 0), ({"language_weight": 0.5}, 0),
    ({"length_weight": 1.0, "length_from": 0.5}, 1),
    ({"length_weight": 1.0, "length_from": 0.5}, 2),
    ({"normalize_std": False}, 0)])
def test_look_rewards_are_those_of_training(changes, step, monkeypatch):
    """Rewards and advantages of a group on the page are those that make_rollout gives to the same
    answers at this step."""
    s = grpo.RL(problems=1, max_new_tokens=30, format_weight=0.3, steps=4)
    s = dataclasses.replace(s, **changes)
    run = dataclasses.replace(r1mini.Run(), zero=s)
    problem = look.look_problem(run)
    right = tasks.response("check", problem.answer, summary="检查检查")
    texts = [right, right + " ", "", tasks.response("", 1), *["7 check"] * 12]
    task = dataclasses.replace(r1mini.make_task(run, s, r1mini.rule_rewards(s)),
                               draw=lambda *_: [problem], decode=lambda ids: rest.pop(0))
    rest = list(texts)
    model = page_of.checkpoint.load(micro_run() / "base.pt")[0]
    rollout = grpo.make_rollout(model, task, s, random.Random(0), step)
    answers = rollout.samples.answers()
    monkeypatch.setattr(page_of.tasks, "decode", dict(zip(map(tuple, answers), texts)).get)
    # One text for each answer: the answers of random weights differ.
    assert len(set(map(tuple, answers))) == len(answers)
    ids = list(map(tuple, answers))
    group = {"stage": "zero", "step": step + 1, "question": problem.question, "answers": ids,
             "before": ids, "after": ids}
    shown = page_of._groups(run, [group])["zero"][0]
    rewards = [answer["reward"] for answer in shown["answers"]]
    assert rewards == pytest.approx(rollout.rewards[0].tolist(), abs=1e-4)
    advantages = [answer["advantage"] for answer in shown["answers"]]
    assert advantages == pytest.approx(rollout.advantages[0].tolist(), abs=1e-4)
    assert shown["mean"] == pytest.approx(float(rollout.rewards.mean()), abs=1e-4)
    assert shown["std"] == pytest.approx(float(rollout.rewards.std()), abs=1e-4)
    assert set(shown["answers"][0]["parts"]) == set(rollout.reward_parts)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 0}])
def test_look_attention_weights_give_attention_s_output(changes):
    """The weights, times the values, are what MLA computes."""
    model = make(**changes)
    mla, x = model.layers[0].attn, torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    rotation = model.rotations[:7]
    weights = page_of._attention_weights(mla, x, rotation)
    latent = mla.kv_norm(mla.wkv_a(x)[..., :mla.rank])
    values = mla.wkv_b(latent).unflatten(-1, (mla.heads, -1))[..., mla.nope_dim:]
    out = mla.wo(torch.einsum("bhts,bshv->bthv", weights, values).flatten(2))
    assert torch.allclose(out, mla(x, rotation), atol=1e-5)


def test_look_inside_is_what_the_model_computes():
    """Likeliest tokens are those of a forward pass; each token has K experts, whose gates add up;
    the letters of the attention spell weights that add up to 1."""
    run = page_of._run_of(read_log(micro_run())[0])
    inside = page_of._inside(micro_run(), run)
    model = checkpoint.load(micro_run() / "r1.pt")[0].eval()
    assert inside["stage"] == "r1" and len(inside["answers"]) == 2
    for answer in inside["answers"]:
        ids = answer["ids"]
        assert ids[:answer["prompt"]] == tasks.encode_prompt(answer["question"])
        best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert [row[0][0] for row in answer["next"]] == best
        assert ids[answer["prompt"]:] == best[answer["prompt"] - 1:-1]  # it wrote the likeliest
        for layer in answer["experts"].values():
            assert {len(row) for row in layer} == {model.config.n_activated_experts}
            assert all(sum(g for _, g in row) == pytest.approx(1, abs=0.01) for row in layer)
        n = len(ids)
        for head in (head for layer in answer["attention"] for head in layer):
            numbers = [page_of.LETTERS.index(x) / 63 for x in head]
            rows = [numbers[t * (t + 1) // 2:(t + 1) * (t + 2) // 2] for t in range(n)]
            assert all(sum(row) == pytest.approx(1, abs=0.01 * len(row) + 0.01) for row in rows)


def test_look_experts_reads_are_counted_token_by_token():
    """The shares of the experts are those of a count over each answer alone, without padding."""
    run = page_of._run_of(read_log(micro_run())[0])
    model = checkpoint.load(micro_run() / "r1.pt")[0].eval().requires_grad_(False)
    problems = tasks.make_problems("dev", run.eval.dev_problems, run.zero.levels,
                                   run.corpus.products)
    prompts = [tasks.encode_prompt(problem.question) for problem in problems]
    answers = page_of.generate(model, prompts, run.zero.max_new_tokens, tasks.END_ID,
                               tasks.PAD_ID).answers()
    with page_of.Probe(model) as probe:
        tables = page_of._what_experts_read(model, probe, run)
        counts = {layer: {} for layer in probe.experts}
        for prompt, ids in zip(prompts, answers):
            model(torch.tensor([prompt + ids]))
            kinds = page_of._kinds_of_tokens(prompt, ids)
            for layer, (_, chosen) in probe.experts.items():
                for kind, experts in zip(kinds, chosen.tolist(), strict=True):
                    for expert in experts:
                        of_kind = counts[layer].setdefault(kind, {})
                        of_kind[expert] = of_kind.get(expert, 0) + 1
    tokens = tables.pop("tokens")
    assert sum(tokens.values()) == sum(map(len, prompts + answers)) and set(tables) == set(counts)
    for layer, table in tables.items():
        for kind, shares in table.items():
            expected = [counts[layer][kind].get(expert, 0) / tokens[kind]
                        for expert in range(model.config.n_routed_experts)]
            assert shares == pytest.approx(expected, abs=1e-3)


def test_look_curves_and_loads_of_a_log():
    """By hand: each curve has the numbers of its key, of steps and of dev apart; loads are turned
    from layers of a step to steps of an expert."""
    log = [{"kind": "dev", "stage": "zero", "step": 0, "samples": 8, "pass@1": 0.1, "cons@8": 0.2,
            "length": 30, "reflection": 0.3, "mixing": None},
           {"kind": "zero", "step": 1, "accuracy": 0.4, "length": 31, "reflection": 0.5,
            "mixing": 0.6, "entropy": 0.7, "dead_groups": 0.8, "loads": [[1, 2, 3], [4, 5, 6]]},
           {"kind": "dev", "stage": "base", "step": 9, "samples": 8, "pass@1": 0.9},
           {"kind": "zero", "step": 2, "accuracy": 0.5, "loads": [[7, 8, 9], [1, 1, 1]]}]
    assert page_of._curves(log, "zero") == {
        "accuracy": {"train": [[1, 0.4], [2, 0.5]], "dev": [[0, 0.1]]},
        "majority": {"train": [], "dev": [[0, 0.2]]},
        "length": {"train": [[1, 31]], "dev": [[0, 30]]},
        "checks": {"train": [[1, 0.5]], "dev": [[0, 0.3]]},
        "mixing": {"train": [[1, 0.6]], "dev": []},
        "entropy": {"train": [[1, 0.7]], "dev": []}, "dead": {"train": [[1, 0.8]], "dev": []}}
    run = SimpleNamespace(model=SimpleNamespace(n_layers=3, n_dense_layers=1))
    assert page_of._loads(log, run) == {"zero": {"steps": [1, 2], "layers": [
        [[1, 7], [2, 8], [3, 9]], [[4, 1], [5, 1], [6, 1]]]}}


def test_look_kinds_of_tokens():
    """A worked example, token by token."""
    prompt = tasks.encode_prompt("Compute 3-4")
    ids = tasks.encode_response("<think>3-4=-1 check 1ok</think>the answer is <answer>1</answer>")
    kinds = page_of._kinds_of_tokens(prompt, ids)
    assert kinds[:len(prompt)] == ["question"] * len(prompt)
    assert kinds[len(prompt):] == [
        "tag", "operand", "sign", "operand", "=", "sign", "result", "check", "operand", "other",
        "other", "tag", "other", "other", "other", "tag", "operand", "tag", "tag"]


def test_look_page_of_a_whole_run():
    """The page has all stages of RL, all curves and the same prompts for each stage; it is one file
    that is small and names nothing outside."""
    page = page_of._make_page(micro_run(), read_log(micro_run()))
    data = data_of(page)
    assert list(data["groups"]) == ["zero", "dev2", "r1", "student_rl", "distill_rl"]
    assert list(data["curves"]) == list(data["groups"])
    for curves in data["curves"].values():
        assert set(curves) == set(page_of.CURVES)
        assert all(curve["train"] or curve["dev"] for curve in curves.values())
    stages = set(data["prompts"][0]["answers"])
    assert {"base", "zero", "dev1", "dev2", "dev3", "r1", "distill"} <= stages
    assert list(data["loads"]) == ["base", "zero", "dev1", "dev2", "dev3", "r1"]
    assert len(page.encode()) < page_of.LIMIT
    addresses = set(re.findall(r"https?://[^\"'\s]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=\"(?!data:)", page)


def test_look_page_stays_small(monkeypatch):
    """Of a run with too many groups every second one is left out until the page is small."""
    whole = data_of(page_of._make_page(micro_run(), read_log(micro_run())))
    monkeypatch.setattr(page_of, "LIMIT", len(json.dumps(whole)) - 1)
    page = page_of._make_page(micro_run(), read_log(micro_run()))
    assert len(data_of(page)["groups"]["zero"]) < len(whole["groups"]["zero"])


def test_look_text_of_a_run_cannot_end_the_script(recorded, tmp_path):
    """What a model wrote stays data."""
    evil = "</script><script>alert(1)</script><!--"
    log = [*read_log(recorded), {"kind": "samples", "stage": "zero", "step": 9,
                                 "answers": [[evil, "1", evil]]}]
    page = page_of._make_page(tmp_path, log)
    assert page.count("<script") == page_of.TEMPLATE.read_text("utf-8").count("<script")
    assert data_of(page)["prompts"][-1]["question"] == evil


def test_look_needs_a_run(tmp_path, capsys):
    """A folder without a run is refused by one line."""
    assert "no run in this folder" in refused(["look", str(tmp_path)], capsys)


# -------------------------------------------------------------------------------------------------
# The rules in the page

PIECES = [*tasks.SPECIAL[4:8] * 4, *tasks.SPECIAL[:3], *"0123456789+-*=", " check ", "检查",
          " ok ", "正确", " wait ", "等等", " then ", "the answer is ", "答案就是", " ", "\n", "<",
          ">", "<|", "007", "-5", "- 5", "7.0", "½", "²", "三", "Ⅷ", "٣", "é", "ß", "ж", "か", "𝟜",
          "😀", "\u0301", "\u2028", "\r", "", "thinking", "x" * 41, "中" * 40, "<Think>",
          "</think >", "\x00", "ﬁ", "𠀀"]


def hostile_text(rng):
    """A text that is nearly an answer, or not at all."""
    if rng.random() < 0.3:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(9)))
    thinking = "".join(rng.choice(PIECES[11:]) for _ in range(rng.randrange(6)))
    answer = rng.choice(["52", "52", "52", "25", "052", "+52", "五十二", "", " 52", "-0", "0"])
    summary = rng.choice(["", "", "the answer is ", "答案就是", rng.choice(PIECES)])
    text = tasks.response(thinking, answer, rng.random() < 0.9, summary)
    for _ in range(rng.choice([0, 0, 1, 2])):
        i = rng.randrange(len(text) + 1)
        code = rng.randrange(0x110000 - 0x800)
        any_letter = chr(code if code < 0xD800 else code + 0x800)  # surrogates are no letters
        piece = rng.choice([*PIECES, any_letter])
        text = text[:i] + piece + text[i + rng.randrange(3):]
    return text


def test_look_rules_agree_with_tasks():
    """The rules in the page, run in node, say what tasks.py says of ten thousand texts."""
    node = shutil.which("node") or shutil.which("nodejs")
    if node is None:
        pytest.skip("the rules in the page need node (apt install nodejs)")
    rng = random.Random(0)
    texts = [hostile_text(rng) for _ in range(10_000)]
    problems = [tasks.Problem("", "52", language) for language in tasks.LANGUAGES]
    template = page_of.TEMPLATE.read_text("utf-8")
    rules = re.search('<script id="rules">(.*?)</script>', template, re.DOTALL)[1]
    script = rules + """
    const {known, texts, problems} = JSON.parse(require("fs").readFileSync(0, "utf-8"));
    const rules = makeRules(known);
    process.stdout.write(JSON.stringify(texts.map(text => [...rules.parse(text),
      rules.format(text), rules.wordLanguages(text), rules.shownPart(text), rules.reflects(text),
      rules.corrects(text), rules.concludes(text), ...problems.flatMap(p => [
        rules.accuracy(text, p), rules.language(text, p)]),
      rules.explain(text, problems[0])])));"""
    given = json.dumps({"known": page_of._rules(r1mini.Run()), "texts": texts,
                        "problems": [dataclasses.asdict(p) for p in problems]})
    done = subprocess.run([node, "-e", script], input=given, capture_output=True, text=True,
                          encoding="utf-8", check=True)
    right = 0
    for text, (*found, reasons) in zip(texts, json.loads(done.stdout), strict=True):
        expected = [*tasks.parse(text), tasks.format_reward(text), tasks.word_languages(text),
                    tasks.shown_part(text), tasks.reflects(text), tasks.corrects(text),
                    tasks.concludes(text)]
        for problem in problems:
            expected += [tasks.accuracy(text, problem),
                         tasks.language_share(text, problem.language)]
        assert found == expected, repr(text)
        assert [value for value, _ in reasons.values()] == [
            tasks.accuracy(text, problems[0]), tasks.format_reward(text),
            tasks.language_share(text, "en")]
        assert not any("not in the template" in reason for _, reason in reasons.values()), text
        right += tasks.accuracy(text, problems[0])
    assert 300 < right < 9000  # both happen often


# -------------------------------------------------------------------------------------------------
# The page in a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page's tests need selenium "
                                                                 "(pip install '.[test]')")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("the page's tests need Chromium (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page of a whole run is."""
    path = tmp_path_factory.mktemp("page") / "look.html"
    path.write_text(page_of._make_page(micro_run(), read_log(micro_run())), "utf-8")
    return path.as_uri()


def open_page(browser, address, width=1200, scheme="light"):
    """Opens the page at a width, in pixels."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # forgets what was before
    browser.get(address)


def text_of(browser, name):
    """The text of an element."""
    return browser.find_element("id", name).text


def press(browser, key):
    """Presses a key where the focus is."""
    browser.switch_to.active_element.send_keys(key)


def test_look_page_slider_moves_everything(browser, address):
    """A key on the slider moves step, group and cursor; another stage brings its own groups."""
    from selenium.webdriver.common.keys import Keys
    open_page(browser, address)
    data = data_of(browser.page_source)
    assert text_of(browser, "where") == "step 1 of 4"
    cursor = "return document.querySelector('.cursor[y1=\"10\"]').getAttribute('x1')"
    before = browser.execute_script(cursor)
    browser.execute_script("document.getElementById('step').focus()")
    press(browser, Keys.ARROW_RIGHT)
    assert text_of(browser, "where") == "step 3 of 4"
    assert browser.execute_script(cursor) != before
    rows = browser.find_elements("css selector", "#answers [role=option]")
    group = data["groups"]["zero"][1]
    assert len(rows) == len(group["answers"])
    assert f"{group['answers'][0]['reward']:.2f}" in rows[0].text
    stages = browser.find_elements("css selector", "#stage button")
    assert [x.text for x in stages] == [data["names"][x] for x in data["groups"]]
    stages[2].click()
    assert text_of(browser, "where") == "step 1 of 4" and "language" in text_of(browser, "answers")


def test_look_page_answers_by_keyboard(browser, address):
    """Arrow keys choose answers and tokens, and the formula has the chosen answer's numbers."""
    from selenium.webdriver.common.keys import Keys
    open_page(browser, address)
    group = data_of(browser.page_source)["groups"]["zero"][0]
    browser.execute_script("document.querySelector('#answers [tabindex=\"0\"]').focus()")
    for number, (key, expected) in enumerate(((Keys.ARROW_DOWN, "answer 2, token 1 "),
                                              (Keys.ARROW_RIGHT, "answer 2, token 2 "),
                                              (Keys.ARROW_DOWN, "answer 3, token 1 "))):
        press(browser, key)
        assert text_of(browser, "token").startswith(expected), number
    assert text_of(browser, "which") == "Answer 3 in numbers"
    advantage = group["answers"][2]["advantage"]
    assert f"{abs(advantage):.2f}" in text_of(browser, "formula").splitlines()[-1]


def test_look_page_rewards(browser, address):
    """What is typed is scored at once, with a reason."""
    open_page(browser, address)
    field = browser.find_element("id", "text")
    answer = data_of(browser.page_source)["question"]["answer"]
    for text, total, reason in (
            (f"<think></think><answer>{answer}</answer>", "1.20", f"{answer} is right"),
            (f"<answer>{answer}</answer>", "1.00", "There is no think block"),
            (f"<think></think><answer>{answer}</answer>!", "0.00", "something follows </answer>")):
        field.clear()
        field.send_keys(text)
        assert text_of(browser, "try-total") == total
        assert reason in text_of(browser, "tried")
    browser.find_element("xpath", "//button[text()='mixed languages']").click()
    assert text_of(browser, "try-language_reward") == "0.50"


def test_look_page_inside(browser, address):
    """A key chooses the next token; what may come next is that token's."""
    from selenium.webdriver.common.keys import Keys
    open_page(browser, address)
    data = data_of(browser.page_source)
    answer = data["inside"]["answers"][0]
    browser.execute_script("document.getElementById('inside-tokens').focus()")
    press(browser, Keys.ARROW_RIGHT)
    position = answer["prompt"] + 1
    assert text_of(browser, "seeing").startswith(f"Chosen: token {position + 1}")
    shown = browser.find_elements("css selector", "#next i + span")[0].text
    probability = answer["next"][position][0][1]
    assert float(shown.rstrip("%")) == pytest.approx(100 * probability, abs=0.6)
    assert len(browser.find_elements("css selector", "#experts .on")) == len(
        answer["experts"]) * (1 + data["inside"]["chosen"])
    looks = browser.execute_script("return attentionOf(data.inside.answers[0], 0, 1, arguments[0])",
                                   position)
    assert len(looks) == position + 1 and sum(looks) == pytest.approx(1, abs=0.01 * len(looks))


def test_look_page_is_quiet(browser, address):
    """No error on the console, and nothing is fetched but the file itself, whatever is clicked."""
    open_page(browser, address)
    browser.execute_script("document.querySelectorAll('button').forEach(x => x.click())")
    time.sleep(0.2)
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in sent
            if message["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {address}


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_look_page_has_no_sideways_scroll(browser, address, width):
    """Nothing is wider than the screen."""
    open_page(browser, address, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


CONTRAST = """
const channels = text => text.match(/[\\d.]+/g).map(Number);
const over = (top, below) => below.map((x, i) => x + (top[3] ?? 1) * (top[i] - x));
const luminance = rgb => rgb.map(x => x / 255)
  .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const worst = [];
for (const node of document.querySelectorAll("body *")) {
  const texts = [...node.childNodes].filter(x => x.nodeType === 3 && x.textContent.trim());
  if (!texts.length || !node.getClientRects().length || node.closest("script")) continue;
  const layers = [];
  for (let x = node; x; x = x.parentElement)
    layers.unshift(channels(getComputedStyle(x).backgroundColor));
  const below = layers.reduce((rgb, layer) => over(layer, rgb), [255, 255, 255]);
  const style = getComputedStyle(node);
  const ink = over(channels(node.namespaceURI.endsWith("svg") ? style.fill : style.color), below);
  const [a, b] = [luminance(ink), luminance(below)].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05);
  if (ratio < 4.5) worst.push([ratio, node.tagName, node.className, node.textContent.slice(0, 40)]);
}
return worst.slice(0, 5);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_look_page_contrast(browser, address, scheme):
    """Each text stands out from what is behind it by at least 4.5:1, also on every colour that a
    token can have."""
    open_page(browser, address, scheme=scheme)
    browser.execute_script("""
      const kinds = ["up1", "up2", "up3", "down1", "down2", "down3", "see1", "see2", "see3",
        "see4"];
      document.querySelectorAll(".tokens span").forEach((x, i) => {
        if (i < 30) x.className = kinds[i % kinds.length] + (i % 2 ? " tag" : "");
      });""")
    assert browser.execute_script(CONTRAST) == []


# -------------------------------------------------------------------------------------------------
# In the terminal


def test_look_show_prints_a_group(capsys, tmp_path, monkeypatch):
    """show prints 16 answers of Base and of R1-Zero, each with its reward and its advantage, which
    is worked out anew here. There are no colours where nobody sees them. A missing model is an
    error."""
    assert cli.main(["show"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    _, base, zero = re.split(r"\n(?:Base|R1-Zero): mean reward ", out)
    for group in (base, zero):
        rows = [line.split()[:2] for line in group.splitlines()
                if re.match(r"  ?-?\d\.\d\d  +[+-]\d", line)]
        assert len(rows) == 16
        rewards, printed = ([float(row[i]) for row in rows] for i in (0, 1))
        expected = grpo.advantages(torch.tensor([rewards]))[0].tolist()
        assert printed == pytest.approx(expected, abs=0.01)
        assert float(group.partition(",")[0]) == pytest.approx(sum(rewards) / 16, abs=0.006)
    monkeypatch.setattr(show, "KEPT", tmp_path)
    assert "base.pt is missing" in refused(["show"], capsys)


def test_look_show_cuts_the_middle():
    """A text that is too wide keeps its beginning and its end; Chinese letters fill two columns."""
    assert show._cut("short", 20) == "short"
    cut = show._cut("检查" * 10 + "<answer>5</answer>", 30)
    assert cut.startswith("检查") and cut.endswith("/answer>")
    assert sum(2 if ord(x) > 0x2000 else 1 for x in cut) <= 30
