#!/bin/sh
# @NAME@ @VERSION@ for Linux on @ARCH@: a program and its libraries in one file.
# This part unpacks what follows it, once, into /var/cache/@NAME@/@VERSION@/ and becomes the program: one process, no
# temporary directory, nothing to unpack at the next start. What is not whole is never started. All of this part is
# one function, so that a file cut off within it does nothing.
main() {
    set -eu
    digest=@DIGEST@
    if [ "$(wc -c < "$0")" != "@SIZE@" ]; then
        complain "$0 is incomplete: it should have @SIZE@ bytes. Install it again"
    fi
    case $(uname -m) in
        x86_64) arch=amd64 ;;
        aarch64) arch=arm64 ;;
        *) arch=$(uname -m) ;;
    esac
    [ "$arch" = "@ARCH@" ] || complain "this file is for @ARCH@, this machine is $arch"
    # The first place that holds it whole; else the first place where it can be unpacked.
    # Not in root's HOME, which may be another user's (sudo -E, su -m), who could then put his program there.
    own=${HOME:+$HOME/.cache/@NAME@}
    [ "$(id -u)" != 0 ] || own=
    for place in "/var/cache/@NAME@" ${own:+"$own"}; do
        tree=$place/@VERSION@/$digest
        if is_trusted "$place" && [ -e "$tree/complete" ]; then run "$@"; fi
    done
    for place in "/var/cache/@NAME@" ${own:+"$own"}; do
        tree=$place/@VERSION@/$digest
        if (umask 022 && mkdir -p "$place/@VERSION@") 2>/dev/null && [ -w "$place/@VERSION@" ] && is_trusted "$place"
        then
            unpack < "$0"
            run "$@"
        fi
    done
    complain "cannot write to /var/cache/@NAME@ to unpack the program: run it once as root"
}

complain() {
    echo "@NAME@: $*" >&2
    exit 1
}

# Nothing is run from a directory that somebody else could have filled.
is_trusted() {
    [ -d "$1" ] && [ ! -L "$1" ] && { [ -O "$1" ] || [ "$(stat -c %u "$1")" = 0 ]; } && [ -z "$(find "$1" -maxdepth 0 -perm /022)" ]
}

run() {
    if [ ! -x "$tree/@NAME@" ]; then
        complain "$tree/@NAME@ cannot be executed: is the file system mounted noexec? If not, remove $tree"
    fi
    exec "$tree/@NAME@" "$@"
}

# From standard input, which is this file: unpack beside, check, flush, rename. The second of two at once gives way.
unpack() {
    umask 022
    new=$(mktemp -d "$place/@VERSION@/.new.XXXXXXXX")
    trap 'rm -rf "$new"' EXIT
    trap 'exit 1' HUP INT TERM
    tail -c +@START@ > "$new/payload" || complain "cannot unpack into $place: is the disk full?"
    if [ "$(sha256sum < "$new/payload")" != "$digest  -" ]; then
        complain "$0 is damaged: its content does not have the checksum it names. Install it again"
    fi
    mkdir "$new/tree"
    tar -xzf "$new/payload" -C "$new/tree" --no-same-owner || complain "cannot unpack into $place: is the disk full?"
    rm "$new/payload"
    : > "$new/tree/complete"
    # Of this file system alone: a plain sync waits for a suspended pool too.
    sync -f "$new/tree" 2>/dev/null || true
    chmod 755 "$new/tree"
    mv -T "$new/tree" "$tree" 2>/dev/null || [ -e "$tree/complete" ] || complain "cannot put $tree in its place"
    rm -rf "$new"
    trap - EXIT HUP INT TERM
    sweep
}

# Other versions go once nothing runs from them, and so does what a power cut left half unpacked.
sweep() {
    running=$(readlink /proc/[0-9]*/exe 2>/dev/null) || true
    for old in "$place"/*/*/; do
        old=${old%/}
        [ "$old" != "$tree" ] || continue
        case "
$running" in *"
$old/"*) continue ;; esac
        rm -rf "$old"
        rmdir "${old%/*}" 2>/dev/null || true
    done
    find "$place" -mindepth 2 -maxdepth 2 -name '.new.*' -mmin +60 -exec rm -rf {} + 2>/dev/null || true
}

main "$@"
exit 1
