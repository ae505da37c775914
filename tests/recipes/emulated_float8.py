"""Run a recipe with float8 emulated, so that a CPU can: emulated_float8.py RECIPE ARGUMENTS."""

import functools
import runpy
import sys

from grr.parallel import parallelize
from grr.parallel.float8 import multiply_in_float8

if __name__ == "__main__":
    parallelize.multiply_in_float8 = functools.partial(multiply_in_float8, emulated=True)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
