#!/bin/sh
# tools/env.sh EXTRAS: an environment in .venv with this project and these extras, such as
# "example,testing", in the versions of constraints.txt. Made once; a second call takes no time.
# Prints the path of its python. Uses uv where it is installed, else venv and pip.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
extras=$1
venv=$root/.venv
stamp=$venv/.portable-amp-$extras
fail() { echo "env.sh: $1" >&2; exit 2; }

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

want=$(cd "$root" && cksum pyproject.toml constraints.txt)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && usable "$venv/bin/python"; then
    echo "$venv/bin/python"
    exit 0
fi
{
    uv=$(command -v uv || true)
    # One that uv made has no pip: of no use where uv is gone.
    if ! usable "$venv/bin/python" || { [ -z "$uv" ] && ! "$venv/bin/python" -m pip -V >/dev/null 2>&1; }; then
        python=${PYTHON:-}
        for candidate in $python python3 python3.13 python3.12 python3.11 python3.10; do
            if usable "$candidate"; then python=$candidate; break; fi
            python=
        done
        rm -rf "$venv"
        if [ -n "$uv" ]; then
            uv venv -q --python "${python:->=3.10}" "$venv" || fail "uv could not make $venv"
        elif [ -n "$python" ]; then
            "$python" -m venv "$venv" ||
                fail "'$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)"
        else
            fail "needs Python 3.10 or newer, and found none as python3 (or set PYTHON=...)"
        fi
    fi
    echo "Installing portable-amp[$extras] into .venv; the first time this downloads PyTorch."
    if [ -n "$uv" ]; then
        uv pip install -q --python "$venv/bin/python" -c "$root/constraints.txt" -e "$root[$extras]"
    else
        "$venv/bin/python" -m pip install -q --disable-pip-version-check \
            -c "$root/constraints.txt" -e "$root[$extras]"
    fi || fail "the installation failed; nothing else was changed, start again"
    echo "$want" > "$stamp"
} >&2
echo "$venv/bin/python"
