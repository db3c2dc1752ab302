"""The tables of tools/compare_dtypes.py, from folders of finished runs."""

import json

from tools import compare_dtypes


def write_run(folder, kind, losses, auroc):
    workdir = compare_dtypes.run_folder(folder, "convirt", kind)
    workdir.mkdir(parents=True)
    rows = [{"step": step, "loss": loss, "gradient_norm": 1.0} for step, loss in enumerate(losses)]
    rows.append({"step": len(losses), "grounding/cnr": 1.0})  # a validation has no loss
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "metrics.json").write_text(json.dumps({"zero_shot/auroc_macro": auroc, "steps": 9}))


def test_each_kind_of_run_is_a_column(tmp_path):
    full, other, half = compare_dtypes.KINDS
    write_run(tmp_path, full, [90.0, 1.0, 2.0, 3.0, 4.0, 5.0], 0.75)
    write_run(tmp_path, half, [2.0, 4.0], 0.625)
    losses, metrics = compare_dtypes.read_tables(tmp_path, ["convirt", "plan"])
    assert losses.splitlines()[2:] == ["| ConVIRT | loss | 3.00 |  | 3.00 |"]
    (row,) = metrics.splitlines()[2:]
    assert row.startswith("| ConVIRT | zero_shot: ") and row.endswith("| 0.750 |  | 0.625 |")
    assert losses.splitlines()[0].endswith(f"| {full.label} | {other.label} | {half.label} |")


def test_a_failed_run_is_named_and_a_finished_one_is_kept(tmp_path):
    kind = compare_dtypes.KINDS[0]
    outcome = compare_dtypes.train(tmp_path / "a", "convirt", ["--config.no_field=1"])
    assert "exit code 2" in outcome and str(tmp_path / "a") in outcome
    write_run(tmp_path, kind, [1.0], 0.5)
    folder = compare_dtypes.run_folder(tmp_path, "convirt", kind)
    assert compare_dtypes.train(folder, "convirt", []) == "finished earlier"
