"""refmamba as a model of lm_eval, by the harness's own command line, on rows that lie on this machine."""

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
{rest}
"""
CHOICES = r"""
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{sol1}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{goal}}"
doc_to_target: sol1
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


def test_the_entry_point_names_the_class() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["lm_eval.models"].strip().partition(" = ")
    module, _, attribute = target.partition(":")
    assert name == "refmamba"
    assert f"class {attribute}(" in (ROOT / Path(*module.split("."))).with_suffix(".py").read_text("utf-8")


def test_the_harness_runs_our_model_and_gets_our_numbers(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = ROOT / "eval_tasks" / "samples" / "piqa.jsonl"
    for name, rest in {"choices": CHOICES, "rolling": ROLLING, "writing": GENERATE}.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, rest=rest))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [
        sys.executable, "-m", "refmamba.eval_tasks.lm_eval_adapter", "--model", "refmamba",
        "--model_args", "pretrained=small,scheme=int8", "--include_path", str(tmp_path), "--tasks", "choices,rolling,writing",
        "--limit", "4",
    ]  # fmt: skip
    theirs = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert theirs.returncode == 0, theirs.stderr
    command = [sys.executable, "-m", "refmamba", "eval", "--scheme", "int8", "--tasks", "piqa", "--limit", "4", "--json"]
    ours = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    expected = json.loads(ours.stdout)["results"]["piqa"]
    for metric in ("acc", "acc_norm"):
        found = re.search(rf"\|{metric} *\|↑ *\|(\d\.\d+)\|", theirs.stdout)
        assert found
        assert float(found[1]) == pytest.approx(expected[f"{metric},none"], abs=1e-4)
    bits = re.search(r"\|bits_per_byte\|↓ *\|(\d+\.\d+)\|", theirs.stdout)
    assert bits
    assert 0.5 < float(bits[1]) < 8
    assert "exact_match" in theirs.stdout


def test_an_argument_that_the_model_does_not_know_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    code = "from refmamba.eval_tasks.lm_eval_adapter import RefmambaLM; RefmambaLM(pretrained='small', schema='int8')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "unexpected keyword argument 'schema'" in done.stderr
