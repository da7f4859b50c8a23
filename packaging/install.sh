#!/bin/sh
# Install, upgrade or remove the agent on a Proxmox VE host (Debian 12/13 with systemd), as root:
#
#   curl -fsSL @SERVER_URL@/install/install.sh | sh -s -- --host pve-host-01
#
# Asks for the token without showing it, or takes it from $TOKEN or --token-file. Run again, it upgrades: what the
# config says is kept. There is no secret in this file. All of it is functions, so that a download cut off does nothing.
# A copy stays on the host as proxmox-monitor-agent-install: upgrades by that one need no trust in the server, if the
# release is signed. The first installation fixes the signer's key.

server_url="@SERVER_URL@"
name=proxmox-monitor-agent
program=/usr/local/bin/$name
unit=/etc/systemd/system/$name.service
config=/etc/proxmox-monitor/agent.toml
release_key=/etc/proxmox-monitor/release-key
installer=/usr/local/sbin/$name-install

usage() {
    cat <<'USAGE'
Usage: install.sh --host NAME [--server URL] [--ca-file FILE] [--token-file FILE] [--new-token] [--plain]
                  [--release-key FILE] [--no-start]
       install.sh --uninstall [--purge]

  --host NAME        the name the host was registered by (kept from the config when run again)
  --server URL       the server's address, if not the one this file came from
  --ca-file FILE     the certificate of a private CA that signed the server's
  --token-file FILE  where the token stands (else $TOKEN, else the config of last time, else it is asked for)
  --new-token        ask for the token also when the config has one (after rotate-token)
  --release-key FILE take releases of this signer alone (an OpenSSH public key; default: the one the server passes on
                     at the first installation)
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
    host="" ca_file="" token_file="" given_key="" new_token=no plain=no start=yes uninstall=no purge=no
    while [ $# -gt 0 ]; do
        case $1 in
            --host) host=${2:-}; shift ;;
            --server) server_url=${2:-}; shift ;;
            --ca-file) ca_file=${2:-}; shift ;;
            --token-file) token_file=${2:-}; shift ;;
            --release-key) given_key=${2:-}; shift ;;
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
    keep_installer
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
    old_token="" old_token_file="" signed=no
    case $server_url in @*) server_url="" ;; esac   # the copy on the host: it takes the address from the config
    [ -e "$config" ] || return 0
    [ -n "$server_url" ] || server_url=$(old_setting server_url)
    [ -n "$host" ] || host=$(old_setting host_id)
    [ -n "$ca_file" ] || ca_file=$(old_setting ca_file)
    [ "$host" = "$(old_setting host_id)" ] || return 0     # a token is one host's
    old_token=$(old_setting token)
    old_token_file=$(old_setting token_file)
}

old_setting() {
    awk -v key="$1" '/^[ \t]*\[/ { exit } $1 == key || index($1, key "=") == 1 { print; exit }' "$config" |
        sed -n "s/^[^=]*=[[:space:]]*[\"']\([^\"']*\)[\"'].*/\1/p"
}

check_settings() {
    case $server_url in *[!A-Za-z0-9.:/_~%@\[\]-]*) fail "--server: $server_url is not an address" ;; esac
    case $server_url in
        https://?*) protocol="=https" ;;
        http://*)
            protocol="=http,https"
            authority=${server_url#http://}
            printf '%s\n' "${authority%%/*}" | grep -Eqx '(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?' ||
                fail "$server_url: only https, except for an address of this machine" ;;
        *) fail "--server needs the server's address: https://monitor.example.com" ;;
    esac
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
    token=${TOKEN:-} kept_token_file=""
    unset TOKEN
    if [ -n "$token_file" ]; then
        token=$(cat "$token_file") || fail "--token-file: $token_file cannot be read"
    fi
    if [ -z "$token" ] && [ "$new_token" = no ]; then
        token=$old_token
        if [ -z "$token" ] && [ -n "$old_token_file" ]; then kept_token_file=$old_token_file; return 0; fi
    fi
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

# Into the folder; 1 if the server has no such file. An answer that leads away from https is not followed.
fetch_optional() {
    code=0
    told=$(curl --fail --silent --show-error --location --proto "$protocol" --proto-redir "$protocol" --connect-timeout 10 \
        --retry 2 ${ca_file:+--cacert "$ca_file"} --output "$folder/$1" "$server_url/install/$1" 2>&1) || code=$?
    case $code in
        0) return 0 ;;
        22) case $told in *" 404"*) return 1 ;; esac ;;     # what --fail gives for an answer of 400 or more
    esac
    fail "cannot get $server_url/install/$1: $told"
}

fetch() {
    fetch_optional "$1" || fail "cannot get $server_url/install/$1: there is no such file"
}

# fetch_checked NAME [NAME IN A RELEASE]
fetch_checked() {
    fetch "$1"
    digest=$(awk -v name="$1" -v other="${2:-$1}" '$2 == name || $2 == other { print $1; exit }' "$folder/SHA256SUMS")
    [ -n "$digest" ] || fail "the server's SHA256SUMS does not name $1"
    [ "$(sha256sum < "$folder/$1")" = "$digest  -" ] || fail "$1 does not have its checksum: nothing was changed; try again"
}

# The sums against the signer's key, which is fixed from the first installation on: then a server that lies cannot
# hand out an agent of its own. Without a signature the sums find damage, and no more.
check_signature() {
    key=$release_key
    [ -z "$given_key" ] || key=$given_key
    if ! fetch_optional SHA256SUMS.sig; then
        [ ! -e "$key" ] || fail "this release is not signed, and this host takes signed ones alone ($key): nothing was changed"
        say "note: this release is not signed: its checksums guard against damage, not against a server that lies."
        return 0
    fi
    command -v ssh-keygen > /dev/null || fail "ssh-keygen is missing, to check the release's signature: apt-get install openssh-client"
    if [ ! -e "$key" ]; then
        fetch release-key
        key=$folder/release-key
        say "First installation: from now on this host takes releases of this signer alone:"
        ssh-keygen -l -f "$key" || fail "the server's release-key is not an OpenSSH public key"
    fi
    printf 'release namespaces="proxmon" %s\n' "$(head -n 1 "$key")" > "$folder/signers"
    ssh-keygen -Y verify -f "$folder/signers" -I release -n proxmon -s "$folder/SHA256SUMS.sig" < "$folder/SHA256SUMS" \
        > "$folder/told" 2>&1 || fail "the release is not signed by $key: nothing was changed ($(tail -n 1 "$folder/told"))"
    signed=yes
    cp "$key" "$folder/signer"
}

download_all() {
    fetch SHA256SUMS
    check_signature
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
    fetch_checked "$name.service" "systemd/$name.service"
    fetch_checked install.sh.in packaging/install.sh
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
        printf 'server_url = "%s"\nhost_id = "%s"\n' "$server_url" "$host"
        if [ -n "$kept_token_file" ]; then printf 'token_file = "%s"\n' "$kept_token_file"
        else printf 'token = "%s"\n' "$token"
        fi
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

# The way to upgrade without running what the server sends, and the key that it is checked with.
keep_installer() {
    install -d -m 0755 "${installer%/*}"
    install -m 0755 "$folder/install.sh.in" "$installer.new"
    mv "$installer.new" "$installer"
    [ "$signed" = no ] || { install -m 0644 "$folder/signer" "$release_key.new" && mv "$release_key.new" "$release_key"; }
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
    rm -f "$unit" "$program" "$program.previous" "$program.new" "$installer"
    rm -rf "/etc/systemd/system/$name.service.d" "/var/cache/$name"
    if command -v systemctl >/dev/null; then systemctl daemon-reload || true; fi
    if [ "$purge" = yes ]; then
        rm -rf "$config" "$release_key" "/var/lib/$name"
        rmdir "${config%/*}" 2>/dev/null || true
        say "Removed, with its config and state."
    else
        say "Removed. $config and /var/lib/$name are kept (--purge removes them too)."
    fi
    say "On the server: proxmox-monitor-server remove-host NAME"
}

main "$@"
