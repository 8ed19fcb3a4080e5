"""How long data sets take to prepare and to read, and how much memory: each in its own process.

    python benchmarks/data.py --cifar10=cifar-10-binary.tar.gz --tiny=tiny-imagenet-20.zip

For Tiny ImageNet a part of the official set is enough: its files are repeated under other names
until there are 200 classes of 500 training and 50 test images, in the official layout. The page
cache is warm: the files were just written or read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLASSES, TRAIN, TEST = 200, 500, 50

# What a child process does: prints wall seconds of what is measured, and its peak memory.
LOAD = """
import json, resource, sys, time
from agr_jax.data import load_dataset
name, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
started = time.perf_counter()
dataset = load_dataset(name, directory=path, image_size=size, subset_ok=True, use_cache=True)
total = int(dataset.train.images.sum()) if len(sys.argv) > 4 else 0
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak, dataset.describe()]))
"""
PREPARE = """
import json, pathlib, resource, sys, time
from agr_jax.data.prepare import prepare
started = time.perf_counter()
path = prepare(sys.argv[1], pathlib.Path(sys.argv[3]), source=pathlib.Path(sys.argv[2]))
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak, str(path)]))
"""


def measure(what: str, program: str, *arguments: str, cache: Path) -> str:
    """Runs one child, prints its row, and returns the last thing that it said."""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"},
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    seconds, peak, said = json.loads(result.stdout.splitlines()[-1])
    print(f"| {what} | {seconds:.3g} | {peak / 1000:,.0f} |", flush=True)
    return said


def whole_tiny_imagenet(part: Path, folder: Path) -> Path:
    """An archive of the official size and layout, from the JPEG files of a part."""
    with zipfile.ZipFile(part) as archive:
        names = [n for n in archive.namelist() if n.endswith(".JPEG") and "/train/" in n]
        files = [archive.read(name) for name in names]
    ids = [f"n{c:08d}" for c in range(CLASSES)]
    path = folder / "tiny-imagenet-200.zip"
    top = "tiny-imagenet-200"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{top}/wnids.txt", "\n".join(ids) + "\n")
        lines, count = [], 0
        for c, name in enumerate(ids):
            for i in range(TRAIN):
                content = files[count % len(files)]
                archive.writestr(f"{top}/train/{name}/images/{name}_{i}.JPEG", content)
                count += 1
            for i in range(TEST):
                file = f"val_{c * TEST + i}.JPEG"
                archive.writestr(f"{top}/val/images/{file}", files[count % len(files)])
                lines.append(f"{file}\t{name}\t0\t0\t62\t62\n")
                count += 1
        archive.writestr(f"{top}/val/val_annotations.txt", "".join(lines))
    return path


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", type=Path, help="official archive or folder, whole")
    parser.add_argument("--tiny", type=Path, help="a .zip archive of Tiny ImageNet, or of a part")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load before {os.getloadavg()[0]:.1f}\n")
    print("| | wall s | peak memory, MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        cache, tfds = Path(made) / "cache", Path(made) / "tfds"
        sources = []
        if options.cifar10:
            sources.append(("cifar10", options.cifar10.resolve(), [0]))
        if options.tiny:
            sources.append(
                ("tiny_imagenet", whole_tiny_imagenet(options.tiny, Path(made)), [64, 32])
            )
        for name, path, sizes in sources:
            for size in sizes:
                title = f"{name}{f' at {size}' if size else ''}"
                given = name, str(path), str(size)
                measure(f"{title}: first start, official files", LOAD, *given, cache=cache)
                measure(f"{title}: second start, cache", LOAD, *given, cache=cache)
                measure(f"{title}: the same, all pixels read", LOAD, *given, "sum", cache=cache)
            if name == "tiny_imagenet":
                with zipfile.ZipFile(path) as archive:
                    # Of our own making, above.
                    archive.extractall(Path(made) / "unpacked")
                given = name, str(Path(made) / "unpacked"), "64"
                measure(f"{name} at 64: first start, folder", LOAD, *given, cache=cache)
                measure(f"{name} at 64: second start, cache", LOAD, *given, cache=cache)
            prepared = measure(f"{name}: prepare", PREPARE, name, str(path), str(tfds), cache=cache)
            given = name, prepared, str(sizes[0])
            measure(f"{name}: first start, prepared folder", LOAD, *given, cache=cache)
            measure(f"{name}: second start, cache", LOAD, *given, cache=cache)


if __name__ == "__main__":
    main()
