#!/usr/bin/env bash
# The one entry for people: ./build.sh demo | test.  Each command is a function command_NAME below, and its first comment
# line is what the usage prints. Works on a fresh Debian 12/13; elsewhere it says what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# --- vocabulary: what the commands say and how they fail ---

say()  { printf '%s\n' "$@"; }       # one line for each argument
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
    "$directory/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        --require-hashes --only-binary=:all: -r "$requirements" \
        || { rm -rf "$directory"; fail "pip could not install $requirements"; }
    printf '%s\n' "$stamp" > "$directory/made-from"
}

# --- demo: server, agent and a played fleet on this machine ---

DEMO=$PWD/.demo
demo_children=""    # process ids, the last started first
demo_owner=no       # is .demo/pid ours?

demo_usage() {
    say "Usage: ./build.sh demo [--fleet N] [--interval SECONDS] [--port PORT]"
    say "  --fleet N            also play N recorded Proxmox hosts (1-2000)"
    say "  --interval SECONDS   how often the played hosts report (default 30)"
    say "  --port PORT          this port and no other (default: 4000, or the next free one)"
}

# A whole number from $2 to $3, or the usage's exit code.
demo_number() {
    case $4 in ''|*[!0-9]*|??????*) ;; *) [ "$4" -lt "$2" ] || [ "$4" -gt "$3" ] || return 0 ;; esac
    printf 'build.sh: %s needs a number from %s to %s\n' "$1" "$2" "$3" >&2
    demo_usage >&2
    exit 2
}

demo_options() {
    fleet=0 interval=30 port=""
    while [ $# -gt 0 ]; do
        case $1 in
            --fleet)    demo_number "$1" 1 2000 "${2:-}";  fleet=$2; shift 2 ;;
            --interval) demo_number "$1" 1 3600 "${2:-}";  interval=$2; shift 2 ;;
            --port)     demo_number "$1" 1 65535 "${2:-}"; port=$2; shift 2 ;;
            -h|--help)  demo_usage; exit 0 ;;
            *)          demo_usage >&2; exit 2 ;;
        esac
    done
}

# The first free port from 4000 on; a port that was asked for has to be free.
demo_port() {
    "$python" - "$port" <<'PYTHON' || fail "port ${port:-4000} is taken; name another with --port"
import socket, sys
for port in [int(sys.argv[1])] if sys.argv[1] else range(4000, 4050):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    sys.exit(0)
sys.exit(1)
PYTHON
}

# demo_start NAME COMMAND…: in the background, its output in .demo/NAME.log. (Ctrl-C reaches this script alone:
# the shell starts background jobs with SIGINT ignored, and demo_stop ends them in order.)
demo_start() {
    local name=$1
    shift
    "$@" >> "$DEMO/$name.log" 2>&1 < /dev/null &
    demo_children="$! $demo_children"
}

demo_stop() {
    local code=$? child
    trap - EXIT
    trap '' INT TERM HUP
    for child in $demo_children; do
        kill "$child" 2>/dev/null || continue
        wait "$child" 2>/dev/null || true
    done
    [ "$demo_owner" = no ] || rm -f "$DEMO/pid"
    [ -z "$demo_children" ] || say "" "Stopped. What was collected is kept in .demo/ for the next time."
    exit "$code"
}

# Until one of them ends by itself, which none of them should.
demo_watch() {
    local child
    while true; do
        for child in $demo_children; do
            kill -0 "$child" 2>/dev/null || return 0
        done
        sleep 1 &
        wait $! || true     # a trap runs at once during wait, but only after a sleep in the foreground
    done
}

demo_wait_for_server() {
    "$python" - "$url" "$1" <<'PYTHON' || { tail -n 5 "$DEMO/server.log" >&2; fail "the server did not start; see .demo/server.log"; }
import os, sys, time, urllib.request
url, server = sys.argv[1], int(sys.argv[2])
for _ in range(300):
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + "/healthz", timeout=2)
        sys.exit(0)
    except OSError:
        time.sleep(0.1)
    try:
        os.kill(server, 0)
    except ProcessLookupError:
        break
sys.exit(1)
PYTHON
}

# A token for NAME: kept from the last time, else from register-host (or rotate-token, when only the token was lost).
demo_host_token() {
    local name=$1 file=$DEMO/host-token
    if [ "$(sed -n 1p "$file" 2>/dev/null)" != "$name" ]; then
        { say "$name"
          { "$python" server.py register-host "$name" 2>/dev/null || "$python" server.py rotate-token "$name"; } \
            | sed -n 's/^TOKEN: //p'; } > "$file.new"
        mv "$file.new" "$file"
    fi
    sed -n 2p "$file"
}

demo_agent_config() {
    printf 'server_url = "%s"\ntoken = "%s"\nhost_id = "%s"\n\n[intervals]\nfast_seconds = 10\nmedium_seconds = 60\n' \
        "$url" "$2" "$1" > "$DEMO/agent.toml"
}

# A new admin token for the fleet's player in each run; it registers the hosts it plays.
demo_fleet_token() {
    "$python" server.py revoke-api-token demo-fleet >/dev/null 2>&1 || true
    "$python" server.py create-api-token demo-fleet --admin | sed -n 's/^TOKEN: //p'
}

demo_prepare() {
    umask 077
    mkdir -p "$DEMO/agent-state"
    if [ -s "$DEMO/pid" ] && kill -0 "$(cat "$DEMO/pid")" 2>/dev/null; then
        fail "a demo of this folder runs already (process $(cat "$DEMO/pid"))"
    fi
    say $$ > "$DEMO/pid"
    demo_owner=yes
    make_venv "$DEMO/venv" requirements.txt
    python=$DEMO/venv/bin/python
    port=$(demo_port)
    url=http://127.0.0.1:$port
    [ -s "$DEMO/password" ] || "$python" -c 'import secrets; print(secrets.token_urlsafe(9))' > "$DEMO/password"
    export DATABASE_PATH=$DEMO/monitor.db LISTEN=127.0.0.1 PORT=$port PUBLIC_URL=$url PYTHONUNBUFFERED=1
    unset SECRET_KEY_BASE SERVER_CONFIG HISTORY_URL TRUSTED_PROXY AGENT_CONFIG NOTIFY_SOCKET
    DASHBOARD_PASSWORD_HASH=$("$python" server.py hash-password < "$DEMO/password")
    export DASHBOARD_PASSWORD_HASH
    "$python" server.py migrate >> "$DEMO/server.log" 2>&1 || fail "$(tail -n 1 "$DEMO/server.log")"
}

command_demo() {  # start server and agent here, with data in .demo/ (--fleet N: and N played Proxmox hosts)
    local fleet interval port url python name token server
    demo_options "$@"
    trap demo_stop EXIT
    trap 'exit 0' INT TERM HUP      # the way a demo ends
    demo_prepare
    name=$("$python" -c 'import re, socket
name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().split(".")[0]).lstrip("._-")
print(name[:63] or "this-machine")')
    demo_start server "$python" server.py serve
    server=${demo_children%% *}
    demo_wait_for_server "$server"
    token=$(demo_host_token "$name")
    [ -n "$token" ] || fail "could not register this machine"
    demo_agent_config "$name" "$token"
    STATE_DIRECTORY=$DEMO/agent-state demo_start agent "$python" agent.py start --config "$DEMO/agent.toml"
    if [ "$fleet" -gt 0 ]; then
        FLEET_API_TOKEN=$(demo_fleet_token) demo_start fleet "$python" tests/fleet.py --server "$url" \
            --state "$DEMO/fleet.json" --count "$fleet" --interval "$interval"
    fi
    say "" "  URL:      $url" "  Password: $(cat "$DEMO/password")" "" \
        "This machine reports as '$name'. Logs and data are in .demo/. Ctrl-C stops everything."
    demo_watch
    fail "one of the processes has ended; see the logs in .demo/"
}

# --- test ---

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

# --- dispatch ---

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
