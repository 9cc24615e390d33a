"""Random networks from what people build: compressed exactly, or refused in our own words.

    python benchmarks/fuzz.py --count 5000

Each network (`ttmpd.testing.random_nets`) is compressed with real timings, written, loaded into a fresh network and
compared with the result; the original must be as it was. Failures are printed with their seed and kept in
results/fuzz_failures.txt, from which `--seed N` repeats one.
"""

import argparse
import collections
import tempfile
import time
import traceback
from pathlib import Path

import ttmpd
from common import RESULTS, stamp
from ttmpd.testing.random_nets import check_random_net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--seed", type=int, help="repeat one")
    args = parser.parse_args()
    seeds = range(args.start, args.start + args.count) if args.seed is None else [args.seed]
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    start = time.monotonic()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[check_random_net(seed, Path(folder) / "out", ttmpd.compress, ttmpd.load)] += 1
            except Exception as error:  # whatever is not ours is what is looked for
                outcomes["failed"] += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(
                    f"seed {seed}: {type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
                )
                print(failures[-1], flush=True)
    print(dict(outcomes), f"{time.monotonic() - start:.0f} s", stamp())
    if failures:
        (RESULTS / "fuzz_failures.txt").write_text("\n".join(failures) + "\n")


if __name__ == "__main__":
    main()
