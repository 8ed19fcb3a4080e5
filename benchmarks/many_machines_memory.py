"""Memory that a process spends on host images while they are streamed to the devices.

    python benchmarks/many_machines_memory.py --data=PATH

CIFAR-10 from its archive or folder, 1,000 images of it held out, for 1, 2 and 4 CPU processes: one
epoch of batches of 128 goes to the devices, which drop them. Counted after each batch, above what
the process had before the data set was read: anonymous memory, which is the process's own, and
resident pages of the mapped file. What goes over the network (here, the loopback) meanwhile is
counted too. The decoded cache is made beforehand.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import arrangements


def memory_mb() -> dict[str, float]:
    """Resident memory of this process: its own, and that of the mapped files of images."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    mapped, of_images = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:  # the head of a mapping
            of_images = line.endswith(".npy")
        elif of_images and line.startswith("Rss:"):
            mapped += int(line.split()[1])
    return {"anonymous": int(fields["RssAnon"].split()[0]) / 1024, "mapped": mapped / 1024}


def sent_mb() -> float:
    """What all processes of this machine have sent to each other so far, and all else has."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines) / 2**20


def work(options: argparse.Namespace) -> None:
    """One process."""
    import jax
    import numpy as np

    from agr_jax import data, distributed, sharding
    from agr_jax.data import Split
    from agr_jax.data.feed import Feed, TrainingImages

    with arrangements.joined(options):
        mesh = sharding.data_mesh()
        one = jax.jit(lambda images, labels: images.sum() + labels.sum())
        rows = sharding.put_rows(
            lambda part: (
                np.zeros([128, 32, 32, 3], np.uint8)[part],
                np.zeros(128, np.int32)[part],
            ),
            128,
            mesh,
        )
        one(*rows).block_until_ready()
        small = TrainingImages(
            Split(np.zeros([50_000, 1, 1, 1], np.uint8), np.zeros(50_000, np.int32))
        )
        small.order(jax.random.key(0), 0, [128])  # what compiles is no image
        before = memory_mb()
        peak = dict.fromkeys(before, 0.0)
        dataset = data.load_dataset(
            "cifar10", directory=options.data, use_cache=True, validation_examples=1000
        )
        images = TrainingImages(dataset.train)
        feed = Feed(images, mesh, budget_mb=1)
        assert not feed.on_device
        sizes = [128] * (len(dataset.train) // 128)
        _, batches = feed.epoch(images.order(jax.random.key(0), 0, sizes), sizes, 0)
        sent = sent_mb()
        for batch in batches:
            one(**batch).block_until_ready()
            if options.gather:
                sharding.get(batch["images"])
            now = memory_mb()
            peak = {name: max(peak[name], now[name] - before[name]) for name in now}
        found = {**peak, "set": images.nbytes / 2**20, "sent": sent_mb() - sent}
        Path(f"{options.target}.{distributed.current().index}").write_text(json.dumps(found))


def main() -> None:
    """Prints a row for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=["work"])
    parser.add_argument("--data", required=True, help="the archive or folder of CIFAR-10")
    parser.add_argument("--target", type=Path)
    parser.add_argument("--gather", action="store_true", help="gather all images on purpose")
    arrangements.add_flags(parser)
    options = parser.parse_args()
    if options.action == "work":
        work(options)
        return
    print(
        "| processes | the set, MB | anonymous, most of any process, MB | allowed: 1/N + 15 % | "
        "mapped, MB | sent, MB |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        # The first one makes the cache; the last one shows that what is sent would be seen.
        for count, gather in ((1, False), (1, False), (2, False), (4, False), (2, True)):
            target = Path(folder) / f"{count}"
            printed = [Path(f"{target}.{i}.txt") for i in range(count)]
            command = [__file__, "work", f"--data={options.data}", f"--target={target}"]
            command += ["--gather"] if gather else []
            statuses = arrangements.wait(arrangements.start(f"{count}x1", command, printed=printed))
            if any(statuses):
                sys.exit("\n".join(path.read_text() for path in printed))
            found = [json.loads(Path(f"{target}.{i}").read_text()) for i in range(count)]
            most = {name: max(each[name] for each in found) for name in found[0]}
            title = f"{count}, gathering on purpose" if gather else str(count)
            print(
                f"| {title} | {most['set']:.0f} | {most['anonymous']:.0f} | "
                f"{1.15 * most['set'] / count:.0f} | {most['mapped']:.0f} | {most['sent']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
