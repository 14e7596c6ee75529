"""Configuration files: strict keys, one parent, origins, and errors that name file, line and nearest key."""

from pathlib import Path

import pytest

from scalefold.config import describe_config, dump_config, load_config
from scalefold.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", "system: base\ntraining:\n  global_batch_size: 8\n  num_train_iters: 10\n")


def test_a_child_overrides_its_parent_and_the_command_line_overrides_both(tmp_path: Path, base: Path) -> None:
    child = write(tmp_path / "child.yaml", "base: base.yaml\nsystem: child\ntraining:\n  global_batch_size: 4\n")
    loaded = load_config(child, ["training.num_train_iters=7"])
    assert (loaded.config.system, loaded.config.training.global_batch_size) == ("child", 4)
    assert loaded.config.training.num_train_iters == 7
    origins = {key: origin for key, _, origin in describe_config(loaded)}
    assert origins["training.global_batch_size"] == f"{child}:4"
    assert origins["training.num_train_iters"] == "command line"
    assert origins["training.val_every_iters"] == "default"


def test_an_unknown_key_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", "system: x\ntraining:\n  gobal_batch_size: 4\n")
    with pytest.raises(
        ConfigError, match=r"x\.yaml:3: unknown key `training.gobal_batch_size`.*`training.global_batch_size`"
    ):
        load_config(file)


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", "system: x\ntrainig: {seed: 1}\n")
    with pytest.raises(ConfigError, match=r"x\.yaml:2: unknown key `trainig`"):
        load_config(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("system: x\ntraining: {global_batch_size: many}\n", r"x\.yaml:2: training.global_batch_size"),
        ("system: x\nsystem: y\n", r"x\.yaml:2: key `system` is given twice"),
        ("system: [x\n", r"x\.yaml:\d: not valid YAML"),
        ("base: x.yaml\n", "already its own child"),
        ("system: x\nbase: y.yaml\n", r"x\.yaml:2: base: .*y\.yaml: no such file; it is sought beside x\.yaml"),
        ("system: x\ntraining:\n", r"x\.yaml:2: `training` is a section and takes no value of its own; its keys are"),
        ("- 1\n", "must hold `key: value` lines"),
        ("system: x\nparallel: {dap_size: 3}\n", r"parallel.dap_size"),
        ("system: x\nparallel: {gpus_per_node: 8, dap_size: 8, num_eval_ranks: 1}\n", "multiple of dap_size 8"),
        ("system: x\nparallel: {nodes: 2, gpus_per_node: 6, dap_size: 4}\n", "must divide the 6 ranks of a node"),
        ("system: x\nparallel: {gpus_per_node: 3}\n", "global_batch_size 128 must be a multiple of the 3"),
        ("system: x\ntraining: {gradient_accumulation_steps: 3}\n", "val_every_iters 40 must be a multiple"),
        (
            "system: x\nexecution: {deterministic: true}\ndata: {dataloader: pq}\n",
            "deterministic needs data.dataloader: pt",
        ),
        ("system: x\ndata: {masked_msa_same_prob: 0.9}\n", "add up to more than 1"),
    ],
)
def test_a_bad_file_gives_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "x.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"system: x\ndescription: M\xfcnchen\n", r"x\.yaml:2: byte 24 \(0xfc\) is not UTF-8 text; save the file as"),
        (b"system: x\nphases:\n- {yes: 1}\n", r"x\.yaml:3: key `yes` must be text"),
        (b"system: x\nphases:\n- {name: a, name: b}\n", r"x\.yaml:3: key `name` is given twice"),
        (b"system: x\n1: y\n", r"x\.yaml:2: key `1` must be text"),
        (b"system: x\ntraining: {yes: 1}\n", r"x\.yaml:2: key `yes` must be text"),
        (b"system: x\n? [a]\n: 1\n", r"x\.yaml:2: key `sequence` must be text"),
        (b"system: " + b"[" * 40, r"x\.yaml:1: not valid YAML: nested more than 32 levels deep"),
        (b"system: " + b"[" * 100_000, r"x\.yaml: not valid YAML: nested more than 32 levels deep"),
        (b"a: &a [x]\nb: *a\n", r"x\.yaml:2: not valid YAML: aliases"),
        (b"system: x\ndescription: 2021-06-31\n", r"x\.yaml: not valid YAML: day is out of range"),
        (
            b"system: x\ntraining: {seed: 0x" + b"f" * 5000 + b"}\n",
            r"x\.yaml:2: not valid YAML: a number of more than 40",
        ),
        (b"system: x\nloss: {fape_loss_weight: .nan}\n", r"x\.yaml:2: loss.fape_loss_weight: .*finite"),
        (b'system: x\nbase: "a\\0b"\n', r"x\.yaml:2: not valid YAML: a value holds NUL"),
        (b"system: \x01\n", r"x\.yaml: not valid YAML: unacceptable character"),
        (b"", r"x\.yaml: must hold `key: value` lines, found none"),
    ],
)
def test_a_file_that_no_reader_expects_gives_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("\ufeffsystem: x\n".encode())
    assert load_config(file).config.system == "x"


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.seed=[", "override `training.seed=\\[`:1: not valid YAML"),
        ("training.seed=" + "[" * 2000, "nested more than 32 levels deep"),
        ("launch.environment={1: 2}", "key `1` must be text"),
        ("training.seed=2021-06-31", "day is out of range"),
        ("training.seed.x=1", "training.seed"),
        ("system.x=1", "`system` is a value, not a section"),
        ("=1", "override `=1` must look like key.sub=value"),
        ("training=1", "command line: `training` is a section and takes no value of its own; its keys are seed, "),
        ("base=x.yaml", "unknown key `base`"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(base: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(base, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read"):
        load_config(tmp_path / "absent.yaml")


def test_an_override_without_value_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        load_config(base, ["training.seed"])


def test_the_resolved_file_loads_to_the_same_config(tmp_path: Path, base: Path) -> None:
    config = load_config(base, ["launch.environment.NCCL_DEBUG=INFO", "training.seed=3"]).config
    again = load_config(write(tmp_path / "resolved.yaml", dump_config(config))).config
    assert again == config
    assert again.launch.environment == {"NCCL_DEBUG": "INFO"}


def test_batch_and_rank_arithmetic(tmp_path: Path) -> None:
    parallel = "{nodes: 260, gpus_per_node: 8, dap_size: 8, num_eval_ranks: 32}"
    text = f"system: eos\nparallel: {parallel}\ntraining: {{global_batch_size: 256}}\n"
    config = load_config(write(tmp_path / "eos.yaml", text)).config
    assert (config.parallel.world_size, config.parallel.dp_size, config.local_batch_size) == (2080, 256, 1)


def test_every_shipped_config_loads(repository: Path) -> None:
    files = sorted((repository / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert load_config(file).config.system
