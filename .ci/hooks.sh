#!/bin/sh
# Notebook-aware git for this clone: merge by cell (see .gitattributes), refuse to commit an unclean notebook.
set -eu
git rev-parse --show-toplevel >/dev/null 2>&1 || { echo "hooks: this folder is no git clone, so there is nothing to set up" >&2; exit 1; }
cd "$(git rev-parse --show-toplevel)"
git config merge.nbdev-merge.name "merge notebooks cell by cell"
git config merge.nbdev-merge.driver ".venv/bin/nbdev_merge %O %A %B %P"
hook=$(git rev-parse --git-path hooks)/pre-commit
if [ -e "$hook" ] && ! grep -q 'checks.py notebooks-clean' "$hook"; then
  echo "hooks: $hook exists and is not ours; add this line to it: .venv/bin/python .ci/checks.py notebooks-clean" >&2
  exit 1
fi
mkdir -p "$(dirname "$hook")"
printf '#!/bin/sh\nexec .venv/bin/python .ci/checks.py notebooks-clean\n' > "$hook"
chmod +x "$hook"
echo "hooks: merge driver set, pre-commit hook written; JupyterLab cleans on save when started with make lab"
