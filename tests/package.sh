#!/usr/bin/env bash
# Installs what a user installs and uses it: the sdist, with plain `pip install` (a build environment of pip's own), with a
# C++ compiler and then without one, from the same folder: what the first left there must not be installed. $1: a python that
# has torch.
set -euo pipefail
python=$(realpath -s "$(command -v "$1")")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install -q build
"$python" -m build -q --sdist --outdir "$work" . >/dev/null
mkdir "$work/sources"
tar -xf "$work"/*.tar.gz -C "$work/sources" --strip-components=1
torch=$("$python" -c "import torch; print(torch.__version__)")
probe='
import sys, torch, sparse_ce, sparse_ce.backends as backends
x = torch.randn(4, 50, requires_grad=True)
sparse_ce.fused_sparse_ce(x, torch.arange(4), 5).backward()
assert (x.grad != 0).sum(-1).max() <= 6
assert torch.__version__ == sys.argv[1], f"another torch was installed: {torch.__version__}"
assert "/site-packages/" in sparse_ce.__file__, sparse_ce.__file__
assert (backends.unavailable("cpu") is None) == (sys.argv[2] == "with"), backends.unavailable("cpu")
'

for compiler in with without; do
  "$python" -m venv "$work/$compiler"
  # torch and what it needs from the environment that has them, which may lie behind it; everything else fresh
  "$python" -c "import sys; print('\n'.join(p for p in sys.path if p.endswith('site-packages')))" \
    > "$("$work/$compiler/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
  if [ "$compiler" = with ]; then search=$PATH; else search="$work/$compiler/bin"; fi
  PATH=$search "$work/$compiler/bin/python" -m pip install -q --force-reinstall --no-deps "$work/sources"
  (cd "$work" && "$work/$compiler/bin/python" -c "$probe" "$torch" "$compiler" && "$work/$compiler/bin/python" -m sparse_ce)
  echo "package: $compiler a C++ compiler: installed and works"
done
