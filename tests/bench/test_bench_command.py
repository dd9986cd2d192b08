# SPDX-License-Identifier: Apache-2.0
"""`python -m torch_kernels bench`: what it offers, what it writes, and that a wheel has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from torch_kernels import _native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from harness import ceilings, command
from presets import MODELS, find

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a short run, without measuring the machine."""
    monkeypatch.setattr(ceilings, "_bandwidth_sources", lambda device, cache: {"fixed": lambda: 1e9})
    monkeypatch.setattr(ceilings, "_peak_sources", lambda device, dtype: {"fixed": lambda: 1e12})
    return ["--device", "cpu", "--quick", "--time", "0.01", "--memory", "0.01"]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    return capsys.readouterr().err


def test_alone_it_lists_ops_and_presets(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert [name for name in (*command.OPS, *MODELS) if f"  {name} " not in printed] == []


def test_every_benchmark_of_an_op_is_offered():
    assert sorted(command.OPS) == sorted(path.parent.name for path in (ROOT / "csrc").glob("*/kernels.h"))


@pytest.mark.parametrize("op", command.OPS)
def test_presets_make_cases_of_their_model(op):
    serving = [name for name, model in MODELS.items() if op in model.ops]
    assert serving
    for device in ("cpu", "cuda"):
        cases = [case for case in command._cases(op, serving) if device in case.devices]
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert [name for name in serving if not any(case.startswith(f"{name}-") for case in names)] == []
        # Models share no curve.
        series = {(case.curve.series, case.name.partition(name)[1]) for case in cases if case.curve for name in serving}
        assert all(sum(name in title for name in serving) == 1 for title, _ in series)


@pytest.mark.parametrize(
    ("name", "key"),
    [("llama3-8b", "llama3-8b"), ("llama-3-8b", "llama3-8b"), ("Llama-3.1-8B", "llama3-8b"), ("OPT 1.3B", "opt-1.3b")],
)
def test_presets_are_found_by_either_name(name, key):
    assert find(name) == key


def test_shapes_are_whole():
    for name, model in MODELS.items():
        assert model.heads % model.kv_heads == 0, name
        assert model.head_size % 8 == 0, name


def test_what_cannot_be_done_is_said(capsys, tmp_path):
    assert "no benchmark of softmax; there are graph_attention" in refusal(["softmax"], capsys)
    assert "no preset 'gpt-9'; there are llama2-7b" in refusal(["sea", "--preset", "gpt-9"], capsys)
    assert "--json needs a folder" in refusal(["sea", "int4_linear", "--json", "one.json"], capsys)
    assert "--from takes --html" in refusal(["--from", "somewhere"], capsys)
    assert "nowhere.json: No such file" in refusal(["--from", "nowhere.json", "--html", "x.html"], capsys)
    (file := tmp_path / "file.json").write_text("no results")
    assert f"{file} is no JSON" in refusal(["--from", str(file), "--html", "x.html"], capsys)
    assert f"{file} cannot be made" in refusal(["sea", "--html", str(file / "x.html")], capsys)
    assert f"{tmp_path} is a folder" in refusal(["sea", "--html", str(tmp_path)], capsys)
    assert f"{file / 'x'} cannot be made" in refusal(["sea", "--json", str(file / "x")], capsys)
    assert "'tpu' is neither cpu nor cuda[:index]" in refusal(["sea", "--device", "tpu"], capsys)
    assert re.search(r"torch .* sees (no|\d+) GPU", refusal(["sea", "--device", "cuda:99"], capsys))
    assert "argument --threads: 0 is not above 0" in refusal(["sea", "--threads", "0"], capsys)
    assert command.main(["sea", "--device", "cpu", "--cases", "nothing"]) == 1
    assert "sea: no case matches 'nothing' on cpu; there are layer-t1024-fp32, " in capsys.readouterr().err
    assert command.main(["sea", "--preset", "llama3-8b"]) == 1
    assert "sea: nothing to measure for llama3-8b" in capsys.readouterr().err


def test_repro_names_the_program(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMP_", "MKL_", "TORCH_", "TRITON_"))]:
        monkeypatch.delenv(name)
    assert command.main(["sea", "--preset", "opt-125m", "--device", "cpu", "--html", "x.html", "--repro"]) == 0
    expected = "python -m torch_kernels bench sea --preset opt-125m --device cpu --memory 2.0"
    assert capsys.readouterr().out.strip() == expected


def test_a_preset_is_measured_and_reported(quick, tmp_path, capsys):
    wanted = ["int4_linear", "tree_attention", "--preset", "qwen3-0.6b", "--cases", "qkv-m1-,qkv-m4-", "--peers", "x"]
    report = tmp_path / "report.html"
    assert command.main([*wanted, *quick, "--json", str(tmp_path / "results"), "--html", str(report)]) == 0
    run = json.loads((tmp_path / "results" / "int4_linear.json").read_text(encoding="utf-8"))
    assert list(run["cases"]) == ["qwen3-0.6b-qkv-m1-exact-bf16", "qwen3-0.6b-qkv-m4-exact-bf16"]
    said = capsys.readouterr().err
    assert "tree_attention: no case matches" in said
    assert "int4_linear: no peer x in these cases; there are dense-bf16, " in said
    text = report.read_text(encoding="utf-8")
    assert "qwen3-0.6b-qkv-m4-exact-bf16" in text
    assert run["command"] in text

    again = tmp_path / "again.html"
    assert command.main(["--from", str(tmp_path / "results"), "--html", str(again)]) == 0
    assert again.read_text(encoding="utf-8") == text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the Python files alone, unpacked; the compiled module of this environment is put beside them."""
    backend = pytest.importorskip("scikit_build_core.build", reason="needs scikit-build-core")
    target = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = backend.build_wheel(str(target), {"wheel.cmake": "false", "wheel.py-api": "py3"})
    finally:
        os.chdir(before)
    with zipfile.ZipFile(target / name) as archive:
        archive.extractall(target / "site")
    compiled = Path(_native.cpu.__file__)
    (target / "site" / "torch_kernels" / compiled.name).symlink_to(compiled)
    # Keeps an editable install from coming first.
    (target / "site" / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
    )
    return target / "site"


def test_a_wheel_has_the_benchmarks_and_no_results(wheel):
    packed = {
        path.relative_to(wheel / "torch_kernels" / "bench") for path in (wheel / "torch_kernels" / "bench").rglob("*.*")
    }
    sources = {path.relative_to(ROOT / "bench") for path in (ROOT / "bench").rglob("*") if path.is_file()}
    wanted = {
        path
        for path in sources
        if path.parts[0] != "results" and path.name not in ("report.py", "README.md") and path.suffix != ".pyc"
    }
    assert packed == wanted


def test_an_installed_package_measures_itself(wheel, tmp_path):
    options = "--device cpu --cases commit --quick --time 0.02 --memory 0.05 --json --html report.html".split()
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    words = [sys.executable, "-m", "torch_kernels", "bench", "tree_attention", *options]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "tree_attention.json").read_text(encoding="utf-8"))
    assert list(run["cases"]) == ["commit-b8-t64"]
    assert run["commit"] == "unknown"  # rather than that of a repository that the environment happens to be in
    assert "commit-b8-t64" in (tmp_path / "report.html").read_text(encoding="utf-8")
