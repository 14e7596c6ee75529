"""Every shipped system: loads, plans, renders to a reviewed job file that shellcheck accepts; what launch refuses.

Longer than 400 lines, because it has one test per thing that a job file must say or refuse.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalefold.cli import app
from scalefold.config import Config, load_config
from scalefold.errors import ConfigError
from scalefold.launch.render import in_named_phase, render_sbatch
from scalefold.launch.submit import find_project_dir, submit
from scalefold.scaling.from_config import expectations, plan_config, simulate_config, system_spec

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "data" / "launch"
SYSTEMS = sorted(file.stem for file in (REPOSITORY / "configs").glob("*.yaml"))
REWRITE = "SCALEFOLD_REWRITE_GOLDEN=1 pytest tests/test_launch.py -k golden"
PROJECT = Path("/home/me/scalefold")


def config_file(system: str) -> Path:
    return REPOSITORY / "configs" / f"{system}.yaml"


def load(system: str, *overrides: str) -> Config:
    return load_config(config_file(system), overrides).config


def render(system: str, *overrides: str) -> str:
    config = in_named_phase(load(system, *overrides), None)
    return render_sbatch(config, PROJECT / "configs" / f"{system}.yaml", PROJECT, overrides)


BENCHMARK_SYSTEMS = [system for system in SYSTEMS if load(system).training.init_checkpoint]


def shellcheck(*files: Path) -> None:
    done = subprocess.run([shutil.which("shellcheck") or "shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_renders_to_its_golden_job_file_which_shellcheck_accepts(system: str) -> None:
    text, golden = render(system), GOLDEN / f"{system}.sbatch"
    if os.environ.get("SCALEFOLD_REWRITE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text(), f"the job file changed; review it and run: {REWRITE}"
    shellcheck(golden)


def test_every_golden_file_belongs_to_a_system() -> None:
    assert sorted(file.stem for file in GOLDEN.glob("*.sbatch")) == SYSTEMS


def test_the_launch_scripts_pass_shellcheck() -> None:
    shellcheck(*(REPOSITORY / "launch").glob("*.sh"))


@pytest.mark.parametrize("system", BENCHMARK_SYSTEMS)
def test_a_benchmark_system_states_the_minutes_and_memory_that_the_plan_gives(system: str) -> None:
    config = load(system)
    assert (config.expected_minutes, config.expected_peak_gib) == expectations(config)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s not in ("base", "tiny")])
def test_a_system_is_called_like_its_file(system: str) -> None:
    assert load(system).system == system


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_shows_plans_and_launches_dry(system: str) -> None:
    for command in (["show"], ["plan"], ["launch", "--dry-run", "--project-dir", str(PROJECT)]):
        done = CliRunner().invoke(app, [command[0], str(config_file(system)), *command[1:]])
        assert done.exit_code == 0, (command, done.output)
        assert len(done.output.splitlines()) > 8


@pytest.mark.parametrize(
    ("system", "gpus", "dap", "train", "evaluate", "batch"),
    [
        ("h100_1x1", 1, 1, 1, 0, 128),
        ("dgx_h100_1x8", 8, 1, 8, 0, 128),
        ("dgx_b200_1x8", 8, 1, 8, 0, 128),
        ("eos_h100_8x8", 64, 1, 64, 0, 128),
        ("eos_h100_16x8_weak", 128, 1, 128, 0, 128),
        ("eos_h100_32x8", 256, 1, 224, 32, 224),
        ("eos_h100_64x8_dap2", 512, 2, 480, 32, 240),
        ("eos_h100_128x8_dap4", 1024, 4, 992, 32, 248),
        ("eos_h100_260x8_dap8", 2080, 8, 2048, 32, 256),
        ("perlmutter_a100_224x4_dap4", 896, 4, 872, 24, 218),
    ],
)
def test_the_benchmark_systems_have_the_shape_of_their_name(
    system: str, gpus: int, dap: int, train: int, evaluate: int, batch: int
) -> None:
    config = load(system)
    p, per_node = config.parallel, config.parallel.gpus_per_node
    assert (p.world_size, p.dap_size, p.num_train_ranks, p.num_eval_ranks) == (gpus, dap, train, evaluate)
    assert config.training.global_batch_size == batch
    assert f"_{p.nodes}x{per_node}" in system
    assert evaluate % per_node == 0, "evaluation ranks fill whole nodes, so that a DAP group never spans two"
    assert config.micro_batch_size == 1
    assert config.parallel.cores_per_node is not None
    assert per_node + per_node // dap * config.data.num_workers <= config.parallel.cores_per_node
    spec = system_spec(config)
    assert (spec.world_size, spec.dp_size, spec.is_benchmark) == (gpus, p.dp_size, True)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if load(s).launch.repeats > 1 or load(s).launch.instances > 1])
def test_submission_runs_are_never_resumed_drop_caches_and_draw_their_seeds(system: str) -> None:
    config = load(system)
    assert not config.launch.requeue
    assert config.launch.drop_caches_command
    assert config.training.seed is None
    assert config.launch.repeats * config.launch.instances >= 10
    planned = plan_config(config_file(system))
    assert planned.fits
    assert planned.minutes is not None
    assert config.launch.repeats * (planned.minutes + 5) < config.launch.time_limit_min


def test_the_plan_of_a_small_model_stays_open() -> None:
    assert not system_spec(load("tiny")).is_benchmark
    assert plan_config(config_file("cpu_2x2")).minutes is None
    assert system_spec(load("eos_h100_8x8", "data.max_extra_msa=512")).is_benchmark is False


def test_a_simulation_from_a_file_spreads_around_the_plan() -> None:
    study = simulate_config(config_file("eos_h100_8x8"), ["training.global_batch_size=128"], kind="guarded", runs=4)
    planned = plan_config(config_file("eos_h100_8x8"), kind="guarded").minutes
    assert planned is not None
    assert 0.7 * planned < study.score_minutes < 2 * planned


def test_words_that_the_plan_does_not_know_are_refused() -> None:
    with pytest.raises(ConfigError, match="--kind fast: must be one of measured, published, guarded, target"):
        plan_config(config_file("eos_h100_8x8"), kind="fast")
    with pytest.raises(ConfigError, match="--convergence mine: must be one of"):
        plan_config(config_file("eos_h100_8x8"), convergence="mine")


def test_weak_instances_get_nodes_folders_and_logs_of_their_own() -> None:
    text = render("eos_h100_16x8_weak")
    assert "#SBATCH --nodes=256" in text
    assert re.search(r"^nodes=16 ", text, re.M)
    assert re.search(r"^ntasks=128 ", text, re.M)
    assert 'launch_run $((repeat * instances + instance)) "${instance}"' in text
    assert 'chosen=("${usable[@]:$1*nodes:nodes}")' in text


def test_the_next_phase_starts_on_its_own_nodes_in_the_folder_of_the_job_before() -> None:
    command = ["launch", str(config_file("from_scratch_1056_to_2080_h100")), "--dry-run"]
    first = CliRunner().invoke(app, command).output
    second = CliRunner().invoke(app, [*command, "--phase", "batch_256", "--continue-job", "41"]).output
    assert "#SBATCH --nodes=132\n" in first
    assert "--phase NEXT --continue-job ${SLURM_JOB_ID}" in first
    assert "#SBATCH --nodes=260\n" in second
    assert re.search(r"^ntasks=2080 ", second, re.M)
    assert "/job_41 # continues that job's runs\n" in second


def test_a_phase_that_a_system_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="--phase b: from_scratch_8_h100 has batch_128, batch_256"):
        in_named_phase(load("from_scratch_8_h100"), "b")
    with pytest.raises(ConfigError, match="--phase b: tiny_cpu has no phases"):
        in_named_phase(load("tiny"), "b")


def test_overrides_of_the_launch_reach_every_run() -> None:
    text = render("dgx_h100_1x8", "launch.account=my group", "run.checkpoint_every_iters=80")
    assert "overrides=('launch.account=my group' run.checkpoint_every_iters=80)" in text
    assert "#SBATCH '--account=my group'" in text


def test_a_container_sees_project_run_folder_and_cache_and_starts_read_only() -> None:
    text = render("dgx_h100_1x8")
    assert "--container-readonly" in text
    assert (
        'mounts=/lustre/openfold:/data:ro,"${job_dir}:${job_dir},${project_dir}:${project_dir}:ro,'
        '${cache_dir}:${cache_dir}"' in text
    )
    assert "command_prefix=(/opt/scalefold/launch/run.sh)" in text


def test_an_image_is_unpacked_once_per_node_and_found_by_name_and_the_jobs_variables_beat_its_own() -> None:
    text = render("dgx_h100_1x8", "launch.environment={NCCL_DEBUG: INFO}")
    assert text.count("--container-image=") == 1
    assert text.count('--container-name="${container}"') == 2
    assert '"--container-env=SCALEFOLD_CACHE_DIR,NCCL_DEBUG,SCALEFOLD_NUMA_BINDING"' in text


def test_a_job_file_says_what_no_test_has_run() -> None:
    assert "# Not verified: --container-* options" in render("dgx_h100_1x8")
    assert "# Not verified: the site's modules: gpu nccl" in render("perlmutter_a100_224x4_dap4")
    assert "Not verified" not in render("cpu_2x2")


def test_gpus_are_asked_for_in_the_way_that_this_slurm_knows() -> None:
    assert "#SBATCH --gpus-per-node=8\n" in render("dgx_h100_1x8")
    assert "#SBATCH --gres=gpu:8\n" in render("dgx_h100_1x8", "launch.gpu_request=gres")
    text = render("dgx_h100_1x8", "launch.gpu_request=none")
    assert not re.search(r"^(#SBATCH )?\s*--gp?u?(s-per-node|-bind|res)", text, re.M)


def test_a_node_taken_whole_comes_with_all_its_memory() -> None:
    assert "#SBATCH --mem=0\n" in render("dgx_h100_1x8")
    assert "--mem" not in render("cpu_2x2")


def test_spare_nodes_are_allocated_and_the_loss_of_one_does_not_end_the_job() -> None:
    text = render("eos_h100_16x8_weak", "launch.spare_nodes=2")
    assert "#SBATCH --nodes=258\n" in text
    assert "#SBATCH --no-kill\n" in text
    assert "--no-kill" not in render("eos_h100_16x8_weak")


EVIL = ["\n", "\r", "\0", "\x1b"]


@pytest.mark.parametrize("character", EVIL, ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        "system",
        "run.run_dir",
        "launch.partition",
        "launch.account",
        "launch.venv",
        "launch.cache_dir",
        "launch.drop_caches_command",
        "launch.sbatch_options",
        "launch.modules",
        "launch.environment",
    ],
)
def test_no_key_carries_a_line_of_its_own_into_a_job_file(key: str, character: str) -> None:
    text = f"a{character}touch /tmp/owned"
    values = {"launch.sbatch_options": (text,), "launch.modules": (text,), "launch.environment": {text: "1"}}
    section, _, name = key.rpartition(".")
    config, value = load("h100_1x1"), values.get(key, text)
    if section:
        part = getattr(config, section).model_copy(update={name: Path(text) if name == "run_dir" else value})
        config = config.model_copy(update={section: part})
    else:
        config = config.model_copy(update={name: value})
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: .* cannot stand in a job file"):
        render_sbatch(config, PROJECT / "configs" / "h100_1x1.yaml", PROJECT)


@pytest.mark.parametrize("name", ["a b", "a=b", "été (1)"])
def test_a_folder_with_a_space_reaches_slurm_and_the_run_as_one_word(name: str) -> None:
    text = render("h100_1x1", f"run.run_dir=runs/{name}")
    line = next(line for line in text.splitlines() if "--output=" in line)
    assert shlex.split(line) == ["#SBATCH", f"--output=runs/{name}/slurm-%j.out"]
    assert f"job_dir=$(realpath -m -- {shlex.quote(f'runs/{name}')})/job_" in text


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("a%j", "run.run_dir: '%' cannot stand"),
        ("a #1", "run.run_dir: '#' cannot stand"),
        ("a:b", "run.run_dir: ':' cannot stand"),
        ("a,b", "run.run_dir: ',' cannot stand"),
        ("$(x)", r"run.run_dir: '\$' cannot stand"),
        ("a'b", "run.run_dir: .* cannot stand"),
        ("-a", "run.run_dir: '-' cannot stand"),
        ("x" * 201, "run.run_dir: longer than 800 characters, or one name in it longer than 200 bytes"),
        ("x/" * 401, "run.run_dir: longer than 800 characters"),
    ],
)
def test_a_folder_that_slurm_the_shell_yaml_or_pyxis_would_misread_is_refused(run_dir: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render("h100_1x1", f"run.run_dir={json.dumps(run_dir)}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('system="a; rm -rf b"', "system: 'a; rm -rf b' names a job"),
        ("launch.environment={A B: c}", "launch.environment: 'A B' is no name of a variable"),
        ("launch.cache_dir=/tmp/$(id)", r"launch.cache_dir: '\$\('"),
        ("launch.time_limit_min=2", "launch.time_limit_min 2: ends before launch.signal_grace_s 120"),
    ],
)
def test_other_text_that_would_break_a_job_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render("h100_1x1", override)


def test_a_failing_cache_drop_names_the_command_and_how_to_leave_it_out() -> None:
    text = render("dgx_h100_1x8", "launch.drop_caches_command=sudo drop 'now'")
    assert "launch.drop_caches_command failed" in text
    assert "launch.drop_caches_command=null" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.venv=.venv"], "container_image or venv, not both"),
        (["launch.container_image=null"], "container_mounts: needs launch.container_image"),
        (["training.seed=1", "launch.repeats=2"], "training.seed 1: 2 repeats x 1 instances would all be the same run"),
        (["launch.nics=[mlx5_0, mlx5_1]"], "launch.nics: 2 cards for 8 ranks per node"),
    ],
)
def test_a_job_that_contradicts_itself_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render("dgx_h100_1x8", *overrides)


def test_relative_folders_of_a_job_start_at_the_project() -> None:
    text = render("h100_1x1")
    assert f"#SBATCH --chdir={PROJECT}" in text
    assert "\nconfig=configs/h100_1x1.yaml\n" in text


# Submission ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named sbatch that notes its arguments, and refuses partition `closed`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "sbatch"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$@" > {tmp_path}/arguments\n'
        'if grep -q "partition=closed" "$2"; then echo "invalid partition" >&2; exit 1; fi\n'
        "echo '17;cluster'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


def test_a_submission_writes_the_job_file_and_returns_the_job_number(fake_sbatch: Path) -> None:
    config = load("h100_1x1")
    file, job_id = submit(config, "#!/bin/sh\n", fake_sbatch)
    assert (file, job_id) == (fake_sbatch / "runs" / "h100_1x1" / "job.sbatch", "17")
    assert file.read_text() == "#!/bin/sh\n"
    assert (fake_sbatch / "arguments").read_text().split() == ["--parsable", str(file)]


def test_a_job_to_continue_must_be_there(fake_sbatch: Path) -> None:
    (fake_sbatch / "runs" / "h100_1x1" / "job_17").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--continue-job 99: no folder .*/job_99; there: job_17"):
        submit(load("h100_1x1"), "#!/bin/sh\n", fake_sbatch, continue_job=99)
    assert submit(load("h100_1x1"), "#!/bin/sh\n", fake_sbatch, continue_job=17)[1] == "17"


def test_a_container_is_refused_where_slurm_cannot_start_one(fake_sbatch: Path) -> None:
    srun = fake_sbatch / "bin" / "srun"
    srun.write_text("#!/bin/sh\necho '  --nodes=N'\n")
    srun.chmod(0o755)
    with pytest.raises(ConfigError, match=r"needs pyxis.*or set launch\.venv"):
        submit(load("dgx_h100_1x8"), "#!/bin/sh\n", fake_sbatch)
    srun.write_text("#!/bin/sh\necho '  --container-image=IMAGE'\n")
    assert submit(load("dgx_h100_1x8"), "#!/bin/sh\n", fake_sbatch)[1] == "17"


def test_what_slurm_says_when_it_refuses_a_job_is_passed_on(fake_sbatch: Path) -> None:
    with pytest.raises(ConfigError, match="sbatch refuses the job: invalid partition"):
        submit(load("h100_1x1"), "#SBATCH --partition=closed\n", fake_sbatch)


def test_without_slurm_the_message_names_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch on the PATH.*launch/torchrun\.sh"):
        submit(load("h100_1x1"), "", tmp_path)


def test_the_project_folder_is_found_from_below_and_missed_elsewhere(tmp_path: Path) -> None:
    assert find_project_dir(REPOSITORY / "configs") == REPOSITORY
    with pytest.raises(ConfigError, match="--project-dir"):
        find_project_dir(tmp_path)


# launch/run.sh ---------------------------------------------------------------------------------------------------


def run_sh(tmp_path: Path, command: str, **variables: str) -> str:
    environment = {"PATH": os.environ["PATH"], "SCALEFOLD_CACHE_DIR": str(tmp_path / "cache")} | variables
    done = subprocess.run(
        [REPOSITORY / "launch" / "run.sh", "bash", "-c", command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_entry_puts_caches_on_the_named_disk(tmp_path: Path) -> None:
    shown = run_sh(tmp_path, "echo $TRITON_CACHE_DIR; echo $OMP_NUM_THREADS", SLURM_LOCALID="3")
    assert shown.split() == [str(tmp_path / "cache" / "triton"), "1"]
    assert (tmp_path / "cache" / "triton").is_dir()


def test_the_entry_gives_each_rank_its_own_network_card(tmp_path: Path) -> None:
    shown = run_sh(tmp_path, "echo $NCCL_IB_HCA", SCALEFOLD_NICS="mlx5_0 mlx5_3", SLURM_LOCALID="1")
    assert shown == "=mlx5_3"


def fake_host(tmp_path: Path, num_nodes: int, cores_per_node: int, threads: int = 1) -> dict[str, str]:
    """A host of NUMA nodes for launch/run.sh: `lscpu`, `taskset` that only names its CPUs, and sysfs."""
    total = num_nodes * cores_per_node
    table = [
        f"{cpu},{cpu % total},{cpu % total // cores_per_node}" for cpu in range(total * threads)
    ]  # hardware threads of a core are numbered a whole host apart, as Linux does
    programs = tmp_path / "bin"
    programs.mkdir()
    lines = "\n".join(["# CPU,Core,Node", *table])
    (programs / "lscpu").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    (programs / "taskset").write_text('#!/bin/sh\necho "$2"\n')
    for node in range(num_nodes):
        (tmp_path / "numa" / f"node{node}").mkdir(parents=True)
    for program in programs.iterdir():
        program.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "SCALEFOLD_NUMA_DIR": str(tmp_path / "numa")}


def test_reversed_binding_gives_rank_0_the_last_numa_node(tmp_path: Path) -> None:
    variables = fake_host(tmp_path, num_nodes=4, cores_per_node=2)
    variables |= {"SCALEFOLD_NUMA_BINDING": "reversed", "SLURM_NTASKS_PER_NODE": "4"}
    bound = [run_sh(tmp_path, "true", SLURM_LOCALID=str(rank), **variables) for rank in range(4)]
    assert bound == ["6,7", "4,5", "2,3", "0,1"]


def test_ranks_of_one_socket_get_cores_of_their_own_with_all_hardware_threads(tmp_path: Path) -> None:
    variables = fake_host(tmp_path, num_nodes=2, cores_per_node=6, threads=2)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor n in 1 2 3 4 5 6 7 8; do echo 00000000:0$n:00.0; done\n")
    smi.chmod(0o755)
    for number in range(1, 9):
        folder = tmp_path / "pci" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{int(number > 4)}\n")
    variables |= {"SCALEFOLD_PCI_DIR": str(tmp_path / "pci"), "SCALEFOLD_NUMA_BINDING": "socket"}
    variables |= {"SLURM_NTASKS_PER_NODE": "8"}
    bound = [run_sh(tmp_path, "true", SLURM_LOCALID=str(rank), **variables).split(",") for rank in range(8)]
    cpus = [int(cpu) for share in bound for cpu in share]
    assert sorted(cpus) == list(range(24)), "every hardware thread belongs to exactly one rank"
    for rank, share in enumerate(bound):
        cores = {int(cpu) % 12 for cpu in share}
        assert {core // 6 for core in cores} == {int(rank >= 4)}, "the socket of its GPU"
        assert len(share) == 2 * len(cores), "both threads of every core"


def test_without_a_gpu_nothing_is_bound(tmp_path: Path) -> None:
    variables = fake_host(tmp_path, num_nodes=2, cores_per_node=2) | {"SCALEFOLD_NUMA_BINDING": "socket"}
    assert run_sh(tmp_path, "echo free", SLURM_LOCALID="0", **variables) == "free"


def test_a_node_takes_over_the_kernels_that_were_compiled_ahead(tmp_path: Path) -> None:
    (tmp_path / "compiled" / "ABC").mkdir(parents=True)
    (tmp_path / "compiled" / "ABC" / "kernel.cubin").write_text("code")
    for _ in range(2):
        shown = run_sh(tmp_path, "ls $TRITON_CACHE_DIR/ABC", SCALEFOLD_COMPILED_DIR=str(tmp_path / "compiled"))
        assert shown == "kernel.cubin"
        (tmp_path / "compiled" / "ABC" / "late").touch()  # the second rank copies nothing


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_cache_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 1234, 1234)
    done = subprocess.run(
        [REPOSITORY / "launch" / "run.sh", "true"],
        env={"PATH": os.environ["PATH"], "SCALEFOLD_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "belongs to somebody else" in done.stderr) == (2, True)


def test_the_entry_passes_on_the_exit_status_and_explains_itself(tmp_path: Path) -> None:
    entry = REPOSITORY / "launch" / "run.sh"
    environment = os.environ | {"SCALEFOLD_CACHE_DIR": str(tmp_path)}
    assert subprocess.run([entry, "bash", "-c", "exit 4"], env=environment).returncode == 4
    done = subprocess.run([entry], env=environment, capture_output=True, text=True)
    assert (done.returncode, "usage: run.sh COMMAND" in done.stdout) == (2, True)


def test_stop_signals_leave_the_tracker_of_shared_memory_alone() -> None:
    """In a process of its own: this one's tracker runs already."""
    program = """
import os, signal, time
from multiprocessing import resource_tracker
from scalefold.stop_signals import STOP_SIGNALS, children_unaware
with children_unaware():
    pass
tracker = resource_tracker._resource_tracker
for _ in range(10):
    for wanted in STOP_SIGNALS:
        os.kill(tracker._pid, wanted)
    time.sleep(0.05)
alive, blocked = tracker._check_alive(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
print(alive, len(blocked))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True", "0"], "")


def test_torchrun_starts_the_configured_number_of_ranks(tmp_path: Path) -> None:
    for name, line in (("torchrun", 'echo "$@"'), ("scalefold", f'exec {shutil.which("scalefold")} "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [REPOSITORY / "launch" / "torchrun.sh", config_file("dgx_h100_1x8"), "run.run_dir=runs/a", "--resume"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NNODES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--nnodes=2 --node-rank=0 --nproc-per-node=8" in done.stdout
    assert done.stdout.strip().endswith("configs/dgx_h100_1x8.yaml run.run_dir=runs/a --resume")


@pytest.mark.distributed
def test_the_network_check_counts_wrong_sums_and_refuses_a_slow_network(tmp_path: Path) -> None:
    command = [
        "torchrun",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-endpoint=127.0.0.1:0",
        "--rdzv-backend=c10d",
    ]
    check = ["-m", "scalefold.launch.network_check", "--elements", "100000", "--min-gb-per-s"]
    fine = subprocess.run([*command, *check, "0"], capture_output=True, text=True)
    assert fine.returncode == 0, fine.stderr
    assert re.search(r"network check: 2 ranks, [\d.]+ ms, bus [\d.]+ GB/s", fine.stdout)
    slow = subprocess.run([*command, *check, "1e9"], capture_output=True, text=True)
    assert slow.returncode == 1
    assert "wanted 1e+09" in slow.stdout
