#!/bin/sh
# Freeze agent and server inside a Debian 12 root without network; called by build.sh (chroot) and the Dockerfile.
#   freeze.sh PROGRAM ARCH EPOCH     PROGRAM: agent or server
# Reads  /build/src (the project), /build/wheels (what pip may install)
# Writes /build/out/proxmox-monitor-PROGRAM_linux_ARCH, its .cdx.json (SBOM), LICENSES-PROGRAM/, build-environment_ARCH.txt
#
# Two runs give the same bytes: names sorted, dates fixed, and PYTHONHASHSEED=0 (without it PyInstaller orders
# base_library.zip anew each time). It holds for equal Debian packages; build-environment_ARCH.txt names them.
set -eu
program=$1 arch=$2 epoch=$3
name=proxmox-monitor-$program
src=/build/src out=/build/out work=/build/work-$program
export PYTHONHASHSEED=0 SOURCE_DATE_EPOCH="$epoch" LC_ALL=C.UTF-8 TZ=UTC HOME=/build PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
unset LD_PRELOAD LD_LIBRARY_PATH PIP_FIND_LINKS || true
version=$(sed -n 's/^VERSION = "\([0-9A-Za-z.+-]*\)"$/\1/p' "$src/$program.py")
[ -n "$version" ] || { echo "freeze.sh: no VERSION in $program.py" >&2; exit 1; }

# What neither program uses. readline is a matter of licence (GPL-3), the rest of size. `zipfile`, `calendar` and
# `pickle` look as useless and are not.
excludes="asyncio _asyncio multiprocessing _multiprocessing unittest doctest pdb pydoc pydoc_data xml xmlrpc curses
    _curses readline rlcompleter bz2 _bz2 lzma _lzma ctypes _ctypes
    tkinter lib2to3 distutils setuptools pkg_resources pip ensurepip test ftplib netrc imaplib mailbox optparse
    _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw _multibytecodec"
export PIP_CONFIG_FILE=/dev/null
set --
case $program in
    agent)
        excludes="$excludes concurrent sqlite3 _sqlite3 getpass statistics fractions decimal _decimal _pydecimal" ;;
    server)
        excludes="$excludes cffi pycparser wsgiref bottle.ext"
        set -- --hidden-import _cffi_backend
        # What server.py reads at run time: see resource() there.
        for data in schema.sql:. templates:templates packaging/install.sh:packaging agent.py:. \
                systemd/proxmox-monitor-agent.service:systemd; do
            set -- "$@" --add-data "$src/${data%%:*}:${data#*:}"
        done ;;
    *)  echo "freeze.sh: agent or server, not $program" >&2; exit 2 ;;
esac
for module in $excludes; do set -- "$@" --exclude-module "$module"; done

venv=/build/venv
if [ ! -e "$venv/complete" ]; then
    rm -rf "$venv"
    python3 -m venv --without-pip "$venv"
    # Debian's own pip, as a wheel: ensurepip would install a second one first.
    "$venv/bin/python" "$(echo /usr/share/python-wheels/pip-*.whl)/pip" install --quiet --no-index --no-compile \
        --find-links /build/wheels --require-hashes -r "$src/requirements.txt" -r "$src/packaging/requirements-build.txt"
    touch "$venv/complete"
fi

rm -rf "$work"
mkdir -p "$work" "$out"
cd "$work"
"$venv/bin/python" -m PyInstaller --noconfirm --clean --log-level ERROR --onedir --noupx --name "$name" \
    --distpath "$work/dist" --workpath "$work/build" --specpath "$work" "$@" "$src/$program.py"
tree=$work/dist/$name
"$venv/bin/python" "$src/packaging/sbom.py" "$name" "$version" "$arch" "$work/build/$name" "$tree" "$out" "$epoch"

# In front of the archive stands the part that unpacks it; its length and the archive's digest are filled in.
tar --create --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
    --directory "$work/dist/$name" . | gzip -9n > "$work/payload"
digest=$(sha256sum "$work/payload" | cut -d' ' -f1)
head=$work/head size=0 head_size=0
while :; do # the numbers are part of what they count: until they stand still
    sed -e "s/@NAME@/$name/g" -e "s/@VERSION@/$version/g" -e "s/@ARCH@/$arch/g" -e "s/@DIGEST@/$digest/g" \
        -e "s/@START@/$((head_size + 1))/g" -e "s/@SIZE@/$size/g" "$src/packaging/unpack.sh" > "$head"
    now=$(wc -c < "$head")
    [ "$now" != "$head_size" ] || break
    head_size=$now size=$((now + $(wc -c < "$work/payload")))
done
cat "$head" "$work/payload" > "$out/${name}_linux_$arch.partial"
chmod 755 "$out/${name}_linux_$arch.partial"
touch -d "@$epoch" "$out/${name}_linux_$arch.partial"
mv "$out/${name}_linux_$arch.partial" "$out/${name}_linux_$arch"
dpkg-query -W > "$out/build-environment_$arch.txt"
