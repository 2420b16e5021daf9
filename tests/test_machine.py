import pytest

from pmm import machine


@pytest.mark.parametrize(
    ("cpuinfo", "overflows"),
    [
        ("flags\t\t: fpu sse2 avx2 fma", True),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512bw", True),
        ("model name\t: x\nflags\t\t: fpu sse2 avx2 avx512_vnni\nbugs\t\t: spectre", False),
        ("flags\t\t: sse2 avx_vnni", False),
        ("flags\t\t: sse2 amx_int8", False),
        ("Features\t: fp asimd asimddp", False),
        (None, False),
    ],
)
def test_where_sums_of_int8_products_overflow(tmp_path, monkeypatch, cpuinfo, overflows):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(f"processor\t: 0\n{cpuinfo}\n\nprocessor\t: 1\n{cpuinfo}\n")
    monkeypatch.setattr(machine, "Path", lambda name: path)
    assert machine.int8_overflows.__wrapped__() is overflows
