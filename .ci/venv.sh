#!/bin/sh
# venv.sh PYTHON FOLDER: make a virtual environment with pip, or say in one sentence what is missing.
set -eu
python=$1 folder=$2

command -v "$python" >/dev/null 2>&1 || {
  echo "env: there is no '$python' here; install Python 3.10 or newer, or name one: make env PYTHON=/path/to/python3" >&2
  exit 1
}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "env: '$python' is Python $version, but 3.10 or newer is needed; name another one: make env PYTHON=python3.12" >&2
  exit 1
}
"$python" -c 'import venv, ensurepip' 2>/dev/null || {
  echo "env: this Python $version cannot make environments because venv or ensurepip is missing; on Debian or Ubuntu run: apt install python$version-venv" >&2
  exit 1
}
if [ -x "$folder/bin/python" ] && "$folder/bin/python" -m pip --version >/dev/null 2>&1; then exit 0; fi
"$python" -m venv --clear "$folder"
