"""study: the runs behind a table, one after the other; what is finished is skipped."""
import r1mini
from extras.report import report
from grpo import OBJECTIVES, RL
from moe import UserError

# Each study is a list of runs: an output folder, and the words of its command.
OTHERS = [name for name in OBJECTIVES if name != RL.objective]
STUDIES = {
    "base": [(f"base-{seed}", f"base --seed {seed}") for seed in range(10)],
    "zero": [(f"zero-{seed}", f"zero --seed {seed}") for seed in range(3)] + [
        (f"{name}-{seed}", f"zero --seed {seed} --from runs/zero-{seed}/base.pt "
         f"--set zero.objective={name} eval.longer=1") for seed in range(3) for name in OTHERS],
}


def main(options):
    """Runs every command of a study into runs/, then reports on it."""
    if options.name not in STUDIES:
        raise UserError(f"study {options.name}: choose one of {', '.join(STUDIES)}")
    for folder, words in STUDIES[options.name]:
        print(f"== python r1mini.py {words} --out runs/{folder}", flush=True)
        code = r1mini.main([*words.split(), "--out", f"runs/{folder}", "--preset", options.preset,
                            *options.rest])
        if code:
            return code
    print(report([f"runs/{folder}" for folder, _ in STUDIES[options.name]],
                 f"results/{options.name}"))
    return 0
