"""What `flexkv doctor` says of GPUs and GPUDirect Storage. No test here needs a GPU; some need that there is none."""

import ctypes
from pathlib import Path

import pytest
from flexkv.cli.measure_machine import gds_verdict
from flexkv.config import load
from flexkv.doctor import cuda_driver, cufile, gds, gds_measure, gpu, nvml
from flexkv.doctor.drives import Mount
from flexkv.doctor.finding import Verdict

pytestmark = pytest.mark.usefixtures("clean_environment")

no_gpu = pytest.mark.skipif(nvml.driver_is_there(), reason="there is a GPU")
LIBRARY_OF_OTHERS = "libc.so.6"  # has none of the functions


def one(link: nvml.Link | None, most: nvml.Link | None) -> nvml.Gpu:
    return nvml.Gpu(0, "NVIDIA H200", "0000:3b:00.0", link, most)


def test_a_link_with_all_its_lanes() -> None:
    found = gpu.link(one(nvml.Link(5, 16), nvml.Link(5, 16)))
    assert (found.verdict, found.found) == (Verdict.OK, "NVIDIA H200, 0000:3b:00.0, PCIe 5 x16 of 5 x16")
    resting = gpu.link(one(nvml.Link(1, 16), nvml.Link(5, 16)))
    assert resting.verdict is Verdict.OK
    assert "rises under load" in resting.found
    assert gpu.link(one(nvml.Link(5, 8), nvml.Link(5, 16))).verdict is Verdict.BETTER
    assert gpu.link(one(None, None)).verdict is Verdict.OK


@no_gpu
def test_a_machine_without_a_driver() -> None:
    (found,) = gpu.check_gpus(None)
    assert found.verdict is Verdict.BETTER
    assert nvml.LIBRARY in found.found


def test_half_a_driver_is_wrong(tmp_path: Path) -> None:
    assert not nvml.driver_is_there(tmp_path)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    assert nvml.driver_is_there(tmp_path)
    assert gpu.no_driver("libnvidia-ml.so.1: no such file", kernel_part=True).verdict is Verdict.WRONG


def test_libraries_that_lack_what_is_called_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(nvml.NvmlError, match=r"^nvmlInit_v2: the driver is too old for it$"):
        nvml.read_driver(LIBRARY_OF_OTHERS)
    with pytest.raises(cuda_driver.CudaError, match=r"^cuInit: the driver does not have it$"):
        cuda_driver.CudaDriver(LIBRARY_OF_OTHERS)
    with pytest.raises(cuda_driver.CudaError, match="cannot be loaded"):
        cuda_driver.CudaDriver(str(tmp_path / "none.so"))
    with pytest.raises(cufile.CuFileError, match=r"this cuFile does not have it$"):
        cufile.CuFile(ctypes.CDLL(LIBRARY_OF_OTHERS), 0, 0, 0)


@no_gpu
def test_our_cuda_library_says_why_it_opens_nothing() -> None:
    core = pytest.importorskip("flexkv._core")
    found = gpu.cuda_library(core)
    assert found.verdict is Verdict.WRONG
    assert found.found


# ---- NUMA


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    for node, cpus in (("node0", "0-3,8"), ("node1", "4-7"), ("node2", "")):  # the last one has memory only
        (tmp_path / "devices/system/node" / node).mkdir(parents=True)
        (tmp_path / "devices/system/node" / node / "cpulist").write_text(cpus + "\n")
    for address, node in (("0000:3b:00.0", "1"), ("0000:5e:00.0", "-1")):
        (tmp_path / "bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address / "numa_node").write_text(node + "\n")
    return tmp_path


def test_the_node_of_a_gpu(two_nodes: Path) -> None:
    assert gpu.numa_node("0000:3b:00.0", two_nodes) == 1
    assert gpu.numa_node("0000:5e:00.0", two_nodes) is None
    assert gpu.numa_node("0000:ff:00.0", two_nodes) is None


@pytest.mark.parametrize(
    ("gpus", "cpus", "verdict"),
    [
        ({0: 1}, {4, 5}, Verdict.OK),
        ({0: 1}, {0, 8}, Verdict.BETTER),  # on the other node
        ({0: 1}, {0, 4}, Verdict.BETTER),  # on either
        ({0: 0, 1: 1}, {0, 4}, Verdict.OK),
        ({0: 0, 1: 1}, {0}, Verdict.BETTER),
        ({0: None}, {0}, Verdict.OK),
    ],
)
def test_host_memory_beside_the_gpu(
    two_nodes: Path, gpus: dict[int, int | None], cpus: set[int], verdict: Verdict
) -> None:
    found = gpu.numa(gpus, two_nodes, cpus)
    assert found.verdict is verdict
    assert found.found.startswith("2 nodes; ")
    assert ("numactl" in found.advice) == (verdict is Verdict.BETTER)


def test_one_node(tmp_path: Path) -> None:
    assert gpu.numa({0: 0}, tmp_path).found == "one node"


# ---- GPUDirect Storage


def test_what_lets_drives_write_to_gpus(tmp_path: Path) -> None:
    through, why_not = gds.kernel_support(tmp_path)
    assert not through
    assert "nvidia-fs is not loaded" in why_not and "no PCI P2PDMA" in why_not
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/kallsyms").write_text("0 t x\n0 d p2pdma_pgmap_ops\n")
    (tmp_path / "proc/driver/nvidia/params").write_text('RegistryDwords: ""\n')
    assert "does not offer P2PDMA" in gds.kernel_support(tmp_path)[1]
    (tmp_path / "proc/driver/nvidia/params").write_text('RegistryDwords: "RMForceStaticBar1=1;"\n')
    assert gds.kernel_support(tmp_path) == ("PCI P2PDMA is offered", "")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia-fs0").touch()
    assert gds.kernel_support(tmp_path) == ("nvidia-fs is loaded", "")


@pytest.mark.parametrize(
    ("mount", "why"),
    [
        (Mount("ext4", "nvme0n1", "rw"), ""),
        (Mount("xfs", "nvme1n1", "rw"), ""),
        (Mount("ext4", "nvme0n1", "rw,data=writeback"), "ext4 must be mounted with data=ordered"),
        (Mount("ext4", "vda"), "vda is no NVMe drive"),
        (Mount("btrfs", "nvme0n1"), "btrfs is not ext4 or xfs"),
    ],
)
def test_file_systems_that_cufile_knows(mount: Mount, why: str) -> None:
    assert gds.file_system_refusal(mount) == why


def test_the_probe_is_one_line_and_nothing_to_do(tmp_path: Path) -> None:
    found = gds.check_gds(load())
    assert (found.verdict, found.advice) == (Verdict.OK, "")
    assert "there is no SSD tier. Blocks go through host memory" in found.found
    memory = load(extra={"ssd_cache_gb": 1, "ssd_cache_dir": "/dev/shm"})
    assert "/dev/shm: tmpfs is not ext4 or xfs" in gds.check_gds(memory).found


@no_gpu
def test_a_comparison_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    directory = tmp_path / "nvme"
    directory.mkdir()
    report = gds_measure.compare(str(directory))
    assert list(report) == ["error"]
    assert "cannot be loaded" in report["error"]
    assert "\n" not in report["error"]
    assert list(directory.iterdir()) == []
    assert "No such file or directory" in gds_measure.compare(str(tmp_path / "none"))["error"]


def test_a_measuring_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert gds_measure.compare(str(tmp_path)) == {"error": "the measuring process ended with code 1: no message"}


def test_the_verdict() -> None:
    def report(*rates: tuple[float, float]) -> dict[str, object]:
        return {"mode": "direct", "rows": [{"cufile": cufile * 1e9, "host": host * 1e9} for cufile, host in rates]}

    slower = "GPUDirect Storage (direct): 3.00 GB/s at best, 4.00 through host memory: nothing to gain"
    assert gds_verdict(report((1, 2), (3, 4))) == slower
    assert "1.50 times as fast" in gds_verdict(report((6, 2), (3, 4)))
