"""Tests of the study yarn. The oracle of YaRN is transformers' DeepSeek-V3."""
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import moe
import tasks
from engine.sampling import generate
from studies import yarn
from tests.helpers import MICRO, TINY, make
from tools import export, figures, study


def their_yarn(original, factor):
    """The rotary settings of V3's config.json."""
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "beta_fast": 32,
            "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": original}


@pytest.mark.parametrize(("width", "original", "factor"),
                         [(64, 4096, 40.0), (16, 512, 16.0), (32, 1024, 4.0), (8, 64, 2.0)])
def test_yarn_frequencies_equal_transformers(width, original, factor):
    """V3's own settings come first. The softmax scale is transformers' too, and its rotations have
    no further factor."""
    config = DeepseekV3Config(qk_rope_head_dim=width, hidden_size=64, num_hidden_layers=1,
                              num_attention_heads=4, q_lora_rank=None, qk_nope_head_dim=16,
                              rope_parameters=their_yarn(original, factor))
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    ours = yarn._yarn_frequencies(width, 10000.0, original, factor)
    assert torch.allclose(ours, theirs, rtol=1e-5) and attention_factor == 1.0
    assert not torch.allclose(theirs, 10000.0 ** (-torch.arange(0, width, 2) / width), rtol=1e-2)
    scale = DeepseekV3Attention(config, 0).scaling
    assert (16 + width) ** -0.5 * yarn._sharpening(factor) == pytest.approx(scale)


def test_yarn_numbers_of_v3():
    """V3's ramp and softmax scale, worked out by hand from its config (factor 40, 4096 tokens)."""
    kept = yarn._yarn_frequencies(64, 10000.0, 4096, 40) * 10000.0 ** (torch.arange(32) / 32)
    assert torch.allclose(kept[:11], torch.ones(11)) and torch.allclose(kept[23:], torch.full(
        (9,), 0.025))
    assert torch.allclose(kept[11:23], 1 - 0.075 * torch.arange(1, 13))
    assert 192 ** -0.5 * yarn._sharpening(40) == pytest.approx(0.1352338)


@torch.no_grad()
@pytest.mark.parametrize("q_lora_rank", [0, 12])
def test_yarn_logits_equal_transformers(tmp_path, q_lora_rank):
    """A whole model: transformers reads our weights with YaRN in its config and gives our logits,
    which differ from those without YaRN."""
    model = make(vocab_size=tasks.VOCAB_SIZE, max_seq_len=320, q_lora_rank=q_lora_rank,
                 init_std=0.2, balance_alpha=moe.Config.balance_alpha)
    export.write_hf_folder(tmp_path / "exported", model)
    config = AutoConfig.from_pretrained(tmp_path / "exported")
    config.rope_parameters = their_yarn(32, 10.0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", config=config)
    tokens = torch.randint(tasks.VOCAB_SIZE, (2, 300), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    yarn._use_yarn(model, original=32, factor=10.0)
    ours, theirs = model(tokens).logits, theirs(tokens).logits
    assert (ours - before).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 2e-4


@torch.no_grad()
def test_yarn_sampling_equals_reading():
    """With the cache, where weights are absorbed, YaRN gives the same tokens as without it."""
    model = make(init_std=0.3)
    yarn._use_yarn(model, original=16, factor=4.0)
    prompt = list(range(1, 21))
    samples = generate(model, [prompt], 12, end_id=0, pad_id=0, temperature=0.0)
    written = samples.answers()[0]
    logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1:-1]
    assert logits.argmax(-1).tolist() == written


def test_yarn_longer_model_keeps_its_answers(monkeypatch):
    """Room for more positions changes nothing on a short text."""
    monkeypatch.setattr(yarn, "LENGTHS", (64, 256))
    model, tokens = make(), torch.randint(1, TINY.vocab_size, (2, 60))
    longer = yarn._lengthened(SimpleNamespace(place=lambda m: m), model).eval()
    assert longer.config.max_seq_len == 256 and torch.equal(longer(tokens).logits,
                                                            model(tokens).logits)


def test_yarn_needles():
    """A text is as long as asked, up to a line of weather; the sum stands at its depth, once; only
    the solution is predicted; and it is right, by an oracle."""
    for language_seed in range(8):
        for length, depth in ((300, 0.0), (300, 0.5), (512, 0.25), (512, 1.0)):
            document = yarn._make_needle(random.Random(language_seed), length, depth, "test")
            weather, remember, question = yarn.LINES[document.problem.language]
            assert length - 8 < len(document.tokens) <= length
            text = document.problem.question
            assert text.count(remember) == 1 and text.endswith(question)
            assert tasks.part_of_problem(document.problem.expression) == "test"
            before, after = text.split(f"{remember}{document.problem.expression}\n")
            lines = text.count(weather)
            assert before.count(weather) == round(depth * lines)
            written = [token for token, w in zip(document.tokens, document.weight) if w]
            thinking, answer = tasks.parse(tasks.decode(written))
            assert eval(document.problem.expression) == int(answer)
            assert thinking.count("=") == yarn.LEVEL
    assert len(yarn._make_needle(random.Random(0), 1, 0.5).tokens) > 30  # no weather fits


@torch.no_grad()
def test_yarn_pass_is_greedy_decoding(monkeypatch):
    """A needle is right where generate() at temperature 0 writes the solution. A model whose next
    token is always the wanted one passes; one that errs at any token does not. It is found if it
    errs behind the first "=" only. A wrong "=" is none, and the next one counts."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO).eval()
    document = yarn._make_needle(random.Random(1), 80, 0.5)
    n_prompt = document.weight.index(1)
    written = generate(model, [document.tokens[:n_prompt]], 5, tasks.END_ID, tasks.PAD_ID,
                       temperature=0.0).answers()[0]
    monkeypatch.setattr(yarn, "EQUALS", written[2])
    found = tasks.Document(document.tokens[:n_prompt] + written,
                           [0] * n_prompt + [1] * len(written), "needle")
    first_equals = written.index(written[2])
    assert yarn._read_needle(model, found) == (True, True)
    for place in range(len(written)):
        tokens = list(found.tokens)
        tokens[n_prompt + place] += 1
        is_found, is_right = yarn._read_needle(model, tasks.Document(
            [*tokens, written[2]], [*found.weight, 1], "needle"))
        assert not is_right and is_found == (place > first_equals)


@pytest.fixture
def arm(monkeypatch, tmp_path):
    """A function that runs an arm on a random micro model and returns its numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    monkeypatch.setattr(yarn, "load_kept", lambda *_: model)
    monkeypatch.setattr(yarn, "LENGTHS", (64, 600))
    monkeypatch.setattr(yarn, "PROBLEMS", 1)
    monkeypatch.setattr(yarn, "EXTENDED", 96)
    monkeypatch.setattr(yarn, "EXTENSION", yarn.EXTENSION | {"steps": 1, "documents": 2})

    def run(name):
        few = ["base.steps=1", "base.documents=2", "base.row_tokens=128"]
        one = SimpleNamespace(ARMS={name: ""}, STAGES=yarn.STAGES, page=lambda *_: [],
                              SETTINGS=(*yarn.SETTINGS, *few), measure_arm=yarn.measure_arm)
        options = SimpleNamespace(name="demo", preset="micro", rest=["--seeds", "0"])
        study.main(options, one)
        return study._measure_arms(options, one, 0, [])[0]["metrics"]
    return run


def test_yarn_arms(arm, monkeypatch):
    """The arms have numbers of all cells, and differ in what they say: two are trained on longer
    rows, with the same seed, and two have YaRN, before any such training."""
    events, train, use_yarn = [], yarn.train, yarn._use_yarn

    def seen_train(model, s, draw, seed, *state):
        if s.row_tokens == 96:  # the training of the extension, not that of the base
            events.append(f"train with seed {seed}")
        return train(model, s, draw, seed, *state)

    def seen_use_yarn(model):
        events.append("YaRN")
        use_yarn(model)

    monkeypatch.setattr(yarn, "train", seen_train)
    monkeypatch.setattr(yarn, "_use_yarn", seen_use_yarn)
    events_of_arm = {}
    for name in yarn.ARMS:
        events.clear()
        numbers = arm(name)
        events_of_arm[name] = list(events)
        assert set(numbers) == {"found@64", "found@600"} | {
            f"needle@{length}{depth}" for length in (64, 600)
            for depth in ("", ".0", ".25", ".50", ".75", ".100")}
    assert events_of_arm == {"nothing": [], "continued": ["train with seed 1000"],
                             "before": ["YaRN"], "yarn": ["YaRN", "train with seed 1000"]}


def test_yarn_trains_on_train_and_tests_on_test(monkeypatch):
    """No sum of the test is ever trained on. Training texts have at most the wanted length."""
    run, rng = SimpleNamespace(corpus=tasks.Corpus()), random.Random(0)
    draw = yarn._draw_from(run, 300)
    needles = [d for d in (draw(rng) for _ in range(200)) if d.style == "needle"]
    assert 70 < len(needles) < 130 and max(len(d.tokens) for d in needles) <= 300
    tested = []
    monkeypatch.setattr(yarn, "LENGTHS", (64, 96))
    monkeypatch.setattr(yarn, "_read_needle",
                        lambda model, document: tested.append(document) or (True, True))
    assert set(yarn._test(make()).values()) == {1.0}
    assert len(tested) == 2 * len(yarn.DEPTHS) * yarn.PROBLEMS
    for documents, part in ((needles, "train"), (tested, "test")):
        assert {tasks.part_of_problem(d.problem.expression) for d in documents} == {part}


def test_yarn_page(tmp_path):
    """The page has the numbers of each arm by length and depth, and a picture if there is
    matplotlib."""
    rows = {}
    for i, name in enumerate(yarn.ARMS):
        for length in yarn.LENGTHS:
            for depth in ("", *(f".{depth}" for depth in yarn.DEPTHS)):
                x = i / 4
                row = {"mean": x, "std": 0.0, "per_seed": {"0": x}}
                rows |= {f"{name}.needle@{length}{depth}": row, f"{name}.found@{length}": row}
    text = "\n".join(yarn.page(rows, {}))
    assert "| YaRN, trained | 0.750 | 0.750 | 0.750 | 0.750 | 0.750 |" in text
    assert text.count("| 100% |") == 4
    picture = yarn.picture(rows)
    assert picture.panels[-1].title.endswith("75% at 2,048\n75% at 8,192")
    pytest.importorskip("matplotlib")
    assert figures.write_picture(tmp_path, "yarn", picture)
    assert (tmp_path / "figures/yarn.png").exists()
