"""The networks and images that the benchmarks measure on: the folder that the environment variable ``HALFBYTE_DATA`` names."""

import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("HALFBYTE_DATA", ""))
if not (DATA / "zoo.py").exists():
    sys.exit("set HALFBYTE_DATA to the folder with the networks and images: HALFBYTE_DATA=/path/to/data python ...")
sys.path[:0] = [str(DATA), str(DATA / "models")]
import zoo  # noqa: E402, F401 - for the benchmarks to import from here
