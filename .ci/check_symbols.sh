#!/bin/sh
# check_symbols.sh LIB - fails when the symbols that LIB exports differ from tests/exported_symbols.txt: what is exported
# can be linked against and must then stay, and a symbol too many may clash with one of the program's.
set -eu
if [ $# -ne 1 ]; then
  echo "usage: $0 path/to/libwarpdecode.so" >&2
  exit 2
fi
expected=$(cd "$(dirname "$0")/.." && pwd)/tests/exported_symbols.txt
found=$(mktemp)
trap 'rm -f "$found" "$found.nm"' EXIT
# Not in a pipe, whose status would be sort's: an nm that fails must not pass for a library without symbols.
"${NM:-nm}" -D --defined-only "$1" >"$found.nm"
awk '{ sub(/@.*/, "", $NF); print $NF }' "$found.nm" | LC_ALL=C sort >"$found"
if ! diff -u "$expected" "$found"; then
  echo "check_symbols: $1 exports other symbols than $expected (-: missing, +: too many)" >&2
  exit 1
fi
echo "check_symbols: $(wc -l <"$found" | tr -d ' ') symbols, as expected"
