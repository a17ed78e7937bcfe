#!/bin/sh
# Did a change of the code change its results? Runs one checkout and keeps what must stay the same.
#
#     sh tests/reference.sh CHECKOUT OUT [PYTHON]
#
# Run it for the code before and after a change, on one machine, then `diff -r BEFORE AFTER`.
# OUT gets the logs (they have no clock in them) of three runs, each in one process of one thread:
# all stages of the micro preset, 40 steps of nano's base, and 3 rollouts of Zero from
# results/checkpoints/0/base.pt; and rollout.json, the token ids of Zero's first rollout.
set -e
code=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
python=${3:-python}
common="--device cpu --processes 1 --threads 1"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$code"
"$python" r1mini.py all --preset micro $common --out "$work/micro"
"$python" r1mini.py base $common --out "$work/base" --set base.steps=40 eval.problems=8 \
    eval.samples=2 eval.longer=1
"$python" "$here/first_rollout.py" "$out/rollout.json" \
    zero --from results/checkpoints/0/base.pt $common --out "$work/zero" \
    --set zero.steps=3 zero.dev_every=3 eval.problems=8 eval.samples=2 eval.longer=1 data.prompts=1
for run in micro base zero; do
    cp "$work/$run/log.jsonl" "$out/$run.jsonl"
done
cp "$work"/micro/*.jsonl "$out/" && rm "$out/log.jsonl" "$out/timing.jsonl"
