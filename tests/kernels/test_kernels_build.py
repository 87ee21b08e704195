"""Kernels compiled ahead of time, without a GPU: resources, spills, and the contents of kernels.json."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moesr.kernels import build
from moesr.kernels.assembly import TENSOR_CORE, Resources, disassemble, from_log, loops, with_instructions
from moesr.kernels.plan import ARCHITECTURES, SHARED_BYTES
from moesr.kernels.registry import OPS
from moesr.kernels.report import write_report
from moesr.runtime.devices import compiled_kernels
from moesr.runtime.devices.grid_expressions import evaluate

REPO = Path(build.__file__).parents[1]
SAMPLE = (86, 90)  # without and with asynchronous matrix products
ON_TENSOR_CORES = {"rows", "columns", "columns_cached", "rows_inverse", "inverted_residual", "attention"}


def first_case(op):
    return dataclasses.replace(op, deployed=op.deployed[:1])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The first deployed case of every operator, for two architectures: (directory, its index)."""
    directory = tmp_path_factory.mktemp("kernels") / "built"
    ops = [first_case(op) for op in OPS.values()]
    built = build.build(directory, SAMPLE, ops, cache=tmp_path_factory.mktemp("cache"))
    read = compiled_kernels.read(directory)
    assert read == built, "kernels.json holds what the build returns"
    assert read.toolkit, "the assembler's release is recorded"
    return directory, read


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kernels") / "built"
    return build.build(directory, cache=tmp_path_factory.mktemp("cache"))


def check_resources(content, op):
    """Within the multiprocessor's limits and the operator's stated spills, on tensor cores where said."""
    kernels = {name: k for name, k in content.kernels.items() if k.op == op.name}
    for name, kernel in kernels.items():
        for target, compiled in kernel.targets.items():
            where = f"{name} on {target}"
            assert not any(compiled.hidden.values()), f"{where}: a hidden pointer needs memory"
            if target == "ptx":
                continue
            assert compiled.spill_bytes <= op.max_spill_bytes, where
            assert compiled.shared_bytes <= SHARED_BYTES[int(target[3:])], where
            assert compiled.local_in_loops == 0 or compiled.spill_bytes > 0, where
            if kernel.function in ON_TENSOR_CORES:
                assert compiled.tensor_core > 0, where
    return {target for kernel in kernels.values() for target in kernel.targets}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_resources(sample, op):
    assert check_resources(sample[1], op) == {"sm_86", "sm_90", "ptx"}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_resources_on_every_architecture(everything, op):
    assert check_resources(everything, op) == {*(f"sm_{a}" for a in ARCHITECTURES), "ptx"}


def test_files_are_what_the_json_says(sample):
    directory, content = sample
    for kernel in content.kernels.values():
        for target in kernel.targets.values():
            data = (directory / target.file).read_bytes()
            assert hashlib.sha256(data).hexdigest() == target.sha256
            assert target.entry.encode() in data
            assert list(target.hidden) == ["global_scratch", "profile_scratch"]
            assert target.threads % 32 == 0
    assert {f.relative_to(directory).parts[0] for f in directory.rglob("*") if f.is_file()} == {
        "kernels.json", "ptx", "sm_86", "sm_90", "tables"
    }  # fmt: skip


def test_plans_can_be_launched_from_the_json_alone(sample):
    """Argument types, grids and buffer sizes follow from kernels.json and equal the registry's."""
    directory, content = sample
    assert {t for p in content.plans for t in p.targets} == {"sm_86", "sm_90", "ptx"}
    for entry in content.plans:
        arch = int(entry.targets[0].removeprefix("sm_")) if entry.targets[0] != "ptx" else 89
        plan = OPS[entry.op].plan(entry.shape, entry.dtype, arch)
        types = {n: "i32" if isinstance(v, int) else "fp32" for n, v in entry.scalars.items()}
        types |= {b.name: f"*{b.dtype}" for b in entry.buffers}
        for launch, mine in zip(entry.launches, plan.launches, strict=True):
            kernel = content.kernels[launch.kernel]
            assert tuple(types[a] for a in launch.arguments) == kernel.arguments
            assert set(entry.targets) <= set(kernel.targets)
            assert tuple(evaluate(g, entry.scalars) for g in launch.grid) == plan.grid(mine)
        for buffer, mine in zip(entry.buffers, plan.buffers, strict=True):
            dims = buffer.dims(entry.scalars)
            assert dims == mine.dims(plan.scalars)
            if buffer.role == "table":
                assert (directory / buffer.file).stat().st_size == buffer.nbytes(entry.scalars)


def test_portable_text_names_no_special_architecture(sample):
    directory, _ = sample
    texts = [f.read_text() for f in (directory / "ptx").iterdir()]
    assert texts
    assert all(".target sm_89\n" in t for t in texts), "PTX of sm_90a loads nowhere else"


def assembly(sample, function: str, target: str) -> list[str]:
    """The SASS of all kernels of one function for an architecture."""
    directory, content = sample
    kernels = [k.targets for k in content.kernels.values() if k.function == function]
    return [disassemble(directory / targets[target].file) for targets in kernels if target in targets]


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
@pytest.mark.parametrize("function", ["rows", "rows_inverse"])
def test_rows_of_the_filter_move_sixteen_bytes(sample, function, target):
    """No two-byte access: the compiler sees that a frequency's offset is a multiple of the height."""
    (sass,) = assembly(sample, function, target)
    assert "LDG.E.U16" not in sass and "STG.E.U16" not in sass
    assert re.search(r"\bSTG\.E\.128\b", sass)


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
def test_loop_of_the_inverted_residual(sample, target):
    """The loop over wide channels: two barriers around the scratch, some for operands, none for each tap."""
    (sass,) = assembly(sample, "inverted_residual", target)
    inner = min((loop for loop in loops(sass) if TENSOR_CORE.search("\n".join(loop))), key=len)
    assert sum("BAR.SYNC" in text for text in inner) <= 8
    assert not any("LDG.E.U16" in text for text in inner), "x is read again for every chunk"


@pytest.mark.parametrize("op", OPS)
def test_kernels_import_triton_alone(op):
    tree = ast.parse((REPO / "kernels" / op / "kernel.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= {"triton", "triton.language", "__future__"}, "the source's hash must cover it all"


def test_report(sample, tmp_path):
    write_report(sample[1], tmp_path / "kernels.md")
    text = (tmp_path / "kernels.md").read_text()
    for op in OPS.values():
        assert f"## {op.name}\n\nA test holds spills to {op.max_spill_bytes} bytes." in text
    row = next(line for line in text.splitlines() if line.startswith("| rows |"))
    assert "full512 fp16" in row
    assert row.count(" / ") == 4, "registers, shared memory and spills for each of two architectures"
    barriers, instructions = (int(cell) for cell in row.split(" | ")[-3:-1])
    assert 0 < barriers < instructions


def test_a_new_report_keeps_what_was_written_by_hand(sample, tmp_path):
    page = tmp_path / "kernels.md"
    page.write_text("# Old\n\n## Changes\n\nBefore and after.\n")
    write_report(sample[1], page)
    assert (
        page.read_text().endswith("\n## Changes\n\nBefore and after.\n") and "# Old" not in page.read_text()
    )


def test_a_full_directory_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="not empty"):
        build.main(["--arch", "sm_90", "-o", str(tmp_path)])


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"MOESR_CACHE": "{0}/own", "XDG_CACHE_HOME": "{0}/xdg"}, "own/kernels"),
        ({"XDG_CACHE_HOME": "{0}/xdg"}, "xdg/moesr/kernels"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/moesr/kernels"),
        ({"MOESR_CACHE": "", "XDG_CACHE_HOME": "relative"}, "home/.cache/moesr/kernels"),
    ],
)
def test_compiled_kernels_are_kept_in_the_users_cache(tmp_path, monkeypatch, variables, want):
    for name in ("MOESR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    with build.cache_folder(None) as folder:
        assert folder == tmp_path / want
    with build.cache_folder(tmp_path / "chosen") as folder:
        assert folder == tmp_path / "chosen"


def test_without_a_home_compiled_kernels_are_kept_for_one_build(monkeypatch):
    monkeypatch.setattr("moesr.runtime.system.user_cache.directory", lambda: None)
    with build.cache_folder(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_import_needs_no_home():
    """`Path.home()` raises RuntimeError for a user without a home directory."""
    code = (
        "import pathlib\n"
        "def fail(): raise RuntimeError('no home')\n"
        "pathlib.Path.home = fail\n"
        "import moesr.kernels.build"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*given, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build, "build", refuse)
    with pytest.raises(SystemExit, match="cannot write the kernels"):
        build.main(["--arch", "sm_90", "-o", str(tmp_path / "new")])


def test_unknown_architecture_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        build.main(["--arch", "sm_75", "-o", str(tmp_path / "new")])
    assert error.value.code == 2
    assert "sm_75" in capsys.readouterr().err


def test_assembler_log():
    log = "Function properties for f\n 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    assert from_log(log + "ptxas info : Used 40 registers, 400 bytes cmem[0]", 1024) == Resources(
        40, 1024, 12
    )
    with pytest.raises(ValueError, match="neither registers nor spills"):
        from_log("", 0)


def test_local_memory_counts_inside_loops_alone():
    sass = """
        /*0000*/  LDL R1, [R2] ;
.L_x_0:
        /*0010*/  HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/  STL [R2], R4 ;
        /*0030*/  @P0 BRA `(.L_x_0) ;
        /*0040*/  LDL R1, [R2] ;
.L_x_1:
        /*0050*/  BRA `(.L_x_1);
    """
    counted = with_instructions(Resources(1, 0, 0), sass)
    assert (counted.tensor_core, counted.local_in_loops) == (1, 1)
    (loop,) = loops(sass)
    assert [text.split()[0] for text in loop] == ["HMMA.16816.F32", "STL", "@P0"]


@pytest.mark.parametrize(
    ("expression", "names", "want"),
    [("cdiv(H, 32) * batch", {"H": 33, "batch": 3}, 6), ("max(a - 5, 0) // 2 + min(a, 3)", {"a": 4}, 3)],
)
def test_grid_expressions(expression, names, want):
    assert evaluate(expression, names) == want


@pytest.mark.parametrize("expression", ["__import__('os')", "a.b", "a / 2", "missing + 1", "1.5"])
def test_grids_evaluate_nothing_else(expression):
    with pytest.raises(ValueError, match="cannot evaluate"):
        evaluate(expression, {"a": 4})


def test_grid_substitutes_constants():
    assert build.substitute("cdiv(H, BLOCK) * batch", {"H": 100, "BLOCK": 32}) == "cdiv(100, 32) * batch"
    assert build.substitute("cdiv(H, BLOCK)", {"H": 100, "BLOCK": 32}) == "4"
