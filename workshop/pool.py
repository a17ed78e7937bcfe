"""Twenty laptops, twenty seeds: joins the lines that the class has sent into one result.

    python workshop/pool.py lines.txt     the lines of a file, as they were pasted into it
    python workshop/pool.py               the lines that are typed or pasted; Ctrl-D ends them

Each student runs one seed: `python workshop/measure.py plain --seed 7`. The run ends with a
line such as

    r1mini | plain | seed 7 | pass@1 0=0.15 3=0.34 | length 0=37 3=53

It may stand anywhere in a chat's text. pool.py prints the mean and the standard deviation
over seeds, and what may be said of the differences. If matplotlib is installed, it draws
them into runs/workshop/figures/pool.png.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.errors import UserError
from tools.compare import compare
from tools.figures import Picture, write_picture
from tools.tables import table
from workshop.pictures import SHARES, curves_panel, summarise_steps

KEYS = ("pass@1", "length")  # of a line
LINE = re.compile(r"r1mini \| ([^|]+) \| seed (\d+)((?: \| \S+(?: \d+=\d+(?:\.\d+)?)+)+)")
PART = re.compile(r"\| (\S+)((?: \d+=\S+)+)")


def line_of(name, seed, curves):
    """The line of a run. curves: {key: {step: value}}."""
    parts = [" ".join([key, *(f"{step}={value:.4g}" for step, value in curves[key].items())])
             for key in KEYS]
    return " | ".join(["r1mini", name, f"seed {seed}", *parts])


def _read_lines(text):
    """{run: {key: {seed: {step: value}}}} of the lines in a text. Says which lines cannot be
    read, and which seeds came twice; the later line counts. UserError if there is no line."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.search(line)
        if not match:
            if "| seed " in line or "r1mini |" in line:  # a result, not talk
                print(f"line {number} cannot be read, and is left out: {line.strip()[:60]}")
            continue
        name, seed, parts = match.groups()
        for key, points in PART.findall(parts):
            seeds = found.setdefault(name, {}).setdefault(key, {})
            if seed in seeds and key == KEYS[0]:
                print(f"line {number}: {name} has seed {seed} twice; the later line counts")
            pairs = (point.split("=") for point in points.split())
            seeds[seed] = {int(step): float(value) for step, value in pairs}
    if not found:
        raise UserError("no line begins with `r1mini |`; a run of measure.py ends with one")
    return found


def _table_lines(found, key):
    """The table of one quantity: a row for each run, mean ± std at each step."""
    summaries = {name: summarise_steps(keys[key]) for name, keys in found.items() if key in keys}
    steps = sorted({step for at in summaries.values() for step in at})
    decimals = 3 if key in SHARES else 1
    body = []
    for name, at in summaries.items():
        cells = [f"{at[step]['mean']:.{decimals}f} ± {at[step]['std']:.{decimals}f}"
                 if step in at else "" for step in steps]
        body.append([name, str(len(found[name][key])), *cells])
    return table([f"{key}, after step", "seeds", *map(str, steps)], body)


def _claims(found, key="pass@1"):
    """What may be said of the runs' last values, each against the plain run, over the seeds that
    both have (tools/compare.py). Without a plain run the first one of the text takes its place."""
    last = {name: list(summarise_steps(keys[key]).values())[-1]
            for name, keys in found.items() if key in keys}
    first = "plain" if "plain" in last else next(iter(last))
    others = [name for name in last if name != first]
    lines = []
    for name in others:
        comparison = compare(last, first, name)
        said = comparison.text(points=True) if comparison else "no seed ran both"
        lines.append(f"{key} at the end, {name} minus {first}: {said}")
    return lines


def _picture_of(found):
    """The Picture of a class: right answers and length."""
    panels = []
    for key in KEYS:
        runs = {name: keys[key] for name, keys in found.items() if key in keys}
        ends = [list(summarise_steps(seeds).values())[-1] for seeds in runs.values()]
        texts = [f"{x['mean']:.0%}" if key in SHARES else f"{x['mean']:.0f}" for x in ends]
        unit = "right" if key in SHARES else "tokens"
        panels.append(curves_panel(f"{' and '.join(texts)} {unit}\nat the end", key, runs))
    seeds = {seed for keys in found.values() for seeds in keys.values() for seed in seeds}
    return Picture(panels, f"{len(seeds)} seeds; mean, band of one standard deviation")


def main(words):
    """Joins the lines of a file, or of the input. Returns 0, or 2 for what the user can
    correct."""
    try:
        if len(words) > 1:
            raise UserError("give one file: python workshop/pool.py lines.txt")
        text = Path(words[0]).read_text("utf-8") if words else sys.stdin.read()
        found = _read_lines(text)
        for key in KEYS:
            print("\n".join([*_table_lines(found, key), ""]))
        print("\n".join(_claims(found)))
        if write_picture(ROOT / "runs" / "workshop", "pool", _picture_of(found)):
            print("drawn: runs/workshop/figures/pool.png")
        else:
            print("no picture: pip install matplotlib draws one")
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"pool: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
