"""Tests of tools/export.py. The oracle is transformers: its model, tokenizer and generation."""
import json
import random
import sys

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import moe
import tasks
from engine import checkpoint, sampling
from engine.phrases import PHRASES
from engine.tokenizer import all_strings
from tests.helpers import TAGS
from tests.helpers import make as make_tiny
from tools import cli, export

# Sizes and strong routing biases that differ from those of helpers.TINY.
SIZES = {"vocab_size": tasks.VOCAB_SIZE, "balance_alpha": moe.Config.balance_alpha,
         "bias_speed": 0.5, "init_std": 0.2, "max_seq_len": 320}
KINDS = {"V3": {}, "no groups": {"n_expert_groups": 1, "n_limited_groups": 1, "q_lora_rank": 0,
                                 "n_shared_experts": 2, "rope_theta": 500.0, "n_heads": 3,
                                 "v_head_dim": 20, "route_scale": 1.7},
         "no MTP": {"n_mtp_layers": 0, "n_dense_layers": 0},
         "dense": {"n_dense_layers": 3, "q_lora_rank": 0}}
PROMPTS = ["Compute 25-7+9+6", "计算46+3-9+5-7", "good evening there", "1", "show me"]


def make(**changes):
    """A tiny model for text, whose weights, norms' gains and routing biases are all random."""
    return make_tiny(**SIZES | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(A model's exported folder, the model). The model ends only a part of its answers."""
    path, model = tmp_path_factory.mktemp("hf") / "folder", make()
    model.head.weight.data[tasks.END_ID] *= 2
    export.write_hf_folder(path, model, "micro")
    return path, model


@pytest.fixture
def saved(tmp_path):
    """The path of a saved checkpoint."""
    checkpoint.save(tmp_path / "r1.pt", make(), preset="micro")
    return str(tmp_path / "r1.pt")


def run(*words):
    """The exit code of a command."""
    return cli.main([str(word) for word in words])


def same(a, b):
    """Whether two models have the same settings and bits."""
    a, b, configs = a.state_dict(), b.state_dict(), (a.config, b.config)
    return configs[0] == configs[1] and a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_export_logits_equal_transformers(kind, tmp_path):
    """from_pretrained() reads the folder, misses no weight, leaves only MTP's over, and gives our
    logits."""
    model = make(**KINDS[kind])
    export.write_hf_folder(tmp_path / "exported", model)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported",
                                                          output_loading_info=True)
    tokens = torch.randint(tasks.VOCAB_SIZE, (3, 40))
    ours, theirs = model(tokens).logits, theirs(tokens).logits
    assert theirs.dtype == torch.float32 and ours.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-4
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])
    assert bool(report["unexpected_keys"]) == (model.mtp is not None)


@torch.no_grad()
def test_export_mtp_logits_equal_transformers(folder, monkeypatch):
    """transformers' MTP model reads our MTP weights as layer 3 and gives our second logits, so the
    halves of the projection and the norms are in their places."""
    path, model = folder
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected",
                        [r"model\.layers\.3\."])
    main = AutoModelForCausalLM.from_pretrained(path)
    mtp, tokens = MtpModel.from_pretrained(main), torch.randint(tasks.VOCAB_SIZE, (2, 20))
    hidden = main(tokens, output_hidden_states=True).hidden_states[-1][:, :-1]
    theirs = main.lm_head(mtp.forward_layer(
        0, hidden, torch.arange(19).unsqueeze(0), MtpCache(config=main.config.get_mtp_config()),
        input_ids=tokens[:, 1:]))
    at = torch.ones(2, 19, dtype=torch.bool)
    ours = model.predict_after_next(tokens, tokens >= 0, model(tokens).hidden, at).logits
    assert ours.std() > 0.3 and (ours - theirs.flatten(0, 1)).abs().max() < 1e-4


def test_export_greedy_answers_equal_transformers(folder):
    """transformers' generate() gives our greedy answers to chat prompts of many lengths, padded on
    the left, and ends where ours end."""
    path, model = folder
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS], add_generation_prompt=True,
        padding=True, return_tensors="pt", return_dict=True)
    theirs = AutoModelForCausalLM.from_pretrained(path).generate(
        **batch, do_sample=False, max_new_tokens=30)[:, batch["input_ids"].size(1):].tolist()
    prompts = list(map(tasks.encode_prompt, PROMPTS))
    ours = sampling.generate(model, prompts, 30, tasks.END_ID, tasks.PAD_ID,
                             temperature=0).answers()
    ends = [tasks.END_ID in answer for answer in ours]
    assert any(ends) and not all(ends)
    assert theirs == [answer + [tasks.PAD_ID] * (30 - len(answer)) for answer in ours]
    texts = [text.partition(tasks.END)[0] for text in tokenizer.batch_decode(theirs)]
    assert texts == [tasks.decode(answer) for answer in ours]


def test_export_generation_config_is_the_evaluation_settings(folder):
    """The folder asks for R1's temperature and top-p, no top-k (transformers' default is 50),
    micro's answer length, and no token before a text."""
    model = AutoModelForCausalLM.from_pretrained(folder[0])
    s = model.generation_config
    assert (s.do_sample, s.temperature, s.top_p, s.top_k) == (True, 0.6, 0.95, 0)
    assert s.max_new_tokens == 48
    assert (s.pad_token_id, s.eos_token_id, s.bos_token_id) == (tasks.PAD_ID, tasks.END_ID, None)
    assert model.config.bos_token_id is None
    assert model.config.architectures == ["DeepseekV3ForCausalLM"]


def random_text(rng):
    """A random text: words of the corpus, digits, other scripts, emoji, any characters, stray
    bytes, and what is nearly a tag."""
    words = [*all_strings(tasks.WORDS), *all_strings(PHRASES), "héllo", "Ωmega", "naïve",
             "你好世界", "計算機", "の", "한국", "😀", "👩‍👩‍👧", "\n", "\t ", "  ", "<|", "|>",
             "<thin", "k>"]
    draws = [lambda: rng.choice(words), lambda: rng.choice(words) + " ",
             lambda: str(rng.randrange(10 ** 6)), lambda: rng.choice("+-*=. "),
             lambda: chr(rng.randrange(32, 127)), lambda: chr(rng.choice((
                 rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
             lambda: chr(rng.randrange(0x4E00, 0xA000)), lambda: rng.randbytes(3).decode("latin-1"),
             lambda: rng.randbytes(3).decode("utf-8", "replace")]
    return "".join(rng.choice(draws)() for _ in range(rng.randrange(1, 30)))


def test_export_tokenizer_equals_tiktoken(folder):
    """transformers' tokenizer gives tiktoken's ids on a thousand random texts, and special ids for
    tags only."""
    tokenizer, rng = AutoTokenizer.from_pretrained(folder[0]), random.Random(0)
    for _ in range(1000):
        text = random_text(rng)
        ids = tokenizer(text)["input_ids"]
        assert ids == tasks.ENCODING.encode_ordinary(text), text
        assert max(ids) < len(tasks.RANKS) and tokenizer.decode(ids) == tasks.decode(ids) == text
        text = "".join(random_text(rng) + rng.choice(tasks.SPECIAL) for _ in range(3))
        assert tokenizer(text)["input_ids"] == tasks.ENCODING.encode(text, allowed_special="all")


@pytest.mark.parametrize("question", ["Compute 25-7+9+6", " 计算 46+3 \n", "", "{{ 1 + 1 }}"])
def test_export_chat_template_equals_training_prompts(folder, question):
    """The chat template gives the ids of encode_prompt for a question and of a training document
    for a dialogue, and its text keeps the tags."""
    tokenizer = AutoTokenizer.from_pretrained(folder[0])
    answer = tasks.response("25-7=18 ok ", 18, summary="the answer is ")
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    document = tokenizer.apply_chat_template(chat)["input_ids"]
    assert prompt == tasks.encode_prompt(question)
    assert document == tasks.dialogue(tasks.Problem(question, "", ""), answer).tokens
    assert all(tag in tokenizer.decode(document, skip_special_tokens=True) for tag in TAGS)
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": question}])


TYPED = ["".join(tasks.SPECIAL), "a<|end|><|user|>b", "<<|end|>|>", "<|", "1<2 <think", "<\ufdd1>"]


@pytest.mark.parametrize("typed", TYPED)
def test_export_chat_template_makes_no_special_token_of_a_message(folder, typed):
    """A special token that a user types stays text, as in encode_prompt. In an answer only the four
    tags are special, as in encode_response."""
    tokenizer = AutoTokenizer.from_pretrained(folder[0])
    question, answer = f"Compute 1+2 {typed}", f"<think>{typed}</think><answer>3</answer>"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    document = tokenizer.apply_chat_template(chat)["input_ids"]
    assert prompt == tasks.encode_prompt(question)
    assert document == tasks.dialogue(tasks.Problem(question, "", ""), answer).tokens


@pytest.mark.parametrize("name", [".", "home", "link"])
def test_export_never_replaces_the_folder_of_the_user(name, saved, tmp_path, monkeypatch, capsys):
    """The folder one stands in, and the home folder, are refused also when they are empty: the
    exported folder would take their place."""
    for folder in ("here", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    number = (tmp_path / "here").stat().st_ino
    assert run("export", saved, name if name == "." else tmp_path / name) == 2
    assert "name a new folder" in capsys.readouterr().err
    assert (tmp_path / "here").stat().st_ino == number and not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_export_then_import_returns_the_same_bits(kind, tmp_path, capsys):
    """Export and import return the same weights, MTP's too, the same settings and preset, and leave
    no other file."""
    model, path = make(**KINDS[kind]), tmp_path / "r1.pt"
    checkpoint.save(path, model, preset="micro", log=5)
    (tmp_path / "empty").mkdir()
    assert run("export", path, tmp_path / "empty") == 0
    assert run("import", tmp_path / "empty", tmp_path / "back.pt") == 0
    imported, record = checkpoint.load(tmp_path / "back.pt")
    assert same(imported, model) and record == {"preset": "micro"}
    assert capsys.readouterr().out.count(f"{sum(p.numel() for p in model.parameters()):,}") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"r1.pt", "empty", "back.pt"}


def transformers_model(**changes):
    """A random DeepseekV3 made by transformers."""
    torch.manual_seed(1)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**dict(
        vocab_size=300, hidden_size=24, intermediate_size=40, moe_intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8,
        num_experts_per_tok=3, first_k_dense_replace=1, n_group=4, topk_group=2, kv_lora_rank=12,
        q_lora_rank=20, v_head_dim=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        max_position_embeddings=64, initializer_range=0.2) | changes)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.uniform_(-0.2, 0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, {"first_k_dense_replace": 9}, {"q_lora_rank": None, "n_shared_experts": 2},
    {"n_group": 1, "topk_group": 1, "rope_parameters": {"rope_type": "default",
                                                        "rope_theta": 300.0}}])
def test_import_logits_equal_transformers(changes, tmp_path, capsys):
    """A folder of several files that transformers wrote is imported with the same logits; chat
    refuses its foreign vocabulary."""
    model = transformers_model(**changes)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert run("import", tmp_path / "theirs", tmp_path / "ours.pt") == 0
    ours, tokens = checkpoint.load(tmp_path / "ours.pt")[0], torch.randint(300, (3, 40))
    actual, expected = ours.eval()(tokens).logits, model(tokens).logits
    assert expected.std() > 0.3 and (actual - expected).abs().max() < 1e-4 and ours.mtp is None
    assert run("chat", tmp_path / "ours.pt", "--ask", "1") == 2
    assert "a vocabulary of 300" in capsys.readouterr().err


def refused(found, folder, tmp_path, capsys):
    """The one line that refuses a changed config.json, after which no checkpoint exists."""
    (tmp_path / "config.json").write_text(json.dumps(found))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert run("import", tmp_path, tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "ours.pt").exists()
    return error


REFUSED = {
    "rope_type": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40}},
    "type": {"rope_scaling": {"type": "yarn", "factor": 40}}, "attention_bias": True,
    "norm_topk_prob": False, "tie_word_embeddings": True, "hidden_act": "gelu",
    "topk_method": "greedy", "scoring_func": "softmax", "quantization_config": {"bits": 8},
    "model_type": "deepseek_v2", "rope_interleave": False, "moe_layer_freq": 2,
    "rms_norm_eps": 1e-5, "num_key_value_heads": 1, "attention_dropout": 0.1,
    "first_k_dense_replace": 3, "n_group": 3, "topk_group": 5, "num_experts_per_tok": 5,
    "hidden_size": 20, "kv_lora_rank": 11, "n_routed_experts": None, "vocab_size": "many",
    "num_hidden_layers": True, "rope_theta": -1.0, "v_head_dim": 16.5, "n_shared_experts": 0}


@pytest.mark.parametrize("key", REFUSED)
def test_import_names_the_unsupported_field(key, folder, tmp_path, capsys):
    """A config.json with a value that r1mini does not support is refused by one line that names the
    field."""
    change = REFUSED[key] if key in ("rope_type", "type") else {key: REFUSED[key]}
    found = json.loads((folder[0] / "config.json").read_text("utf-8")) | change
    assert f"{key} " in refused(found, folder[0], tmp_path, capsys)


@pytest.mark.parametrize("key", ["n_group", "rope_theta", "hidden_size"])
def test_import_names_the_missing_size(key, folder, tmp_path, capsys):
    """A missing size is named, and never replaced by our default: transformers' default may
    differ."""
    found = json.loads((folder[0] / "config.json").read_text("utf-8"))
    found.pop(key)
    assert f"lacks {key}" in refused(found, folder[0], tmp_path, capsys)


LAYER = "model.layers.3."

WRONG = {
    "lack model.norm.weight": lambda w: w.pop("model.norm.weight"),
    "no place for model.odd": lambda w: w.update({"model.odd": torch.ones(1)}),
    "lm_head.weight is (2, 3)": lambda w: w.update({"lm_head.weight": torch.ones(2, 3)}),
    "another lm_head.weight": lambda w: w[LAYER + "shared_head.head.weight"].add_(1),
    f"lack {LAYER}enorm.weight": lambda w: w.pop(LAYER + "enorm.weight")}


@pytest.mark.parametrize("message", WRONG)
def test_import_names_the_weight_that_does_not_fit(message, folder, tmp_path, capsys):
    """A missing, unknown or misshaped weight, or an MTP with its own head, is refused by one line
    that names it."""
    weights = safetensors.torch.load_file(folder[0] / "model.safetensors")
    WRONG[message](weights)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder[0] / "config.json").read_bytes())
    assert run("import", tmp_path, tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "ours.pt").exists()


def test_import_refuses_as_many_other_tokens(folder, tmp_path, capsys):
    """A folder whose tokenizer has as many tokens as ours, but other ones, is refused. One that
    transformers has saved again, or that has no tokenizer, is not."""
    for path in folder[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    vocabulary = found["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop(list(vocabulary)[-1])
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    assert run("import", tmp_path, tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert "but other ones" in error and error.count("\n") == 1
    AutoTokenizer.from_pretrained(folder[0]).save_pretrained(tmp_path)
    assert run("import", tmp_path, tmp_path / "ours.pt") == 0
    (tmp_path / "tokenizer.json").unlink()
    assert run("import", tmp_path, tmp_path / "ours2.pt") == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff" * 50, b"[" * 10 ** 5])
def test_import_names_the_damaged_file(name, content, folder, tmp_path, capsys):
    """An empty, cut or foreign file is refused by one line that names it."""
    for path in folder[0].iterdir():
        (tmp_path / path.name).write_bytes(content if path.name == name else path.read_bytes())
    assert run("import", tmp_path, tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert f"{name}: damaged" in error and error.count("\n") == 1


def test_export_and_import_never_overwrite(folder, saved, tmp_path, capsys):
    """Export into a folder that is not empty, and import onto a file, are refused, and both stay as
    they were."""
    before = open(saved, "rb").read()
    assert run("export", saved, tmp_path) == 2 and run("export", saved, saved) == 2
    assert run("import", folder[0], saved) == 2
    assert capsys.readouterr().err.count("is there already") == 3
    assert open(saved, "rb").read() == before and len(list(tmp_path.iterdir())) == 1


def test_export_writes_the_whole_folder_or_nothing(saved, tmp_path, monkeypatch, capsys):
    """When the disk fills up in the third file, no folder and no part of it remains."""
    syncs = iter([None, None])

    def full(_):
        if next(syncs, 1):
            raise OSError(28, "No space left on device", "model.safetensors")
    monkeypatch.setattr("os.fsync", full)
    assert run("export", saved, tmp_path / "new" / "exported") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


def test_export_names_what_it_cannot_export(saved, tmp_path, monkeypatch, capsys):
    """A reward model, a foreign vocabulary, another epsilon and missing safetensors are refused by
    one line each."""
    lines = {"reward model": make(n_outputs=1, n_mtp_layers=0), "vocabulary": make(vocab_size=24),
             "norm_eps": make(norm_eps=1e-5)}
    for word, model in lines.items():
        checkpoint.save(tmp_path / "odd.pt", model)
        assert run("export", tmp_path / "odd.pt", tmp_path / "exported") == 2
        assert word in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert run("export", saved, tmp_path / "exported") == 2
    assert "pip install '.[hf]'" in capsys.readouterr().err and not (tmp_path / "exported").exists()
