#!/bin/sh
# Install, upgrade or remove the agent on a Proxmox VE host (Debian 12/13 with systemd), as root:
#
#   curl -fsSL @SERVER_URL@/install/install.sh | sh -s -- --host pve-host-01
#
# Asks for the token without showing it, or takes it from $TOKEN or --token-file. Run again, it upgrades: what the
# config says is kept. There is no secret in this file. All of it is functions, so that a download cut off does nothing.

server_url="@SERVER_URL@"
name=proxmox-monitor-agent
program=/usr/local/bin/$name
unit=/etc/systemd/system/$name.service
config=/etc/proxmox-monitor/agent.toml

usage() {
    cat <<'USAGE'
Usage: install.sh --host NAME [--server URL] [--ca-file FILE] [--token-file FILE] [--new-token] [--plain]
                  [--no-start]
       install.sh --uninstall [--purge]

  --host NAME        the name the host was registered by (kept from the config when run again)
  --server URL       the server's address, if not the one this file came from
  --ca-file FILE     the certificate of a private CA that signed the server's
  --token-file FILE  where the token stands (else $TOKEN, else the config of last time, else it is asked for)
  --new-token        ask for the token also when the config has one (after rotate-token)
  --plain            agent.py with this host's own Python (3.11 or newer) in place of the frozen binary
  --no-start         put everything in its place, start nothing
  --uninstall        stop and remove the agent; config and unsent reports stay, unless --purge is given too
USAGE
}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

main() {
    set -eu
    umask 077
    host="" ca_file="" token_file="" new_token=no plain=no start=yes uninstall=no purge=no
    while [ $# -gt 0 ]; do
        case $1 in
            --host) host=${2:-}; shift ;;
            --server) server_url=${2:-}; shift ;;
            --ca-file) ca_file=${2:-}; shift ;;
            --token-file) token_file=${2:-}; shift ;;
            --new-token) new_token=yes ;;
            --plain) plain=yes ;;
            --no-start) start=no ;;
            --uninstall) uninstall=yes ;;
            --purge) purge=yes ;;
            -h | --help) usage; exit 0 ;;
            *) usage >&2; exit 2 ;;
        esac
        [ $# -gt 0 ] || { usage >&2; exit 2; }
        shift
    done
    [ "$(id -u)" = 0 ] || fail "run this as root"
    [ "$uninstall" = no ] || { remove_all; exit 0; }
    check_machine
    read_old_config
    check_settings
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 1' HUP INT TERM
    download_all
    ask_token
    install_program
    write_config
    install_unit
    if [ "$start" = no ]; then
        say "Installed, not started: systemctl enable --now $name"
    else
        start_and_wait
    fi
}

# --- what is asked for, and what is there ---

check_machine() {
    [ "$(uname -s)" = Linux ] || fail "this is for Linux; see docs/install-agent.md"
    for tool in curl sha256sum awk sed install; do
        command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install curl coreutils mawk sed"
    done
    [ "$start" = no ] || command -v systemctl >/dev/null || fail "no systemd here: use --no-start and see docs/install-agent.md"
}

# What a config of last time says; a flag given now counts more.
read_old_config() {
    old_token=""
    [ -e "$config" ] || return 0
    [ -n "$host" ] || host=$(old_setting host_id)
    [ -n "$ca_file" ] || ca_file=$(old_setting ca_file)
    [ "$host" != "$(old_setting host_id)" ] || old_token=$(old_setting token)   # a token is one host's
}

old_setting() {
    awk -v key="$1" '/^[ \t]*\[/ { exit } $1 == key || index($1, key "=") == 1 { print; exit }' "$config" |
        sed -n "s/^[^=]*=[[:space:]]*[\"']\([^\"']*\)[\"'].*/\1/p"
}

check_settings() {
    case $server_url in
        https://?* | http://127.* | http://localhost* | "http://[::1]"*) ;;
        http://*) fail "$server_url: only https, except for an address of this machine" ;;
        *) fail "--server needs the server's address: https://monitor.example.com" ;;
    esac
    case $server_url in *[!A-Za-z0-9.:/_~%@\[\]-]*) fail "--server: $server_url is not an address" ;; esac
    server_url=${server_url%/}
    case $host in
        "") fail "--host NAME is missing: the name the host was registered by" ;;
        [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) fail "--host: 1-63 of a-z A-Z 0-9 . _ -, beginning with a letter or digit" ;;
    esac
    [ "${#host}" -le 63 ] || fail "--host: at most 63 characters"
    case $ca_file in
        "") ;;
        /*) [ -r "$ca_file" ] || fail "--ca-file: $ca_file cannot be read" ;;
        *) fail "--ca-file needs the whole path, from / on" ;;
    esac
    case $ca_file in *[!A-Za-z0-9./_+-]*) fail "--ca-file: a path of letters, digits and . _ + - only" ;; esac
}

# The token never stands in a command line, which every user of the machine could read.
ask_token() {
    token=${TOKEN:-}
    unset TOKEN
    if [ -n "$token_file" ]; then
        token=$(cat "$token_file") || fail "--token-file: $token_file cannot be read"
    fi
    [ -n "$token" ] || [ "$new_token" = yes ] || token=$old_token
    if [ -z "$token" ]; then
        # Standard input is this script, when it comes through a pipe.
        { true < /dev/tty; } 2>/dev/null || fail "no token: set TOKEN, or give --token-file FILE"
        printf 'Token of %s (whsec_…, not shown): ' "$host" > /dev/tty
        saved=$(stty -g < /dev/tty)
        trap 'stty "$saved" < /dev/tty; rm -rf "$folder"' EXIT
        stty -echo < /dev/tty
        IFS= read -r token < /dev/tty || true
        stty "$saved" < /dev/tty
        trap 'rm -rf "$folder"' EXIT
        printf '\n' > /dev/tty
    fi
    token=$(printf '%s' "$token" | tr -d '[:space:]')
    case $token in
        whsec_*) ;;
        *) fail "a token begins with whsec_ (the server's register-host prints it)" ;;
    esac
    case ${token#whsec_} in "" | *[!A-Za-z0-9+/=]*) fail "the token is not whole: what follows whsec_ is base64" ;; esac
}

# --- the files ---

fetch() {
    set -- "$1" "$folder/$1"
    curl --fail --silent --show-error --location --connect-timeout 10 --retry 2 \
        ${ca_file:+--cacert "$ca_file"} --output "$2" "$server_url/install/$1" ||
        fail "cannot get $server_url/install/$1"
}

fetch_checked() {
    fetch "$1"
    grep "  $1\$" "$folder/SHA256SUMS" > "$folder/one" || fail "the server's SHA256SUMS does not name $1"
    (cd "$folder" && sha256sum --check --status one) || fail "$1 does not have its checksum: nothing was changed; try again"
}

download_all() {
    fetch SHA256SUMS
    case $(uname -m) in
        x86_64) binary=${name}_linux_amd64 ;;
        aarch64) binary=${name}_linux_arm64 ;;
        *) binary=none ;;
    esac
    if [ "$plain" = no ] && ! grep -q "  $binary\$" "$folder/SHA256SUMS"; then
        say "The server has no frozen agent for $(uname -m); using agent.py with this host's Python."
        plain=yes
    fi
    if [ "$plain" = yes ]; then
        binary=agent.py
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
            fail "agent.py needs Python 3.11 or newer: apt-get install python3"
    fi
    fetch_checked "$binary"
    fetch_checked "$name.service"
}

# Put beside, tried, then renamed: a file under the final name is always whole. The last one is kept for going back.
install_program() {
    install -d -m 0755 "${program%/*}"
    install -m 0755 "$folder/$binary" "$program.new"
    told=$("$program.new" version 2>&1) || { rm -f "$program.new"; fail "the agent does not run on this machine: $told"; }
    if [ -e "$program" ] && ! cmp -s "$program" "$program.new"; then
        ln -f "$program" "$program.previous" 2>/dev/null || cp -p "$program" "$program.previous"
    fi
    mv "$program.new" "$program"
    say "Installed: $told"
}

# The four settings of this script, then whatever else the config had.
write_config() {
    install -d -m 0700 "${config%/*}"
    {
        printf 'server_url = "%s"\nhost_id = "%s"\ntoken = "%s"\n' "$server_url" "$host" "$token"
        [ -z "$ca_file" ] || printf 'ca_file = "%s"\n' "$ca_file"
        [ ! -e "$config" ] || awk '
            /^[ \t]*\[/ { table = 1 }
            !table && /^[ \t]*(server_url|host_id|token|token_file|ca_file)[ \t]*=/ { next }
            { print }' "$config"
    } > "$config.new"
    chmod 0600 "$config.new"
    mv "$config.new" "$config"
}

install_unit() {
    install -d -m 0755 "${unit%/*}"
    install -m 0644 "$folder/$name.service" "$unit.new"
    mv "$unit.new" "$unit"
}

# --- start, and until the server has accepted a report ---

start_and_wait() {
    systemctl daemon-reload
    systemctl --quiet enable "$name"
    systemctl restart "$name" || { show_trouble; fail "the agent does not start"; }
    say "Started. Waiting for the server to accept a report …"
    waited=0
    while [ "$waited" -lt 60 ]; do
        if journal | grep -q "reporter: accepted host:$host\$"; then
            say "reporter: accepted host:$host" "The host is on the page now: $server_url"
            return 0
        fi
        sleep 1
        waited=$((waited + 1))
    done
    show_trouble
    fail "the server has accepted nothing within a minute; the agent runs on and keeps trying"
}

journal() {
    journalctl --no-pager --quiet --output cat "_SYSTEMD_INVOCATION_ID=$(systemctl show --property InvocationID --value "$name")"
}

show_trouble() {
    say "--- the agent's log ---"
    journal | tail -n 15 || true
    say "--- $name check ---"
    "$program" check || true
}

# --- removal ---

remove_all() {
    if command -v systemctl >/dev/null; then
        systemctl --quiet disable --now "$name" 2>/dev/null || true
    fi
    rm -f "$unit" "$program" "$program.previous" "$program.new"
    rm -rf "/etc/systemd/system/$name.service.d" "/var/cache/$name"
    if command -v systemctl >/dev/null; then systemctl daemon-reload || true; fi
    if [ "$purge" = yes ]; then
        rm -rf "$config" "/var/lib/$name"
        rmdir "${config%/*}" 2>/dev/null || true
        say "Removed, with its config and state."
    else
        say "Removed. $config and /var/lib/$name are kept (--purge removes them too)."
    fi
    say "On the server: proxmox-monitor-server remove-host NAME"
}

main "$@"
