#!/usr/bin/env bash
# The one entry for people: ./build.sh demo | test | all | release …  Each command is a function command_NAME below, and its first comment
# line is what the usage prints. Works on a fresh Debian 12/13; elsewhere it says what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# --- vocabulary: what the commands say and how they fail ---

say()  { printf '%s\n' "$@"; }       # one line for each argument
fail() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

command_help() {  # this list
    say "Usage: ./build.sh COMMAND"
    sed -n 's/^command_\([a-z_]*\)() { *# \(.*\)/  \1\t\2/p' build.sh | expand -t 12
}

# --- tools: Python, its packages, and Debian's ---

# Programs the tests talk to, as "program:Debian package".
TEST_PROGRAMS="chromium:chromium caddy:caddy prometheus:prometheus promtool:prometheus
    victoria-metrics:victoria-metrics openssl:openssl curl:curl git:git
    systemd-analyze:systemd systemd-nspawn:systemd-container mmdebstrap:mmdebstrap shellcheck:shellcheck ip:iproute2
    nsenter:util-linux"
# And what has no command of its own: fonts, without which Chromium measures every text as 0 px wide, and a library that
# Playwright's driver is linked with.
TEST_LIBRARIES="fonts-dejavu-core fonts-liberation libatomic1"

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    say "Installing from Debian: $*"
    # Debian starts services on installation (Caddy takes port 80): not wanted from a test run. 101 means "not allowed".
    # In a shell of its own, whose end takes that back whatever ends it: else no service of this machine would start again.
    (
        policy=/usr/sbin/policy-rc.d
        if [ ! -e "$policy" ]; then
            trap 'rm -f "$policy"' EXIT
            trap 'exit 130' INT TERM HUP
            printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy"
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update && apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 install "$@" >/dev/null
    ) </dev/null
}

install_test_programs() {
    local pair missing=""
    for pair in $TEST_PROGRAMS; do command -v "${pair%%:*}" >/dev/null || missing+=" ${pair#*:}"; done
    if command -v dpkg-query >/dev/null; then
        for pair in $TEST_LIBRARIES; do
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
        "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        command -v "$candidate" && return 0
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
    [ "$(cat "$directory/made-from" 2>/dev/null)" = "$stamp" ] && "$directory/bin/python" -c '' 2>/dev/null && return 0
    say "Making a virtual environment in $directory ($("$python" -V))"
    rm -rf "$directory" && mkdir -p "$(dirname "$directory")"
    "$python" -m venv "$directory"
    "$directory/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        --require-hashes --only-binary=:all: -r "$requirements" \
        || { rm -rf "$directory"; fail "pip could not install $requirements"; }
    printf '%s\n' "$stamp" > "$directory/made-from"
}

# --- demo: server, agent and a played fleet on this machine ---

command_demo() {  # start server and agent here, with data in .demo/ (--fleet N: and N played Proxmox hosts)
    local python
    python=$(find_python)
    exec "$python" tests/demo.py "$@"
}

command_venv() { make_venv "$@"; }      # tests/demo.py asks for it

# --- test ---

command_test() {  # set up what the tests need and run all checks (more words go to pytest)
    install_test_programs
    make_venv .venv requirements-dev.txt
    local bin=$PWD/.venv/bin
    "$bin/ruff" check .
    "$bin/mypy" .
    # Two processes: the machine CI has is that wide. A selection of tests runs in one, with its output as it comes.
    [ $# -eq 0 ] || exec "$bin/python" -m pytest "$@"
    exec "$bin/python" -m pytest -n 2 --dist worksteal
}

command_soak() {  # the long proofs: faults, load, attacks: soak [--minutes N] [PART…]
    make_venv .venv requirements-dev.txt
    exec .venv/bin/python tests/soak.py "$@"
}

command_mutate() {  # how many small mistakes in what must not be wrong the tests see: mutate [--most N] [PART…]
    make_venv .venv requirements-dev.txt
    exec .venv/bin/python tests/mutate.py "$@"
}

ADVISORIES=https://api.osv.dev/v1/query

command_audit() {  # ask the advisory database about the pinned packages (--if-reachable: not red where it cannot be asked)
    if ! curl -fsS -m 10 -o /dev/null -d '{"package": {"name": "bottle", "ecosystem": "PyPI"}}' "$ADVISORIES" 2>/dev/null; then
        [ "${1:-}" = --if-reachable ] || fail "audit: nothing was checked: $ADVISORIES gives no answer"
        say "audit: NOT CHECKED, the pinned packages may have known holes: $ADVISORIES gives no answer"
        return 0
    fi
    make_venv .build/audit packaging/requirements-audit.txt
    .build/audit/bin/pip-audit --strict --vulnerability-service osv --disable-pip --require-hashes -r requirements.txt \
        -r packaging/requirements-build.txt
}

# --- freeze: each program as one file, made in a Debian 12 root of its own ---

# Debian 12 is the oldest a Proxmox VE with support stands on; what is linked there runs on Debian 13 too.
BUILD_SUITE=bookworm
BUILD_PACKAGES=python3,libpython3.11,binutils,python3-pip-whl,ca-certificates
ROOTS=${BUILD_ROOTS:-$PWD/.build/roots}

machine_arch() {
    case $(uname -m) in
        x86_64|amd64) say amd64 ;;
        aarch64|arm64) say arm64 ;;
        *) uname -m ;;
    esac
}

# Where this machine takes Debian from, for another suite: "deb URI SUITE COMPONENT" lines.
debian_sources() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' \
        | sed -nE "s/^([^ ]+) (bookworm|trixie)(-security|-updates)? main\$/deb \1 $1\3 main/p" | sort -u
}

# How this machine's apt is set to fetch (proxy, clocks), as options for mmdebstrap.
apt_options() {
    apt-config dump Acquire | grep -iE '^Acquire::(Check-|https?::|Retries)' || true
}

# make_root DIRECTORY SUITE ARCH PACKAGES: a minimal Debian, whole or not at all.
make_root() {
    local directory=$1 suite=$2 arch=$3 packages=$4 sources line options=()
    [ ! -e "$directory/etc/debian_version" ] || return 0
    can_apt || fail "needs root on Debian to make a Debian root; elsewhere: ./build.sh docker"
    command -v mmdebstrap >/dev/null && [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] \
        || apt_install mmdebstrap debian-archive-keyring >&2 || fail "apt-get could not install mmdebstrap"
    [ "$arch" = "$(machine_arch)" ] || emulate "$arch"
    sources=$(debian_sources "$suite")
    [ -n "$sources" ] || { apt-get -qq update && sources=$(debian_sources "$suite"); }
    [ -n "$sources" ] || fail "apt has no Debian source on this machine to take $suite from"
    while IFS= read -r line; do [ -z "$line" ] || options+=("--aptopt=$line"); done <<< "$(apt_options)"
    say "Making a Debian root: $suite for $arch" >&2
    rm -rf "$directory.partial"
    mkdir -p "$(dirname "$directory")"
    mmdebstrap --quiet --variant=minbase --architectures="$arch" --include="$packages" "${options[@]}" \
        "$suite" "$directory.partial" - <<< "$sources" >&2 || fail "mmdebstrap could not make $suite for $arch"
    mv "$directory.partial" "$directory"
}

# Let the kernel start programs of another architecture by qemu. (Flag F: the emulator is opened now, so that it needs
# no copy inside the root.)
emulate() {
    local machine=aarch64 line
    [ "$1" = arm64 ] || fail "cannot emulate $1"
    command -v "qemu-$machine-static" >/dev/null || apt_install qemu-user-static arch-test >&2 \
        || fail "apt-get could not install qemu-user-static"
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc \
        || fail "cannot mount binfmt_misc"
    [ ! -e "/proc/sys/fs/binfmt_misc/qemu-$machine" ] || return 0
    line=$(sed -n '/^:/p' "/usr/lib/binfmt.d/qemu-$machine.conf")
    printf '%s' "$line" > /proc/sys/fs/binfmt_misc/register || fail "the kernel does not take the emulator"
}

# The wheels for ARCH, by their hashes; the root has no network.
fetch_wheels() {
    local arch=$1 directory=$2 machine python
    case $arch in amd64) machine=x86_64 ;; arm64) machine=aarch64 ;; *) fail "amd64 or arm64, not $arch" ;; esac
    [ ! -e "$directory/complete" ] || return 0
    python=$(find_python)
    [ -x .build/pip/bin/pip ] || "$python" -m venv .build/pip
    rm -rf "$directory"
    .build/pip/bin/python -m pip download --quiet --disable-pip-version-check --no-input --no-deps \
        --only-binary=:all: --platform "manylinux2014_$machine" --platform "manylinux_2_28_$machine" \
        --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none --require-hashes \
        --dest "$directory" -r requirements.txt -r packaging/requirements-build.txt >&2 \
        || fail "pip could not fetch what the build needs"
    touch "$directory/complete"
}

# The one date in everything that is built: of the commit, or of this file in an unpacked release.
source_date() {
    if [ -n "${SOURCE_DATE_EPOCH:-}" ]; then say "$SOURCE_DATE_EPOCH"
    else git log -1 --format=%ct 2>/dev/null || stat -c %Y build.sh
    fi
}

FROZEN_FROM="agent.py server.py schema.sql requirements.txt templates packaging systemd"

# What a frozen file follows from: sources, date, and the packages in the root.
frozen_stamp() {
    # shellcheck disable=SC2086  # a list of names
    { source_date; find $FROZEN_FROM -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
      cat "$1/var/lib/dpkg/status"; } | sha256sum | cut -d' ' -f1
}

# freeze ARCH FRESH PROGRAM…: into dist/, where what is up to date already is left alone.
freeze() {
    local arch=$1 fresh=$2 root program wheels stamp
    shift 2
    if [ "$(uname -s)" != Linux ]; then freeze_here "$@"; return; fi
    mkdir -p .build dist "$ROOTS"
    exec 9> "$ROOTS/lock-$arch"
    flock 9
    root=$ROOTS/build-$BUILD_SUITE-$arch
    [ "$fresh" = no ] || rm -rf "$root"
    make_root "$root" "$BUILD_SUITE" "$arch" "$BUILD_PACKAGES"
    wheels=.build/wheels-$arch-$(cat requirements.txt packaging/requirements-build.txt | sha256sum | cut -c1-12)
    stamp=$(frozen_stamp "$root")
    for program in "$@"; do
        if [ "$fresh" = yes ] || [ "$(cat ".build/frozen-$program-$arch" 2>/dev/null)" != "$stamp" ] \
            || [ ! -e "dist/proxmox-monitor-${program}_linux_$arch" ]; then
            fetch_wheels "$arch" "$wheels"
            freeze_in "$root" "$arch" "$program" "$wheels"
            say "$stamp" > ".build/frozen-$program-$arch"
        fi
        say "dist/proxmox-monitor-${program}_linux_$arch ($(stat -c %s "dist/proxmox-monitor-${program}_linux_$arch") bytes)"
    done
    write_sums
    exec 9>&-
}

write_sums() {
    (cd dist && sha256sum proxmox-monitor-*_linux_* > SHA256SUMS.$$ && mv SHA256SUMS.$$ SHA256SUMS)
}

# In the root, cut off from the network, with nothing of an earlier build in it.
freeze_in() {
    local root=$1 arch=$2 program=$3 wheels=$4
    say "Freezing $program for $arch" >&2
    rm -rf "$root/build"
    mkdir -p "$root/build/src" "$root/build/wheels"
    # shellcheck disable=SC2086  # a list of names
    cp -R $FROZEN_FROM "$root/build/src/"
    cp "$wheels"/*.whl "$root/build/wheels/"
    unshare --net chroot "$root" /bin/sh /build/src/packaging/freeze.sh "$program" "$arch" "$(source_date)" >&2 \
        || fail "freezing $program for $arch failed"
    mkdir -p dist/LICENSES
    cp "$root/build/out/LICENSES-$program"/*.txt dist/LICENSES/
    rm -rf "$root/build/out/LICENSES-$program"
    cp -p "$root/build/out"/* dist/
}

# On a Mac: a binary for a look at this machine, by its own Python. Not reproducible, and not for a release. (What bash
# 3.2 does not know is not used on this way: an empty array counts as unset there.)
freeze_here() {
    local system program
    system=$(uname -s | tr '[:upper:]' '[:lower:]')_$(machine_arch)
    cat requirements.txt packaging/requirements-build.txt > .build/requirements-here.txt
    make_venv .build/venv-here .build/requirements-here.txt
    for program in "$@"; do
        local data=()
        [ "$program" = agent ] || data=(--add-data "$PWD/schema.sql:." --add-data "$PWD/templates:templates"
            --add-data "$PWD/packaging/install.sh:packaging" --add-data "$PWD/agent.py:."
            --add-data "$PWD/systemd:systemd" --hidden-import _cffi_backend)
        .build/venv-here/bin/python -m PyInstaller --noconfirm --log-level ERROR --onefile \
            --name "proxmox-monitor-${program}_$system" --distpath dist --workpath .build/here --specpath .build/here \
            ${data[@]+"${data[@]}"} "$PWD/$program.py" || fail "PyInstaller could not freeze $program"
        say "dist/proxmox-monitor-${program}_$system: for a try on this machine alone"
    done
}

freeze_command() {
    local programs=$1 arch fresh=no
    arch=$(machine_arch)
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --arch)  arch=${2:-}; shift; [ $# -gt 0 ] || fail "--arch needs amd64 or arm64" ;;
            --fresh) fresh=yes ;;
            *)       printf 'Usage: ./build.sh agent|server|all [--arch amd64|arm64] [--fresh]\n' >&2; exit 2 ;;
        esac
        shift
    done
    case $(uname -s)-$arch in
        Linux-amd64|Linux-arm64|Darwin-*) ;;
        *) printf 'build.sh: --arch: amd64 or arm64, not %s\n' "$arch" >&2; exit 2 ;;
    esac
    mkdir -p .build dist "$ROOTS"
    # shellcheck disable=SC2086  # a list of names
    freeze "$arch" "$fresh" $programs
}

command_agent() {  # freeze the agent into dist/ (--arch amd64|arm64, --fresh: in a new Debian root)
    freeze_command agent "$@"
}

command_server() {  # freeze the server into dist/
    freeze_command server "$@"
}

command_all() {  # freeze both
    freeze_command "agent server" "$@"
}

command_docker() {  # freeze both for amd64 and arm64 by docker buildx
    command -v docker >/dev/null && docker buildx version >/dev/null 2>&1 || fail "needs Docker with buildx"
    rm -rf .build/docker
    docker buildx build --platform linux/amd64,linux/arm64 --build-arg "EPOCH=$(source_date)" \
        --file packaging/Dockerfile --output type=local,dest=.build/docker . || fail "docker buildx failed"
    mkdir -p dist/LICENSES
    cp -p .build/docker/linux_*/proxmox-monitor-* .build/docker/linux_*/build-environment_* dist/
    cp .build/docker/linux_*/LICENSES-*/*.txt dist/LICENSES/
    write_sums
}

command_root() {  # make a small Debian in DIRECTORY to try things in: root bookworm|trixie DIRECTORY [PACKAGE,…]
    [ $# -ge 2 ] || fail "Usage: ./build.sh root bookworm|trixie DIRECTORY [PACKAGE,…] [--arch ARCH]"
    make_root "$2" "$1" "${4:-$(machine_arch)}" "${3:-ca-certificates}"
}

# --- release: everything in one archive ---

# CHANGELOG.md's section of a version, or what is not released yet.
release_notes() {
    awk -v version="$1" '/^## / { on = ($2 == version || (version == "" && $2 == "Unreleased")); next } on' CHANGELOG.md
}

command_release() {  # make dist/proxmon-VERSION.tar.gz: binaries, units, docs, licences, sums (--arch amd64: one only)
    local version name stage notes arch arches="amd64 arm64" epoch
    [ "${1:-}" != --arch ] || arches=${2:-}
    version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' server.py)
    grep -qx "VERSION = \"$version\"" agent.py || fail "agent.py has another VERSION than server.py ($version)"
    notes=$(release_notes "$version")
    [ -n "$notes" ] || notes=$(release_notes "")
    [ -n "$notes" ] || fail "CHANGELOG.md says nothing about $version"
    for arch in $arches; do freeze_command "agent server" --arch "$arch"; done
    epoch=$(source_date) name=proxmon-$version stage=$PWD/.build/release/$name
    rm -rf .build/release
    mkdir -p "$stage"
    for arch in $arches; do cp -p dist/proxmox-monitor-*_linux_"$arch"* dist/build-environment_"$arch".txt "$stage/"; done
    cp -R agent.py server.py schema.sql templates systemd packaging Caddyfile.example docs build.sh requirements.txt \
        README.md CHANGELOG.md SECURITY.md LICENSE pyproject.toml "$stage/"
    cp -R dist/LICENSES "$stage/LICENSES"
    cp packaging/install.sh "$stage/install.sh"
    printf '# proxmon %s\n%s\n' "$version" "$notes" > "$stage/NOTES.md"
    find "$stage" -name __pycache__ -prune -exec rm -rf {} +
    # The private key that SIGNING_KEY names: what the hosts check (install.sh), and what no server has.
    [ -z "${SIGNING_KEY:-}" ] || ssh-keygen -y -f "$SIGNING_KEY" > "$stage/release-key" || fail "SIGNING_KEY: not an OpenSSH key"
    (cd "$stage" && find . -type f ! -name SHA256SUMS | sed 's|^\./||' | LC_ALL=C sort | xargs -d '\n' sha256sum > SHA256SUMS)
    [ -n "${SIGNING_KEY:-}" ] || say "Not signed: SIGNING_KEY names no OpenSSH key."
    [ -z "${SIGNING_KEY:-}" ] || ssh-keygen -q -Y sign -f "$SIGNING_KEY" -n proxmon "$stage/SHA256SUMS"
    tar --create --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
        --directory .build/release "$name" | gzip -9n > "dist/$name.tar.gz.partial"
    mv "dist/$name.tar.gz.partial" "dist/$name.tar.gz"
    cp "$stage/NOTES.md" "dist/$name-NOTES.md"
    say "dist/$name.tar.gz ($(stat -c %s "dist/$name.tar.gz") bytes, sha256 $(sha256sum "dist/$name.tar.gz" | cut -d' ' -f1))"
}

# --- dispatch ---

main() {
    local name=${1:-help}
    [ $# -eq 0 ] || shift
    case $name in -h|--help) name=help ;; esac
    [ "$(type -t "command_$name")" = function ] || { command_help >&2; exit 2; }
    "command_$name" "$@"
}

main "$@"
