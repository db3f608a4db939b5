#!/usr/bin/env bash
# Build what is released and try it as a stranger would: tools/release.sh [PYTHON], with build and twine installed there.
# dist/ holds the wheel and the sdist when everything below has worked.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-python3}")
rm -rf dist build/lib
"$python" -m build --quiet
"$python" -m twine check --strict dist/*

try=$(mktemp -d)
trap 'rm -rf "$try"' EXIT
for file in dist/*.whl dist/*.tar.gz; do
  echo "== $file"
  "$python" -m venv "$try/venv"
  "$try/venv/bin/python" -m pip install --quiet "$file"
  (
    cd "$try"   # away from the checkout: only what was installed is there
    export JAX_PLATFORMS=cpu
    venv/bin/ches --version
    venv/bin/python -c 'import ches_jax as cj; print(cj.ScoreConfig().model)'
    venv/bin/ches score --limit 4 --quiet --out run
    venv/bin/ches verify --claims L1 --instances 20 --quiet
  )
  rm -rf "$try/venv" "$try/run"
done
