"""Runs `launch.py` many times in forks of one process, which has imported everything already.

Each line of standard input is JSON, `{"arguments", "folder", "environment", "stdout", "stderr"}`;
the answer is a line with the exit status. JAX is imported, and starts its devices in a fork alone.
"""

import json
import os
import sys
import traceback
import warnings

import jax
from absl import app

import agr_jax.jobs  # noqa: F401  (what every command imports)
import launch


def run(request: dict) -> None:
    """In the fork: the command, with its own folder, environment and streams."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    sys.argv = [launch.__file__, *request["arguments"]]  # the fields of a config are read there
    app.run(launch.main, argv=sys.argv, flags_parser=launch._parse)


def main() -> None:
    """Answers requests until its input ends."""
    warnings.filterwarnings("ignore", message="os.fork")  # JAX's threads are not started here
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(json.loads(line))
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 0 if not error.code else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
