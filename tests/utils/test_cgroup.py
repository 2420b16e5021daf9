"""Quotas of CPU time, read from trees of files as Linux shows them."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.utils.cgroup import cpu_quota

V1 = "31 23 0:29 {mounted} {at} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "41 31 0:38 {mounted} {at} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
OTHERS = (
    "23 1 0:20 / / rw - ext4 /dev/sda rw\n"
    "32 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "33 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def machine(root, groups, mounts, files):
    """`files`: text by path. None instead of `groups` or `mounts`: no such file."""
    for path, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        if text is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    return root


def v2(group, mounted="/", at="/sys/fs/cgroup"):
    return {"groups": f"0::{group}\n", "mounts": OTHERS + V2.format(mounted=mounted, at=at)}


def v1(group, mounted="/", at="/sys/fs/cgroup/cpu,cpuacct"):
    groups = f"9:name=systemd:/other\n4:memory:/other\n3:cpuset:/other\n2:cpu,cpuacct:{group}\n0::/other\n"
    return {"groups": groups, "mounts": OTHERS + V1.format(mounted=mounted, at=at)}


def v1_files(folder, quota, period=100_000):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


TOP, TOP1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("tree", "files", "quota"),
    [
        (v2("/"), {f"{TOP}/cpu.max": "100000 100000\n"}, 1.0),  # a container, which sees its own group as the root
        (v2("/"), {f"{TOP}/cpu.max": "150000 100000\n"}, 1.5),
        (v2("/"), {f"{TOP}/cpu.max": "5000 10000\n"}, 0.5),
        (v2("/"), {f"{TOP}/cpu.max": "max 100000\n"}, None),
        (v2("/"), {}, None),  # the group of all has no such file
        (v2("/a/b"), {f"{TOP}/a/cpu.max": "200000 100000", f"{TOP}/a/b/cpu.max": "max 100000"}, 2.0),
        (v2("/a/b"), {f"{TOP}/a/cpu.max": "200000 100000", f"{TOP}/a/b/cpu.max": "300000 100000"}, 2.0),
        (v2("/a/b"), {f"{TOP}/a/b/cpu.max": "300000 100000", f"{TOP}/a/other/cpu.max": "100000 100000"}, 3.0),
        (v2("/a"), {f"{TOP}/a/cpu.max": "200000 100000", f"{TOP}/a/b/cpu.max": "100000 100000"}, 2.0),  # not its own
        # started outside, with the outside's names: what is mounted is its own
        (v2("/docker/1f"), {f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        (v2("/docker/1f", mounted="/docker/1f"), {f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        (v2("/docker/1f/x", mounted="/docker/1f"), {f"{TOP}/x/cpu.max": "100000 100000"}, 1.0),
        (v2("/docker/2e", mounted="/docker/1f"), {f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        (v2("/../2e"), {f"{TOP}/cpu.max": "200000 100000", "sys/fs/2e/cpu.max": "100000 100000"}, 2.0),
        (v2("/", at="/mnt/my\\040groups"), {"mnt/my groups/cpu.max": "200000 100000"}, 2.0),
        (v1("/"), v1_files(TOP1, -1), None),
        (v1("/"), v1_files(TOP1, 250_000), 2.5),
        (v1("/a/b"), v1_files(f"{TOP1}/a/b", -1) | v1_files(f"{TOP1}/a", 50_000, 25_000), 2.0),
        (v1("/docker/1f", mounted="/docker/1f"), v1_files(TOP1, 50_000), 0.5),
        (v1("/a"), {f"{TOP1}/a/cpu.cfs_quota_us": "100000"}, None),  # no period
        ({"groups": None, "mounts": None}, {}, None),  # not Linux
        ({"groups": None, "mounts": v2("/")["mounts"]}, {f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        ({"groups": "0::/a\n", "mounts": None}, {f"{TOP}/a/cpu.max": "200000 100000"}, None),
    ],
)
def test_the_least_quota_of_the_groups_around_a_process(tmp_path, tree, files, quota):
    assert cpu_quota(machine(tmp_path, **tree, files=files)) == quota


def test_both_versions_beside_each_other(tmp_path):
    mounts = V1.format(mounted="/", at=f"/{TOP1}") + V2.format(mounted="/", at="/sys/fs/cgroup/unified")
    files = v1_files(f"{TOP1}/a", 300_000) | {"sys/fs/cgroup/unified/b/cpu.max": "200000 100000"}
    assert cpu_quota(machine(tmp_path, "2:cpu,cpuacct:/a\n0::/b\n", mounts, files)) == 2.0


@pytest.mark.parametrize(
    "said", ["", "\n", "many 100000", "100000", "1 2 3", "0 100000", "100000 0", "-5 100000", "1.5 1"]
)
def test_a_file_that_says_something_else_is_no_quota(tmp_path, said):
    assert cpu_quota(machine(tmp_path, **v2("/"), files={f"{TOP}/cpu.max": said})) is None


def test_what_cannot_be_read_is_no_quota(tmp_path):
    root = machine(tmp_path, **v2("/a"), files={f"{TOP}/cpu.max": "200000 100000"})
    (root / TOP / "a/cpu.max").mkdir(parents=True)
    assert cpu_quota(root) == 2.0
    (root / TOP / "cpu.max").write_bytes(b"\xff\xfe\0")
    assert cpu_quota(root) is None
    (root / "proc/self/mountinfo").write_bytes(b"\xff 1 2\n\n - cgroup2\n")
    assert cpu_quota(root) is None


quotas = st.none() | st.integers(1_000, 6_400_000)


@given(st.lists(quotas, min_size=1, max_size=5), st.integers(0, 4), st.booleans())
def test_any_depth_of_groups(tmp_path_factory, given_quotas, hidden, second):
    """`hidden` groups are outside of what is mounted."""
    names = [f"g{level}" for level in range(len(given_quotas) - 1)]
    hidden = min(hidden, len(names))
    tree = (v2 if second else v1)("/" + "/".join(names), mounted="/" + "/".join(names[:hidden]))
    files, top = {}, TOP if second else TOP1
    for level in range(hidden, len(given_quotas)):
        folder, quota = "/".join([top, *names[hidden:level]]), given_quotas[level]
        said = {f"{folder}/cpu.max": f"{'max' if quota is None else quota} 100000\n"}
        files |= said if second else v1_files(folder, -1 if quota is None else quota)
    found = cpu_quota(machine(tmp_path_factory.mktemp("tree"), **tree, files=files))
    seen = [quota / 100_000 for quota in given_quotas[hidden:] if quota is not None]
    assert found == min(seen, default=None)


def test_this_machine():
    quota = cpu_quota()
    assert quota is None or (quota > 0 and math.isfinite(quota))
    assert re.fullmatch(r"None|\d+\.\d+", str(quota))
