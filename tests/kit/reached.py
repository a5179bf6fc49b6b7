"""`python -m tests.kit.reached`: the last line of `make test`, from what the two processes left in pytest's cache."""

import json
import sys
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "v" / "tritongru"


def main() -> int:
    found = {}
    for kind in ("interpreted", "compiled"):
        path = CACHE / f"reached_{kind}"
        found[kind] = json.loads(path.read_text()) if path.exists() else 0
    print(f"Tests that reached a Triton kernel: {found['interpreted']} interpreted, {found['compiled']} compiled.")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
