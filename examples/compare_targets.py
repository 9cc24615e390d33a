"""Look before anything is changed: what can be removed, and what each target would remove."""

import ttmpd
from ttmpd.demo.digits import demo_data

QUICK = {"num_samples": 100, "score": "magnitude", "adapt": "none"}


def main() -> None:
    """List the units, then two plans."""
    inspection = ttmpd.inspect("ttmpd.demo:demo_model", timed=False)
    print(f"{len(inspection.units)} units hold {inspection.removable_share:.0%} of the multiply-accumulates")
    targets = [ttmpd.Target(macs=share) for share in (0.8, 0.6)]
    digits = demo_data().unlabelled
    for planned in ttmpd.preview("ttmpd.demo:demo_model", digits, targets=targets, **QUICK).plans:
        removed = ", ".join(removal.unit.id for removal in planned.plan.removals)
        print(f"{planned.target}: would remove {removed}")


if __name__ == "__main__":
    main()
