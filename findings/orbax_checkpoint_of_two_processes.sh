#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, jax 0.10.2: what two processes saved as replicated arrays cannot be
# restored as it is by one process: without a target that has shardings, `restore` asks for the
# saved device ids (ValueError, "Topology mismatch"), also for arrays that are whole on each
# device. So an evaluation script, or a notebook, on one machine fails on a run of two. NumPy
# arrays are given if `PyTreeRestore` is told so (`RestoreArgs(restore_type=np.ndarray)`).
# Seen: ValueError without a target; 0, 1, 2, 3 as NumPy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "orbax-checkpoint==0.12.8"
cd "$folder"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1
cat > save.py <<'PYTHON'
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
everywhere = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec())
values = np.arange(4.0, dtype=np.float32)
tree = {"w": jax.make_array_from_callback((4,), everywhere, lambda index: values[index])}
with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
    writer.save(Path("saved").absolute(), args=ocp.args.StandardSave(tree))
PYTHON
port=$(venv/bin/python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
for process in 0 1; do venv/bin/python save.py "127.0.0.1:$port" "$process" > "$process.txt" 2>&1 & done
wait
venv/bin/python - 2> /dev/null <<'PYTHON'
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

saved = Path("saved").absolute()
try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        reader.restore(saved)
except ValueError as error:
    print(f"without a target: ValueError: {str(error).splitlines()[0][:90]}")
else:
    raise SystemExit("restored without a target: this has changed")
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    like = reader.metadata(saved).item_metadata.tree
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    tree = reader.restore(saved, args=ocp.args.PyTreeRestore(restore_args=arguments))
print(f"as NumPy: {tree['w'].tolist()}")
assert tree["w"].tolist() == [0, 1, 2, 3]
PYTHON
