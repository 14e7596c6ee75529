"""Whether what a package states in several places is the same: logs, system descriptions and configurations."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scalefold.config import Config, load_config
from scalefold.errors import ConfigError
from scalefold.mlperf.log.keys import BENCHMARK, KEYS
from scalefold.mlperf.log.logfile import Log
from scalefold.mlperf.pack.package_tree import Package, Problem, ResultFolder, Rule

#: Words of the submission rules for ``status`` in a description, in the order in which they are looked for, and the
#: log's words that mean the same.
_STATUS_WORDS = {
    "cloud": ("cloud",),
    "prem": ("onprem",),
    "preview": ("preview",),
    "research": ("research",),
    "rdi": ("research",),
    "available": ("onprem", "cloud"),
}
#: Numerical formats that the training rules admit without asking, and other names for them.
_PRECISIONS = {"fp64", "fp32", "tf32", "fp16", "fp8", "bf16", "int8", "uint8", "int4", "uint4", "graphcore16.16"}
_SYNONYMS = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8": "fp8"}
_GPU = re.compile(r"(?:GB[23]00|GH200|B[123]00|H[128]00|A[18]00|V100|MI\d{3})(?!\d)", re.IGNORECASE)
#: Formats that the tensor units of a family do not have.
_LACKS = {"V100": ("bf16", "tf32", "fp8"), "A100": ("fp8",), "A800": ("fp8",)}


def one_directory_is_one_experiment(package: Package) -> Iterator[Problem]:
    """Whatever a run states, but for its seed, is stated by all runs: one configuration, one system (trap 15)."""
    keys = [key.name for key in KEYS.values() if key.count == "exactly_one" and key.types and key.name != "seed"]
    for folder in package.folders:
        for key in keys:
            values = {json.dumps(log.value(key)) for log in folder.logs}
            if len(values) > 1:
                message = f"{key} differs among the runs: {', '.join(sorted(values))}"
                yield Problem(package.name(folder.path), message, "submit runs of one configuration")


def logs_agree_with_the_system(package: Package) -> Iterator[Problem]:
    """Division, and node and accelerator counts, which the summary takes from the JSON file alone."""
    for folder in package.folders:
        contents = package.systems.get(folder.system)
        if contents is None or not folder.logs:
            continue
        where, log = package.name(folder.path), folder.logs[0]
        if log.value("submission_division") != contents.get("division"):
            message = f"division {log.value('submission_division')} in logs, {contents.get('division')} in the JSON"
            yield Problem(where, message, "make them equal")
        yield from _who_and_where_problems(where, log, contents)
        yield from _scale_problems(where, folder, log, contents)


def _scale_problems(where: str, folder: ResultFolder, log: Log, contents: dict[str, Any]) -> Iterator[Problem]:
    nodes, gpus = log.value("number_of_nodes"), log.value("accelerators_per_node")
    total = str(contents.get("number_of_nodes"))
    if str(contents.get("accelerators_per_node")) != str(gpus):
        message = f"accelerators_per_node {gpus} in logs, {contents.get('accelerators_per_node')} in the JSON"
        yield Problem(where, message, "make them equal")
    if folder.scaling == "strong" and total != str(nodes):
        message = f"number_of_nodes {nodes} in logs, {total} in the JSON: the system would be listed at a wrong size"
        yield Problem(where, message, "give each scale its own system name and JSON")
    if folder.scaling == "weak" and total.isdigit() and isinstance(nodes, int) and int(total) < nodes:
        yield Problem(where, f"an instance has {nodes} nodes, the system {total}", "correct the JSON")


def _who_and_where_problems(where: str, log: Log, contents: dict[str, Any]) -> Iterator[Problem]:
    """Organization, availability and accelerator of the logs against the description."""
    org, submitter = log.value("submission_org"), contents.get("submitter")
    if _plain(org) != _plain(submitter):
        yield Problem(where, f"organization {org!r} in logs, submitter {submitter!r} in the JSON", "make them equal")
    status, meant = log.value("submission_status"), status_words(contents.get("status"))
    if meant and status not in meant:
        message = f"status {status} in logs, {contents.get('status')!r} in the JSON"
        yield Problem(where, message, "make them equal")
    yield from _accelerator_problems(where, log, contents)


def status_words(status: Any) -> tuple[str, ...]:
    """The log's words for a description's status; empty for one that the submission rules do not have."""
    text = str(status).lower()
    return next((words for word, words in _STATUS_WORDS.items() if word in text), ())


def _plain(text: Any) -> str:
    """Letters and digits, without regard to case."""
    return "".join(letter for letter in str(text).casefold() if letter.isalnum())


def _families(*texts: Any) -> set[str]:
    """Accelerator families that texts name; a GH200 holds an H100 or an H200."""
    found = {name.upper() for text in texts for name in _GPU.findall(str(text))}
    return found | ({"H100", "H200"} if "GH200" in found else set())


def _accelerator_problems(where: str, log: Log, contents: dict[str, Any]) -> Iterator[Problem]:
    model = contents.get("accelerator_model_name")
    described, logged = _families(model), _families(log.value("submission_platform"))
    if described and logged and not described & logged:
        message = f"accelerator_model_name {model!r} in the JSON, platform {log.value('submission_platform')!r} in logs"
        yield Problem(where, message, "correct the one that is wrong")
    precision = _precision(log.value("precision"))
    if precision not in _PRECISIONS:
        message = f"precision {log.value('precision')!r} in logs is no format that the rules admit"
        yield Problem(where, message, f"log one of {', '.join(sorted(_PRECISIONS))}")
    for family in described:
        if precision in _LACKS.get(family, ()):
            yield Problem(where, f"precision {precision} in logs, which {family} does not have", "correct either")
    for name, value in contents.items():
        if "precision" in name.lower() and value and _precision(value) != precision:
            yield Problem(where, f"precision {precision} in logs, {name} {value!r} in the JSON", "make them equal")


def _precision(value: Any) -> str:
    text = str(value).lower().replace(" ", "").replace("_", "")
    return _SYNONYMS.get(text, text)


def descriptions_agree_with_themselves(package: Package) -> Iterator[Problem]:
    """Name of the file, accelerators, status, and the copy beside the system's scripts."""
    for name, contents in package.systems.items():
        where = f"systems/{name}.json"
        if not status_words(contents.get("status")):
            message = f"status is {contents.get('status')!r}, none of the availability categories"
            yield Problem(where, message, 'write "Available on-premise", "Available cloud", "Preview" or "Research"')
        model = contents.get("accelerator_model_name") or ""
        named, described = _families(name, contents.get("system_name")), _families(model)
        if named and described and not named & described:
            message = f"accelerator_model_name is {model!r}, the system's name says {', '.join(sorted(named))}"
            yield Problem(where, message, "correct the one that is wrong")
        if str(contents.get("accelerators_per_node")) == "0" and described:
            message = f"accelerators_per_node is 0, accelerator_model_name {model!r}"
            yield Problem(where, message, "correct the one that is wrong")
        yield from _copy_problems(package, name, contents)


def _copy_problems(package: Package, name: str, contents: dict[str, Any]) -> Iterator[Problem]:
    folder = package.system_folder(name)
    file = folder / f"{name}.json" if folder else None
    if file is None or not file.is_file():
        return
    try:
        copy = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        yield Problem(package.name(file), f"not a JSON object: {error}", "repair the file")
        return
    stated = copy if isinstance(copy, dict) else {}
    if wrong := [f for f in (*contents, *(set(stated) - set(contents))) if stated.get(f) != contents.get(f)]:
        message = f"{', '.join(wrong)}: not as in systems/{name}.json"
        yield Problem(package.name(file), message, "make the two files equal", "note")


def clocks_agree_with_the_description(package: Package) -> Iterator[Problem]:
    """A description that gives a date gives the last day of the runs, two dates their first and last."""
    for folder in package.folders:
        days = sorted(_dates(package.systems.get(folder.system, {})))
        for log in folder.logs if days else ():
            stop = log.first("run_stop")
            day = _day(stop.time_ms) if stop else None
            if day is not None and not (days[0] if len(days) > 1 else "") <= day <= days[-1]:
                message = f"run of {day}, the description's dates are {', '.join(days)}"
                yield Problem(package.name(log.file), message, "correct the date, or submit the runs of that time")


def _dates(contents: dict[str, Any]) -> Iterator[str]:
    for name, value in contents.items():
        if re.search(r"(^|_)dates?(_|$)", name.lower()) and isinstance(value, str):
            yield from re.findall(r"\b20\d\d-\d\d-\d\d\b", value)


def _day(time_ms: float) -> str | None:
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return None


# Configurations --------------------------------------------------------------------------------------------------


def packed_configurations_load(package: Package) -> Iterator[Problem]:
    """The file that run_and_time.sh names is there, with its parents, inside the package."""
    for system in _our_systems(package):
        files = configurations(package, system)
        if not files:
            message = "no configuration beside run_and_time.sh: it has to be given by hand"
            yield Problem(f"benchmarks/{BENCHMARK}/{system}", message, "pack the configuration that was run", "note")
        for file in files:
            if isinstance(found := _load(package, file), str):
                message = f"run_and_time.sh cannot run: {found}"
                yield Problem(package.name(file), message, "pack the resolved configuration, config.yaml of the run")


def logs_agree_with_the_configuration(package: Package) -> Iterator[Problem]:
    """Logs of a system are those of one of its packed configurations."""
    for folder in package.folders:
        if folder.system not in _our_systems(package) or not folder.logs:
            continue
        loaded = [(file, _load(package, file)) for file in configurations(package, folder.system)]
        found = [(file, config_differences(c, folder.logs[0])) for file, c in loaded if isinstance(c, Config)]
        if found and all(differences for _, differences in found):
            file, differences = min(found, key=lambda pair: len(pair[1]))
            message = f"not the runs of {package.name(file)}: {', '.join(differences)}"
            yield Problem(package.name(folder.path), message, "pack the configuration that was run")
        for file, config in loaded:
            yield from _gpu_problems(package, folder, file, config)


def _gpu_problems(package: Package, folder: ResultFolder, file: Path, config: Config | str) -> Iterator[Problem]:
    """The accelerator that the configuration names against the description's."""
    if isinstance(config, str):
        return
    model = package.systems.get(folder.system, {}).get("accelerator_model_name")
    configured, described = _families(config.parallel.gpu), _families(model)
    if configured and described and not configured & described:
        message = f"parallel.gpu is {config.parallel.gpu}, accelerator_model_name in the JSON {model!r}"
        yield Problem(package.name(file), message, "correct the one that is wrong")


def _our_systems(package: Package) -> list[str]:
    """Systems with a folder of scripts in a package that ships this source."""
    names = sorted({folder.system for folder in package.folders})
    return [name for name in names if package.is_ours and package.system_folder(name) is not None]


def configurations(package: Package, system: str) -> list[Path]:
    """YAML files beside a system's scripts."""
    folder = package.system_folder(system)
    return sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if folder else []


def _load(package: Package, file: Path) -> Config | str:
    """The configuration, or why there is none."""
    try:
        loaded = load_config(file)
    except ConfigError as error:
        return str(error).replace(f"{package.root}/", "")
    root = package.root.resolve()
    outside = [o.file for o in loaded.origins.values() if not Path(o.file).resolve().is_relative_to(root)]
    return f"{outside[0]} is not in the package" if outside else loaded.config


def config_differences(config: Config, log: Log) -> list[str]:
    """``key: value in the log, value in the configuration`` of every fact that both state."""
    stated = _stated(config)
    return [
        f"{key} {log.value(key)} in the logs, {value} in the configuration"
        for key, value in stated.items()
        if log.first(key) is not None and log.value(key) != value
    ]


def _stated(config: Config) -> dict[str, Any]:
    """What a configuration says about keys of the log; nothing where it leaves a fact open or phases change it."""
    facts: dict[str, Any] = {}
    for section in (config.training, config.data, config.loss):
        facts |= {name: getattr(section, name) for name in type(section).model_fields if name in KEYS}
    p, s = config.parallel, config.submission
    facts |= {"number_of_nodes": p.nodes, "accelerators_per_node": p.gpus_per_node, "number_of_ranks": p.world_size}
    facts |= {"precision": config.execution.precision, "templates_enabled": config.model.templates_enabled}
    facts |= {f"submission_{name}": getattr(s, name) for name in ("org", "platform", "division", "status")}
    facts["initial_training_dataloader_type"] = f"InitialTrainingDataloader{config.data.dataloader.upper()}"
    changing = {name for phase in config.phases for name in phase.model_fields_set}
    changing |= {"number_of_nodes", "number_of_ranks"} if "nodes" in changing else set()
    return {name: value for name, value in facts.items() if value not in (None, "") and name not in changing}


RULES: list[Rule] = [
    one_directory_is_one_experiment,
    logs_agree_with_the_system,
    descriptions_agree_with_themselves,
    clocks_agree_with_the_description,
    packed_configurations_load,
    logs_agree_with_the_configuration,
]
