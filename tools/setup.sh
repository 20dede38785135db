#!/usr/bin/env bash
# Prepare .venv/ (and nothing else in this tree) for running, testing and checking kmodel.
#
# kmodel wants real parallelism, so the interpreter is a free-threaded CPython 3.13 or newer, taken from
#   1. $KMODEL_PYTHON, a name or a path (a build with a GIL is allowed here: slower, not wrong);
#   2. PATH;
#   3. one that an earlier set-up built in the per-user cache, ${XDG_CACHE_HOME:-~/.cache}/kmodel;
#   4. uv, where uv is installed and can download;
#   5. a build, where apt is: the source package of CPython from the mirror this machine's apt already uses. apt checks
#      the signatures, its own lists and caches stay untouched, and the result is kept in the cache.
# Nothing is ever installed system-wide, unless KMODEL_APT_INSTALL=1 lets root have apt install what step 5 lacks, and a
# Chromium for the tests that drive one.
#
# Safe to interrupt and to run twice at once: an interpreter appears in the cache by one rename, and .venv counts as
# ready only once its stamp exists, which is written last.
#
# Exit status: 0 ready, 1 set-up failed, 2 KMODEL_PYTHON unusable.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Settings of a calling make, or of another Python, must not reach the ones started here.
unset MAKEFLAGS MFLAGS MAKELEVEL DESTDIR PYTHONHOME PYTHONPATH PYTHON_GIL PYTHONSAFEPATH PYTHONWARNINGS
unset PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV VIRTUAL_ENV
export LC_ALL=C.UTF-8

STAMP=.venv/.kmodel-setup
INPUTS=(pyproject.toml tools/constraints.txt tools/setup.sh)
WANTED="a free-threaded CPython 3.13 or newer"
ADVICE="install $WANTED and set KMODEL_PYTHON to it"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf 'setup: error: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Wait for another set-up that holds the lock on file descriptor $1.
lock() {
    command -v flock >/dev/null || return 0
    flock -n "$1" || { say "waiting for another set-up to finish"; flock "$1"; }
}

# --- is it done already? ---------------------------------------------------------------------------------------------

# The stamp has three lines: what the venv was installed from, its interpreter, and where the tree lay, which a venv's
# scripts and the editable install spell out.
stamped_key= stamped_python= stamped_home=

read_stamp() {
    stamped_key= stamped_python= stamped_home=
    [ -f "$STAMP" ] && { read -r stamped_key && read -r stamped_python && read -r stamped_home; } <"$STAMP"
}

key() { cat "${INPUTS[@]}" | sha256sum | cut -d ' ' -f 1; }

ready() {
    read_stamp && [ "$stamped_home" = "$PWD" ] && [ "$stamped_key" = "$(key)" ] || return 1
    .venv/bin/python -I -S -c '' 2>/dev/null || return 1
    [ -z "${KMODEL_PYTHON:-}" ] || { probe "$KMODEL_PYTHON" && [ "$python" = "$stamped_python" ]; }
}

# --- judging an interpreter ------------------------------------------------------------------------------------------

python=  # the chosen interpreter, never one inside a venv
kind=    # "free-threaded" or "GIL"
version= # "3.13.5"
reason=  # why the last candidate was turned down

PROBE='
import sys
if sys.version_info < (3, 13) or sys.implementation.name != "cpython":
    sys.exit("it is %s %d.%d, not CPython 3.13 or newer" % ((sys.implementation.name,) + tuple(sys.version_info[:2])))
import ctypes, ensurepip, os, ssl, sysconfig, venv, zlib
kind = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "GIL"
print("%s|%d.%d.%d|%s" % ((kind,) + tuple(sys.version_info[:3]) + (os.path.realpath(sys._base_executable),)))
'

# Set python, kind and version from the command $1, or fail with a reason.
probe() {
    local answer
    if ! command -v "$1" >/dev/null; then
        reason="there is no such command"
    elif ! answer=$("$1" -I -c "$PROBE" 2>&1 </dev/null); then
        reason=${answer##*$'\n'}
        [[ -n $reason && ${#reason} -le 200 ]] || reason="it does not start as a Python"
    elif [[ $answer != *'|'*'|'/* ]]; then
        reason="it does not answer like a Python"
    else
        IFS='|' read -r kind version python <<<"$answer"
        return 0
    fi
    return 1
}

# Does a venv made by $python see its own site-packages? (Builds from Debian's patched tree look elsewhere.)
venv_works() {
    local dir status=0
    dir=$(mktemp -d)
    "$python" -I -m venv --without-pip "$dir/v" >/dev/null 2>&1 &&
        "$dir/v/bin/python" -I -c 'import sys, sysconfig; sys.exit(sysconfig.get_path("purelib") not in sys.path)' \
            2>/dev/null || status=1
    rm -rf "$dir"
    [ "$status" = 0 ] || reason="its virtual environments do not work"
    return "$status"
}

usable() { probe "$1" && [ "$kind" = free-threaded ] && venv_works; }

# --- where interpreters come from ------------------------------------------------------------------------------------

from_environment() {
    probe "$KMODEL_PYTHON" && venv_works || die "KMODEL_PYTHON=$KMODEL_PYTHON is unusable: $reason" 2
    [ "$kind" = free-threaded ] || say "notice: $KMODEL_PYTHON has a GIL: threads take turns, so races are rarer"
}

from_path() {
    local name dir candidate
    local -a dirs
    for name in python3.13t python3.14t python3t python3 python python3.13 python3.14; do
        ! usable "$name" || return 0
    done
    IFS=: read -r -a dirs <<<"$PATH"
    for dir in "${dirs[@]}"; do
        for candidate in "$dir"/python3.[1-9][0-9]t; do
            ! usable "$candidate" || return 0
        done
    done
    return 1
}

from_cache() {
    local dir
    while read -r dir; do
        ! usable "$dir/bin/python3" || return 0
    done < <(find "$cache" -maxdepth 1 -name 'python-3.*t' 2>/dev/null | sort -rV)
    return 1
}

# Asked from /, so that uv does not answer with this project's own .venv.
from_uv() {
    local found
    command -v uv >/dev/null || return 1
    if ! found=$(cd / && UV_PYTHON_DOWNLOADS=never uv python find --system 3.13t 2>/dev/null </dev/null); then
        say "asking uv for a free-threaded CPython 3.13"
        (cd / && UV_PYTHON_INSTALL_BIN=0 uv python install --quiet 3.13t) >/dev/null 2>&1 </dev/null || return 1
        found=$(cd / && UV_PYTHON_DOWNLOADS=never uv python find --system 3.13t 2>/dev/null </dev/null) || return 1
    fi
    usable "$found"
}

# --- building one ----------------------------------------------------------------------------------------------------

# Stop early, in one line, if the build could not succeed.
check_prerequisites() {
    local missing free cc=${CC:-cc} header package
    local -a packages=()
    [[ $cache != *[[:space:]]* ]] || die "cannot build below '$cache' (blanks); set XDG_CACHE_HOME to another folder"
    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] || die "cannot write to $cache; set XDG_CACHE_HOME to another folder"
    command -v make >/dev/null || packages+=(make)
    command -v xz >/dev/null || packages+=(xz-utils)
    command -v ${cc%% *} >/dev/null || packages+=(gcc)
    while read -r header package; do
        printf '#include <%s>\n' "$header" | $cc -E -x c - >/dev/null 2>&1 || packages+=("$package")
    done <<'END'
stdlib.h libc6-dev
openssl/ssl.h libssl-dev
zlib.h zlib1g-dev
ffi.h libffi-dev
END
    if [ ${#packages[@]} -gt 0 ]; then
        missing="apt-get install --no-install-recommends ${packages[*]}"
        [ "${KMODEL_APT_INSTALL:-0}" = 1 ] && [ "$(id -u)" = 0 ] ||
            die "building CPython needs: $missing (or $ADVICE)"
        say "KMODEL_APT_INSTALL=1: $missing"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive $missing -y -qq; } >/dev/null </dev/null ||
            die "this failed: $missing"
    fi
    free=$(df -Pk "$cache" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge 700000 ] || die "building CPython needs 700 MB free in $cache; make room or set XDG_CACHE_HOME"
}

# "URI" of each archive in this machine's apt configuration that may hold the distribution itself, in order.
archives() {
    apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 2>/dev/null |
        awk '$3 == "main" && $2 !~ /security|backports|proposed/ && $1 !~ /^cdrom:/ && !seen[$1]++ { print $1 }'
}

# Download CPython's source package of suite $2 from archive $1 into $work, with apt's state all in $work too.
fetch_from() {
    local uri=$1 suite=$2 keyring options= package
    for keyring in /usr/share/keyrings/"$distribution"-archive-keyring.{pgp,gpg}; do
        [ ! -r "$keyring" ] || options="[signed-by=$keyring]"
    done
    rm -rf "$work/apt" && mkdir -p "$work"/apt/{lists,cache/archives}/partial
    : >"$work/apt/status"
    echo "deb-src $options $uri $suite $components" >"$work/apt/sources.list"
    # Hooks are dropped because some clean the system's caches after any update; pins and the default release because
    # they are about what to install here. Proxies and credentials stay as configured.
    cat >"$work/apt/apt.conf" <<END
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Default-Release;
APT::Sandbox::User "$(id -un)";
APT::Update::Error-Mode "any";
Dir::State::Lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
Dir::Etc::SourceList "$work/apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Log "$work/apt";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
END
    apt-get -c "$work/apt/apt.conf" update >>"$work/fetch.log" 2>&1 </dev/null || return 1
    for package in python3.13 python3.14; do
        (cd "$work" && apt-get -c apt/apt.conf source --download-only "$package") >>"$work/fetch.log" 2>&1 </dev/null ||
            continue
        tarball=$(find "$work" -maxdepth 1 -name "${package}_*.orig.tar.xz")
        [ -z "$tarball" ] || return 0
    done
    return 1
}

# Set tarball to the pristine upstream source. The patched tree beside it makes interpreters without working venvs.
fetch_source() {
    local ID= ID_LIKE= VERSION_CODENAME= uri suite suites distribution components
    # shellcheck source=/dev/null
    [ ! -r /etc/os-release ] || . /etc/os-release
    case " $ID $ID_LIKE " in
        *' ubuntu '*) distribution=ubuntu components="main universe" suites="$VERSION_CODENAME resolute questing plucky" ;;
        *) distribution=debian components=main suites=trixie ;;
    esac
    : >"$work/fetch.log"
    for uri in $(archives); do
        for suite in $suites; do
            ! fetch_from "$uri" "$suite" || return 0
        done
    done
    # Below an "Err:" line stands what went wrong on the way; the "E:" lines only say what is missing for it.
    reason=$(sed -n '/^Err:/ { n; s/^  *//p; q }' "$work/fetch.log")
    [ -n "$reason" ] || reason=$(grep -m 1 '^E: ' "$work/fetch.log") || reason="apt's configuration names no $distribution archive"
    die "cannot fetch the source of CPython with apt (${reason#E: }); check the network, or $ADVICE"
}

# Run make in the background and show how far it is: one live line on a terminal, a line per quarter elsewhere.
make_with_progress() {
    local total compiled percent shown=0 status=0
    : >"$work/make.log"
    total=$(make -n 2>/dev/null | grep -c -- ' -c ' || true)
    nice make -j "$(nproc)" >"$work/make.log" 2>&1 </dev/null &
    building=$!
    while kill -0 "$building" 2>/dev/null; do
        compiled=$(grep -c -- ' -c ' "$work/make.log" || true)
        percent=$((total > 0 ? compiled * 100 / total : 0))
        percent=$((percent < 99 ? percent : 99))
        if [ -t 2 ]; then
            printf '\rsetup: building CPython %s: %d %%' "$release" "$percent" >&2
        elif [ "$percent" -ge $((shown + 25)) ]; then
            shown=$((percent / 25 * 25))
            say "building CPython $release: $shown %"
        fi
        sleep 1
    done
    wait "$building" || status=$?
    building=
    [ ! -t 2 ] || printf '\r\033[K' >&2
    return "$status"
}

# Report a failed step of the build in one line, keeping its log ($1).
build_failed() {
    cp "$work/$1" "$cache/failed-build.log" 2>/dev/null || true
    ! grep -q 'No space left on device' "$work/$1" || die "no space left in $cache; make room or set XDG_CACHE_HOME"
    die "building CPython $release failed, see $cache/failed-build.log (or $ADVICE)"
}

building= # process id of a running make
work=     # scratch folder of this build, beside its result so that one rename publishes it

discard_work() {
    if [ -n "$building" ]; then
        kill "$building" 2>/dev/null || true
        wait "$building" 2>/dev/null || true
    fi
    [ -z "$work" ] || rm -rf "$work"
}

from_source() {
    local tarball release prefix
    command -v apt-get >/dev/null || die "found no free-threaded CPython 3.13 or newer and no apt to get its source; $ADVICE"
    check_prerequisites
    exec 8>"$cache/lock"
    lock 8
    ! from_cache || return 0 # another set-up has built it meanwhile

    rm -rf "$cache"/build.* # what a killed build left: its lock is free, so nobody uses it
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap discard_work EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP

    say "found no free-threaded CPython 3.13 or newer; building one (a few minutes, once per user)"
    fetch_source
    release=${tarball##*_} release=${release%.orig.tar.xz} prefix=$cache/python-${release}t
    mkdir "$work/source"
    tar -xJf "$tarball" -C "$work/source" --strip-components=1 2>"$work/unpack.log" || build_failed unpack.log
    (
        cd "$work/source"
        # No -g, tests or pip of its own: half the size and time. No PGO: it takes half an hour.
        ./configure -q --prefix="$prefix" --disable-gil --disable-test-modules --with-ensurepip=no \
            OPT='-DNDEBUG -fwrapv -O3 -Wall' >"$work/configure.log" 2>&1 </dev/null
    ) || build_failed configure.log
    pushd "$work/source" >/dev/null
    make_with_progress || build_failed make.log
    make install DESTDIR="$work/stage" >"$work/install.log" 2>&1 </dev/null || build_failed install.log
    popd >/dev/null
    usable "$work/stage$prefix/bin/python3" || die "the CPython $release built here is unusable: $reason"
    rm -rf "$prefix"
    mv "$work/stage$prefix" "$prefix"
    discard_work
    work=
    trap - EXIT INT TERM HUP
    exec 8>&-
    usable "$prefix/bin/python3" || die "the CPython $release built here is unusable: $reason"
}

# --- the venv --------------------------------------------------------------------------------------------------------

# Write .venv. One that was complete for this interpreter and place is brought up to date, any other is made anew.
make_venv() {
    local new_key
    new_key=$(key)
    read_stamp || true
    rm -f "$STAMP"
    if [ "$stamped_python" != "$python" ] || [ "$stamped_home" != "$PWD" ] || ! .venv/bin/python -I -m pip --version >/dev/null 2>&1; then
        say "creating .venv with $kind CPython $version"
        rm -rf .venv
        "$python" -I -m venv .venv >/dev/null || die "$python cannot create .venv"
    fi
    say "installing the Python packages into .venv"
    if ! .venv/bin/python -I -m pip install --quiet --no-input --disable-pip-version-check --only-binary :all: \
        --constraint tools/constraints.txt --editable '.[test,dev,bench]' >.venv/pip.log 2>&1 </dev/null; then
        reason=$(grep -m 1 -o 'ERROR: .*' .venv/pip.log || tail -n 1 .venv/pip.log)
        die "pip cannot install the packages (${reason#ERROR: }); check the network and pip's index settings"
    fi
    printf '%s\n' "$new_key" "$python" "$PWD" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "ready: .venv with $kind CPython $version"
}

# --- a browser -------------------------------------------------------------------------------------------------------

# Chromium for the tests of the explorer's page, which are skipped without one: fetched only where packages may be added
# at all, and never a reason to fail.
add_browser() {
    local name
    local -a install=(apt-get -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
    [ "${KMODEL_APT_INSTALL:-0}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    for name in "${KMODEL_CHROMIUM:-chromium}" chromium-browser google-chrome google-chrome-stable chrome; do
        ! command -v "$name" >/dev/null || return 0
    done
    say "KMODEL_APT_INSTALL=1: apt-get install --no-install-recommends chromium fonts-dejavu-core"
    { "${install[@]}" update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 "${install[@]}" install -y -qq \
        --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 </dev/null ||
        say "notice: there is no Chromium to be had, so the tests of the explorer's page will be skipped"
}

# --- main ------------------------------------------------------------------------------------------------------------

! ready || exit 0

[[ ${XDG_CACHE_HOME:-} == /* ]] && cache=$XDG_CACHE_HOME/kmodel || cache=~/.cache/kmodel
if [ -n "${KMODEL_PYTHON:-}" ]; then
    from_environment
else
    from_path || from_cache || from_uv || from_source
fi

exec 9<pyproject.toml # as the lock: one set-up per tree, and no file beside .venv
lock 9
ready || make_venv
add_browser
