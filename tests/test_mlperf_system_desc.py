"""The system description takes from the machine what it tells, and names the rest."""

import json

import pytest

from scalefold.errors import LogError
from scalefold.mlperf.pack.system_desc import FIELDS, describe_system, unfilled

LSCPU = """CPU(s):                112
Model name:            Intel(R) Xeon(R) Platinum 8480C
Thread(s) per core:    2
Core(s) per socket:    56
Socket(s):             2
CPU max MHz:           3800.0000
L1d cache:             5.3 MiB (112 instances)
L2 cache:              224 MiB (112 instances)
L3 cache:              210 MiB (2 instances)
"""
GPU = "NVIDIA H100 80GB HBM3, 81559 MiB, 1980 MHz, 535.129.03, 5, 16\n"
NVLINK = "GPU 0: NVIDIA H100\n" + "".join(f"\t Link {i}: 26.562 GB/s\n" for i in range(18))
SMI = "| NVIDIA-SMI 535.129.03   Driver Version: 535.129.03   CUDA Version: 12.2     |"


def run(command):
    if command[0] == "lscpu":
        return LSCPU
    if command == ["nvidia-smi"]:
        return SMI
    return NVLINK if "nvlink" in command else GPU * 8


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       2113513472 kB\nMemFree: 1 kB\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.3 LTS"\n')
    for i in range(8):
        port = tmp_path / f"sys/class/infiniband/mlx5_{i}/ports/1"
        port.mkdir(parents=True)
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    return tmp_path


def test_a_gpu_node_describes_itself(root):
    system = describe_system(number_of_nodes=260, submitter="Org", system_name="eos", run=run, root=root)
    f = system.fields
    assert list(f) == list(FIELDS)
    assert f["host_processor_core_count"] == "56"
    assert f["host_processor_vcpu_count"] == "112"
    assert f["host_processor_frequency"] == "3.80 GHz"
    assert f["host_memory_capacity"] == "2016 GiB"
    assert f["accelerators_per_node"] == "8"
    assert f["accelerator_model_name"] == "NVIDIA H100 80GB HBM3"
    assert f["accelerator_host_interconnect"] == "PCIe Gen5 x16"
    assert f["accelerator_interconnect"] == "NVLink, 18 links of 26.562 GB/s per direction"
    assert f["host_networking"] == "8x 400 Gb/sec (4X NDR)"
    assert f["operating_system"] == "Ubuntu 22.04.3 LTS"
    assert f["other_software_stack"]["CUDA"] == "12.2"
    assert f["status"] == "Available on-premise"
    assert all(isinstance(v, str) for k, v in f.items() if k != "other_software_stack")
    assert "cooling" in system.to_fill
    assert "accelerator_model_name" not in system.to_fill


def test_a_machine_that_tells_nothing_leaves_texts_empty_and_names_them(tmp_path):
    system = describe_system(number_of_nodes=1, run=lambda command: None, root=tmp_path)
    assert system.fields["accelerators_per_node"] == "0"
    assert {"submitter", "host_processor_model_name", "host_memory_capacity"} <= set(system.to_fill)
    assert not [field for field in system.to_fill if field.startswith("accelerator_")]


def test_what_a_person_states_wins_and_completes_the_description(root):
    known = dict.fromkeys(describe_system(number_of_nodes=1, run=run, root=root).to_fill, "stated")
    system = describe_system(number_of_nodes=1, known=known | {"host_networking": "IB"}, run=run, root=root)
    assert system.to_fill == []
    assert system.fields["host_networking"] == "IB"


def test_unknown_fields_and_statuses_are_refused(root):
    with pytest.raises(LogError, match="no field coolling"):
        describe_system(number_of_nodes=1, known={"coolling": "air"}, run=run, root=root)
    with pytest.raises(LogError, match="status 'available'"):
        describe_system(number_of_nodes=1, status="available", run=run, root=root)


def test_the_file_is_written_once(root, tmp_path):
    system = describe_system(number_of_nodes=1, run=run, root=root)
    file = system.write(tmp_path / "systems" / "one.json")
    assert json.loads(file.read_text()) == system.fields
    with pytest.raises(LogError, match="exists"):
        system.write(file)


def test_absent_fields_count_as_unfilled():
    assert set(unfilled({})) == set(FIELDS) - {
        "hw_notes",
        "sw_notes",
        "accelerator_frequency",
        "accelerator_on-chip_memories",
    }


def test_this_machine_can_be_described():
    fields = describe_system(number_of_nodes=1).fields
    assert fields["other_software_stack"]["mlperf-logging"]
    assert fields["operating_system"]
