#!/bin/sh
# A newcomer's path, timed: in an empty folder, from a clone to the first figure.
#     sh tests/newcomer.sh URL FOLDER > results/speed/newcomer.txt
# The commands are the README's, then two for figures; what they print goes to FOLDER/*.log.
set -e
url=$1
mkdir "$2"
cd "$2"
began=$(date +%s)
step() { # what, command
    before=$(date +%s)
    sh -ec "$2" > "$here/$(echo "$1" | tr -c 'a-z\n' _).log" 2>&1
    echo "$1: $(($(date +%s) - before)) s   $2"
}
here=$(pwd)
echo "$(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(date -u +%F)"
step "clone" "git clone $url r1mini"
cd r1mini
step "install" "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
step "the main job" ".venv/bin/python r1mini.py"
step "install matplotlib" ".venv/bin/pip install matplotlib"
step "the first figure" ".venv/bin/python r1mini.py report runs/nano && ls runs/nano/figures/figure1.png"
step "install what tests want" ".venv/bin/pip install -r requirements.txt '.[test]'"
step "the tests" ".venv/bin/python -m pytest"
echo "in all: $(($(date +%s) - began)) s"
