"""The averaging kernel: what it computes, in Triton's interpreter, and what compilers make of it, with no GPU."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.interpreted import cases, needs_triton, run_interpreted

pytestmark = needs_triton
CASES = "tests.support.fused_kernel_cases"
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    return run_interpreted(CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", cases(CASES))
def test_interpreted(outcomes, case):
    if outcomes[case]:
        pytest.fail(outcomes[case], pytrace=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the kernel of so many profiles becomes on a target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from nitrous_ema.averaging.kernels.fused_kernel import BLOCK_ELEMENTS, NUM_WARPS, average_blocks

    pointers = {f"flat_{profile}": "*fp32" for profile in range(4)}
    signature = {
        "tensors": "*i64",
        "blocks": "*i32",
        "allowed": "*u8",
        "first_tensor": "i32",
        "first_block": "i32",
        **pointers,
    }
    signature |= {f"weight_{profile}": "fp32" for profile in range(4)} | {"PROFILES": "constexpr", "BLOCK": "constexpr"}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if name in pointers}

    def build(target: str, profiles: int):
        source = ASTSource(average_blocks, signature, {"PROFILES": profiles, "BLOCK": BLOCK_ELEMENTS}, aligned)
        gpu = GPUTarget("cuda", int(target[3:]), 32) if target in NVIDIA else GPUTarget("hip", target, 64)
        return compile(source, target=gpu, options={"num_warps": NUM_WARPS, "enable_fp_fusion": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield build


def profiles_of(*numbers):
    """Numbers of profiles; all but two are slow, because each is compiled anew for each target."""
    return [number if number == 2 else pytest.param(number, marks=pytest.mark.slow) for number in numbers]


@pytest.mark.parametrize("profiles", profiles_of(1, 2, 4))
@pytest.mark.parametrize("target", NVIDIA)
def test_averages_move_in_accesses_of_sixteen_bytes(compiled, target, profiles):
    code = compiled(target, profiles).asm["ptx"]
    # A thread has 16 elements of a block: 4 accesses to each average, for each of 3 types, whether its parameters are
    # aligned or not; 4 to aligned parameters, of 16 bytes for float32 and of 8 for the other two.
    assert len(re.findall(r"st\.global\S*\.v4\.b32", code)) == 4 * 3 * 2 * profiles
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) == 4 * 3 * 2 * profiles + 4
    assert len(re.findall(r"ld\.global\S*\.v2\.b32", code)) == 2 * 4


@pytest.mark.parametrize("profiles", profiles_of(1, 2, 4))
@pytest.mark.parametrize("target", AMD)
def test_averages_move_in_wide_accesses_on_amd(compiled, target, profiles):
    code = compiled(target, profiles).asm["amdgcn"]
    assert code.count("store_dwordx4") == 2 * 3 * 2 * profiles  # a thread has 8 elements
    assert code.count("load_dwordx4") >= 2 * 3 * 2 * profiles + 2


@pytest.mark.parametrize("profiles", profiles_of(1, 2, 3, 4))
@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_nothing_goes_through_shared_or_local_memory(compiled, target, profiles):
    kernel = compiled(target, profiles)
    assert kernel.metadata.shared == 0
    if target in AMD:
        assert (
            re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"]) == ["0"] * 2
        )
    else:
        assert ".local" not in kernel.asm["ptx"]
        assert not re.search(r"\b(?:LDL|STL)\b", machine_code(kernel))


@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_products_are_rounded_before_they_are_added(compiled, target):
    kernel = compiled(target, 2)
    if target in AMD:  # fma_mix with a factor of 1 only converts float16
        fused = re.findall(r"^\s*v_(?:pk_)?(?:fma|mad_f|mac_f).*$", kernel.asm["amdgcn"], re.MULTILINE)
        assert [line for line in fused if "fma_mix" not in line or "1.0" not in line] == []
    else:
        assert "fma" not in kernel.asm["ptx"]
        assert "FFMA" not in machine_code(kernel)


def machine_code(kernel) -> str:
    """What the GPU runs, by the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = kernel.asm["cubin"]
    path = Path(kernel.metadata_group[next(name for name in kernel.metadata_group if name.endswith(".cubin"))])
    assert path.read_bytes() == binary
    return subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """Everything is compiled for a GPU that is not there, and nothing launched: the list of what was compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    from nitrous_ema.averaging.kernels.fused_kernel import average_blocks

    seen, run = [], average_blocks.run
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(average_blocks, "run", lambda *args, warmup, **kwargs: run(*args, warmup=True, **kwargs))
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **evidence: seen.append(evidence["compile"])
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(average_blocks, "device_caches", defaultdict(average_blocks.create_binder))
    return seen


@pytest.mark.parametrize("profiles", [1, 4, 6])
def test_no_launch_compiles_after_the_rehearsal(compilations, profiles):
    from nitrous_ema.averaging.kernels import fused_kernel

    with pytest.raises(RuntimeError, match="wrong by"):  # nothing was launched
        fused_kernel.rehearse(torch.device("cpu"), profiles)
    rehearsed = len(compilations)
    flats = [torch.zeros(64) for _ in range(profiles)]
    tables = torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int32)
    for tensors, blocks in (tables, [table[1:] for table in tables]):  # aligned to 16 bytes, and not
        for number in (0, 1, 2, 15, 16, 17, 32, 1 << 20):
            for count in (1, 16, 33):
                for weight in (1.0, 0.5, 0.0):
                    ends = number, number, number + count
                    fused_kernel.launch(tensors, blocks, *ends, flats, [weight] * profiles, torch.tensor(True))
    assert 1 <= rehearsed <= 2
    assert len(compilations) == rehearsed
    assert not any(made["enable_fp_fusion"] for made in compilations)
