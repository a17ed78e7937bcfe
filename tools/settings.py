"""From a preset and --set KEY=VALUE to the settings of a run, and whether they make sense."""
import dataclasses
import difflib
import math

import tasks
from engine.errors import UserError
from engine.folder import flatten_settings
from grpo import OBJECTIVES, RL, SETTINGS
from r1mini import PRESETS, Run, Train

# What a preset changes besides the model's sizes. "base" stands for every supervised stage and
# "zero" for every RL stage, except that their steps and rates are those of base and zero alone (on
# micro they are everybody's). Larger models learn longer chains, with products. Beyond base and
# zero, nobody has tuned laptop and node.
LARGE = {"corpus.products": 0.2, "corpus.levels": (1, 2, 3, 4, 5, 6, 7),
         "zero.levels": (4, 5, 6, 7), "zero.max_new_tokens": 400}
TRAINING = {
    "micro": {"base.steps": 20, "base.documents": 16, "base.dev_every": 10, "zero.steps": 4,
              "zero.problems": 4, "zero.group_size": 4, "zero.max_new_tokens": 48,
              "zero.reference_every": 2, "eval.problems": 8, "eval.samples": 4, "eval.longer": 2,
              "eval.dev_problems": 4, "zero.dev_every": 2, "data.cold_start": 8,
              "data.rejection": 8, "data.distill": 8, "data.prompts": 2, "data.stand_in": True,
              "student.dim": 16},
    "nano": {},
    # Two cores of a CPU train base and Zero within two hours.
    "laptop": LARGE | {"base.steps": 1200, "base.documents": 128, "base.lr": 3e-3,
                       "zero.lr": 2e-4, "zero.steps": 30},
    "node": LARGE | {"base.steps": 20000, "base.documents": 1024, "base.lr": 5e-4,
                     "zero.lr": 2e-5, "zero.steps": 500, "zero.problems": 128},
}
# What users look for under another name: an option, or another word for a setting of a part.
OPTIONS = {"seed": "--seed", "preset": "--preset", "start": "--from", "from": "--from",
           "data_file": "--data", "device": "--device", "dtype": "--dtype", "threads": "--threads",
           "processes": "--processes", "out": "--out", "save_every": "--save-every"}
SYNONYMS = {"kl": "beta", "kl_weight": "beta", "kl_coef": "beta", "kl_penalty": "beta",
            "learning_rate": "lr", "clip": "clip_low", "epsilon": "clip_low",
            "batch_size": ("problems", "documents"), "epochs": "steps", "iterations": "steps",
            "max_tokens": "max_new_tokens", "max_length": "max_new_tokens", "G": "group_size",
            "num_generations": "group_size", "samples_per_prompt": "group_size",
            "temp": "temperature", "hidden_size": "dim", "d_model": "dim", "layers": "n_layers",
            "heads": "n_heads", "experts": "n_routed_experts"}
LONGEST_PROMPT = 50     # tokens, stray spaces included
LONGEST_DOCUMENT = 300  # tokens of the corpus' longest document that is not a drill
DRILL_STEP = 8          # tokens of a step in a drill, at most: "98-9=89 "
COLDEST_RL = 0.01       # the lowest temperature of RL
MAY_BE_ZERO = {"seed", "n_dense_layers", "n_mtp_layers", "q_lora_rank", "n_outputs", "warmup",
               "overlong"}


def resolve_settings(preset, assignments, **fields):
    """The Run of a preset and of the user's key=value texts. UserError if they make no sense."""
    if preset not in TRAINING:
        raise UserError(f"--preset {preset} is for counting only (cost); to train, choose one of "
                        f"{', '.join(TRAINING)}")
    model = dataclasses.replace(PRESETS[preset], vocab_size=tasks.VOCAB_SIZE)
    student = dataclasses.replace(PRESETS["student"], vocab_size=tasks.VOCAB_SIZE)
    run = Run(preset, model=model, student=student, **fields)
    pairs = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {key}: wanted key=value, such as --set zero.lr=1e-4")
        pairs.append((key, value))
    for key, value in [*_preset_settings(run), *_objective_settings(pairs), *pairs]:
        run = _change_setting(run, key, value)
    _check_settings(run)
    return run


def _preset_settings(run):
    """[(key, value)] of what the run's preset changes, for all stages that it means."""
    parts = {"zero": [name for name, x in vars(run).items() if isinstance(x, RL)],
             "base": [name for name, x in vars(run).items() if isinstance(x, Train)]}
    settings = []
    for key, value in TRAINING[run.preset].items():
        part, _, field = key.partition(".")
        alone = field in ("steps", "lr") and run.preset != "micro"
        for name in [part] if alone else parts.get(part, [part]):
            settings.append((f"{name}.{field}", value))
    return settings


def _objective_settings(pairs):
    """[(key, value)] of what the objectives that the user has chosen bring with them."""
    settings = []
    for key, value in pairs:
        part, _, field = key.partition(".")
        if field == "objective":
            if value not in OBJECTIVES:
                raise UserError(f"--set {key}={value}: choose one of {', '.join(OBJECTIVES)}")
            settings += [(f"{part}.{name}", x) for name, x in SETTINGS[value].items()]
    return settings


def _change_setting(run, key, value):
    """The Run with one setting, such as zero.lr, at a value or at the text of one."""
    keys = [known for known in flatten_settings(dataclasses.asdict(run)) if "." in known]
    if key not in keys:
        if key in OPTIONS:
            raise UserError(f"--set: {key} is not a setting but an option: give {OPTIONS[key]}")
        raise UserError(f"--set: there is no setting {key!r}; the nearest is {_nearest(key, keys)}")
    part, field = key.split(".")
    settings = getattr(run, part)
    if isinstance(value, str):
        value = _convert_setting(key, value, getattr(settings, field))
    return dataclasses.replace(run, **{part: dataclasses.replace(settings, **{field: value})})


def _nearest(key, keys):
    """The setting that a user may have meant: another word for it, or else a similar one."""
    part, _, field = key.partition(".")
    words = SYNONYMS.get(field, ())
    for word in [words] if isinstance(words, str) else words:
        if f"{part}.{word}" in keys:
            return f"{part}.{word}"
    return difflib.get_close_matches(key, keys, 1, 0.0)[0]


def _convert_setting(key, text, default):
    """The value of a text, in the type of the setting's default. UserError if it is none."""
    wanted = {bool: "true or false", tuple: "whole numbers with commas between",
              int: "a whole number", float: "a number", str: "a text"}[type(default)]
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(int(x) for x in text.split(","))
        value = type(default)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise UserError(f"--set {key}: wanted {wanted}, got {text!r}") from None


def _check_settings(run):
    """UserError if settings make no sense, or contradict each other."""
    for key, value in flatten_settings(dataclasses.asdict(run)).items():
        field = key.rpartition(".")[2]
        least = 1 if type(value) is int and field not in MAY_BE_ZERO else 0
        if isinstance(value, (int, float)) and value < least and key != "seed":
            raise UserError(f"{key} must be at least {least}")
    rules = [*_corpus_rules(run)]
    for part, config in (("model", run.model), ("student", run.student)):
        rules += _model_rules(run, part, config)
    for part, settings in vars(run).items():
        if isinstance(settings, RL):
            rules += _rl_rules(run, part, settings)
        if isinstance(settings, Train):
            longest = min(run.model.max_seq_len, run.student.max_seq_len)
            rules.append((settings.row_tokens > longest, f"{part}.row_tokens exceeds the "
                          f"{longest} tokens that a model reads: lower it or raise max_seq_len"))
    for broken, message in rules:
        if broken:
            raise UserError(message)


def _corpus_rules(run):
    """[(whether it is broken, message)] of the corpus and of evaluation."""
    c = run.corpus
    shares = (c.products, c.spaced, c.tags, c.summary, c.foreign, c.switched, c.steps_mixed,
              c.checked_mixed, c.direct_slips, c.steps_slips, c.checked_slips, c.check_chance,
              run.data.general)
    prompts = {kind: [prompt for language in tasks.LANGUAGES
                      for prompt in tasks.all_prompts("test", kind, language)]
               for kind in tasks.GENERAL}
    fewest = min(map(len, prompts.values()))
    return [
        (run.data.prompts > fewest,
         f"data.prompts must be at most {fewest}: the rarest kind has {fewest} test prompts"),
        (max(c.shares()) > 1 or min(c.shares()) < -1e-9,
         "the shares of the corpus must not exceed 1, nor those of its styles together"),
        (max(shares) > 1, "the shares of the corpus must not exceed 1"),
        (not 1 <= min(c.levels) <= max(c.levels) <= 7, "corpus.levels must be within 1..7"),
        (not 0 < run.eval.top_p <= 1, "eval.top_p must be above 0 and at most 1")]


def _model_rules(run, part, config):
    """[(whether it is broken, message)] of a model in a run; part: its name in --set."""
    return size_rules(config, part) + [
        (config.vocab_size != tasks.VOCAB_SIZE, f"{part}.vocab_size must be {tasks.VOCAB_SIZE}"),
        (config.n_outputs, f"{part}.n_outputs is for reward models"),
        (config.max_seq_len < LONGEST_DOCUMENT,
         f"{part}.max_seq_len must be at least {LONGEST_DOCUMENT}, for the corpus"),
        (run.corpus.drill * DRILL_STEP > config.max_seq_len,
         f"corpus.drill exceeds the {config.max_seq_len // DRILL_STEP} steps that fit into "
         f"{part}.max_seq_len, {config.max_seq_len} tokens: lower the first or raise the second"),
        _too_long(run.zero.max_new_tokens, "zero", config, part)]


def _too_long(max_new_tokens, stage, config, part):
    """(whether a stage's prompts and answers may exceed the model's length, message)."""
    room = config.max_seq_len - LONGEST_PROMPT
    return (max_new_tokens > room,
            f"{stage}.max_new_tokens exceeds the {room} tokens that {part}.max_seq_len leaves "
            "beside a prompt: lower the first or raise the second")


def size_rules(config, part):
    """[(whether it is broken, message)] of a model's sizes; part: what the message calls it."""
    c = config
    experts_in_reach = c.n_limited_groups * (c.n_routed_experts // c.n_expert_groups)
    return [
        ((c.qk_rope_head_dim | c.qk_nope_head_dim | c.kv_lora_rank) % 2, f"{part}: "
         "qk_rope_head_dim, qk_nope_head_dim, kv_lora_rank must be even: pairs are rotated"),
        (c.dim % 8 or c.moe_inter_dim % 8,
         f"{part}: dim and moe_inter_dim must be multiples of 8"),
        (c.n_dense_layers > c.n_layers, f"{part}: n_dense_layers exceeds n_layers"),
        (c.n_mtp_layers not in (0, 1), f"{part}: n_mtp_layers must be 0 or 1"),
        (c.n_routed_experts % c.n_expert_groups,
         f"{part}: n_expert_groups must divide the number of experts"),
        (c.n_routed_experts < 2 * c.n_expert_groups,
         f"{part}: n_expert_groups: a group needs at least 2 experts"),
        (c.n_limited_groups > c.n_expert_groups,
         f"{part}: n_limited_groups exceeds n_expert_groups"),
        (c.n_activated_experts > experts_in_reach,
         f"{part}: n_activated_experts exceeds the experts that a token may use")]


def _rl_rules(run, part, s):
    """[(whether it is broken, message)] of the settings of an RL stage."""
    return [
        (s.overlong >= s.max_new_tokens, f"{part}.overlong must be below max_new_tokens"),
        (not 2 <= min(s.levels) <= max(s.levels) <= 7,
         f"{part}.levels must be within 2..7: single steps are in the drills, so not held out"),
        (s.group_size < 2, f"{part}.group_size must be at least 2: an advantage compares answers"),
        (s.minibatches > s.problems * s.group_size,
         f"{part}.minibatches exceeds the number of answers"),
        (s.temperature < COLDEST_RL, f"{part}.temperature must be at least {COLDEST_RL}: RL "
         "needs different answers, and divides the logits by the temperature"),
        (max(s.general, s.general_from, s.length_from) > 1,
         f"{part}.general, general_from and length_from must be at most 1"),
        _too_long(s.max_new_tokens, part, run.model, "model"),
        _too_long(s.max_new_tokens, part, run.student, "student")]
