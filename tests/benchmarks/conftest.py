"""`benchmarks` lies beside the package and is not installed: find it, last, so that nothing of the repository hides anything."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
