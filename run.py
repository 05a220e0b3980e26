"""Run cells: `python run.py method=teal sparsity=0.5`; sweep: `python run.py -m method=teal,random sparsity=0.4,0.5`.

The same command again does only what is missing. `plan=true` prints the plan. Hydra's own flags (--help, --cfg job,
--info) work as usual. `dynact run` and `python -m harness run` are the same.
"""

import sys

from harness.run.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
