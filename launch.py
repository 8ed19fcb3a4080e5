"""Command line: flags to a config, then one job; the README has the commands."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from agr_jax import distributed, jobs
from agr_jax.config import check_field_name
from agr_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, or FILE:PROFILE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; by default runs/<name>.")
_JOB = flags.DEFINE_enum("job", "train", list(jobs.JOBS), "What to do.")
_PART = flags.DEFINE_string("part", None, "I/N: of a sweep's runs, the I-th of N shares.")
# See docs/many-machines.md.
_DISTRIBUTED = flags.DEFINE_string("distributed", "auto", "Find other processes: auto, or off.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.")


def main(argv: list[str]) -> None:
    """Runs the job; a mistake that the user can mend is one line, without a traceback."""
    with jobs.ending_with_one_line():
        if argv[1:]:
            raise UserError(f"unexpected argument {argv[1]!r}: flags look like --config.epochs=10")
        if _CONFIG.value is None and _JOB.value != "report":
            raise UserError("give --config=configs/FILE.py, or --workdir=RUN of an existing run")
        logging.set_verbosity(logging.ERROR)  # Orbax reports every file it writes
        plan = distributed.detect(
            os.environ,
            mode=_DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            processes=_PROCESSES.value,
            process=_PROCESS.value,
        )
        request = jobs.Request(
            _CONFIG.value, Path(_WORKDIR.value) if _WORKDIR.value else None, _PART.value
        )
        distributed.start(plan, {"--job": _JOB.value, "--part": _PART.value})
        status = jobs.JOBS[_JOB.value](request)
        distributed.finish()
        sys.exit(status)


def _with_config_of_run(argv: list[str]) -> list[str]:
    """Without --config=FILE, a run folder's own config.json is the config."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    given = dict(itertools.pairwise(words))
    of_many = given.get("--job") in ("report", "sweep")
    if "--workdir" not in given or of_many or "--config" in given:
        return argv
    own = f"--config={Path(__file__).parent}/configs/from_run.py:{given['--workdir']}"
    return [argv[0], own, *argv[1:]]


def _parse(argv: list[str]) -> list[str]:
    with jobs.ending_with_one_line():
        for flag in argv[1:]:
            name, _, value = flag.removeprefix("--").partition("=")
            if name.startswith("config."):
                check_field_name(name)
            elif name == "config" and value and not Path(value.partition(":")[0]).is_file():
                raise UserError(f"--config: there is no file {value.partition(':')[0]}")
        return flags.FLAGS(_with_config_of_run(argv))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
