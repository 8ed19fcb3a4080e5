"""The paper's tables and figures, one file each: which runs they need, at three scales.

`full` is the paper's; `small` is what two CPU cores can do: CIFAR-10, 10,000 training images, a
PreAct-ResNet-18 of width 16, 60 epochs, the setting of `docs/experiments.md`; `digits` takes
minutes and shows that everything works. A file's `get_config(scale)` lists the runs.
`python launch.py --job=sweep --config=configs/paper/FILE.py:SCALE` makes those that are missing,
and `--job=report --workdir=FOLDER` renders what is there.
"""
