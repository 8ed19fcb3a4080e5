#!/usr/bin/env bash
# numpy 2.3.5: a slice of a mapped .npy file is a `np.memmap` too, with `filename`, `mode` and
# `offset` of the whole file, not of where the slice begins (nor of its order). Whoever reads rows
# of a data set through these attributes, so as not to keep the pages of the mapping, gets the rows
# of another place, without an error. Only a memmap whose `base` is the mapping itself says where
# it begins.
# Seen: offset 128 of array[3:] and of array[::-1]; reading there gives row 0 where row 3 is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "numpy==2.3.5"
cd "$folder"
venv/bin/python - <<'PYTHON'
import mmap

import numpy as np

np.save("images.npy", np.arange(40, dtype=np.uint8).reshape(10, 4))
whole = np.load("images.npy", mmap_mode="r")
part, backwards = whole[3:], whole[::-1]
with open(part.filename, "rb") as file:
    file.seek(part.offset)
    first = list(file.read(4))
print(f"offsets {whole.offset}, {part.offset}, {backwards.offset}; "
      f"read at the part's offset: {first}, its first row: {part[0].tolist()}")
assert part.offset == backwards.offset == whole.offset
assert isinstance(part, np.memmap) and first == [0, 1, 2, 3] != part[0].tolist()
assert isinstance(whole.base, mmap.mmap) and not isinstance(part.base, mmap.mmap)
PYTHON
