"""`ttmpd evaluate` on an artifact of the demo."""

import json


def test_evaluate_leaves_used_samples_out(made, data, tmp_path, run, said, demo):
    found = run("evaluate", "--model", made[0], "--data", data, "--labels", data, "--against", demo,
                "--json", tmp_path / "e.json")  # fmt: skip
    assert found.exit_code == 0, said(found)
    assert "90 samples; intervals are 95 % Wilson." in said(found)
    assert "60 samples left out: compression had used them." in said(found)
    assert json.loads((tmp_path / "e.json").read_text())["n_left_out"] == 60
