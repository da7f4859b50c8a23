#!/usr/bin/env bash
# The one entry for people: ./build.sh demo | test.  Each command is a function command_NAME below, and its first comment
# line is what the usage prints. Works on a fresh Debian 12/13; elsewhere it says what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# --- vocabulary: what the commands say and how they fail ---

say()  { printf '%s\n' "$*"; }
fail() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

usage() {
    say "Usage: ./build.sh COMMAND"
    sed -n 's/^command_\([a-z_]*\)() { *# \(.*\)/  \1\t\2/p' build.sh | expand -t 12
}

# --- tools: Python, its packages, and Debian's ---

# Programs the tests talk to, as "program:Debian package".
TEST_PROGRAMS="chromium:chromium caddy:caddy prometheus:prometheus promtool:prometheus
    victoria-metrics:victoria-metrics openssl:openssl curl:curl"
TEST_FONTS="fonts-dejavu-core fonts-liberation"    # without a font Chromium measures every text as 0 px wide

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    say "Installing from Debian: $*"
    # Debian starts services on installation (Caddy takes port 80): not wanted from a test run. 101 means "not allowed".
    local policy=/usr/sbin/policy-rc.d ours=no code=0
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy" && ours=yes
    fi
    { DEBIAN_FRONTEND=noninteractive apt-get -qq update \
        && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
            -o Dpkg::Use-Pty=0 install "$@" >/dev/null; } </dev/null || code=$?
    [ "$ours" = no ] || rm -f "$policy"
    return "$code"
}

install_test_programs() {
    local pair missing=""
    for pair in $TEST_PROGRAMS; do
        command -v "${pair%%:*}" >/dev/null || missing+=" ${pair#*:}"
    done
    if command -v dpkg-query >/dev/null; then
        for pair in $TEST_FONTS; do
            dpkg-query -W -f '${Status}' "$pair" 2>/dev/null | grep -q ' installed$' || missing+=" $pair"
        done
    fi
    [ -n "$missing" ] || return 0
    if can_apt; then
        # shellcheck disable=SC2086  # a list of package names
        apt_install $missing || fail "apt-get could not install:$missing"
    else
        say "Not root on Debian, so these are missing and their tests are left out:$missing"
    fi
}

# Python 3.11 or newer that can make a virtual environment. (Debian's python3 has no ensurepip without python3-venv.)
usable_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

find_python() {
    usable_python && return 0
    if can_apt; then
        apt_install python3 python3-venv >&2 || fail "apt-get could not install python3-venv"
        usable_python && return 0
    fi
    fail "needs Python 3.11 or newer with its venv module (Debian: apt-get install python3-venv)"
}

# make_venv DIRECTORY REQUIREMENTS: made once, and again whenever the requirements or the Python change.
make_venv() {
    local directory=$1 requirements=$2 python stamp
    python=$(find_python)
    stamp="$("$python" -VV) $("$python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$requirements")"
    if [ "$(cat "$directory/made-from" 2>/dev/null)" = "$stamp" ] && "$directory/bin/python" -c '' 2>/dev/null; then
        return 0
    fi
    say "Making a virtual environment in $directory ($("$python" -V))"
    rm -rf "$directory"
    mkdir -p "$(dirname "$directory")"
    "$python" -m venv "$directory"
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --require-hashes --only-binary=:all: -r "$requirements" \
        || { rm -rf "$directory"; fail "pip could not install $requirements"; }
    printf '%s\n' "$stamp" > "$directory/made-from"
}

# --- commands ---

command_test() {  # set up what the tests need and run all checks (more words go to pytest)
    install_test_programs
    make_venv .venv requirements-dev.txt
    local bin=$PWD/.venv/bin
    "$bin/ruff" check .
    "$bin/mypy" .
    # Two processes: the machine CI has is that wide. A selection of tests runs in one, with its output as it comes.
    if [ $# -gt 0 ]; then
        exec "$bin/python" -m pytest "$@"
    fi
    exec "$bin/python" -m pytest -n 2 --dist worksteal
}

command_help() {  # this list
    usage
}

main() {
    local name=${1:-help}
    [ $# -eq 0 ] || shift
    case $name in -h|--help) name=help ;; esac
    if [ "$(type -t "command_$name")" != function ]; then
        usage >&2
        exit 2
    fi
    "command_$name" "$@"
}

main "$@"
